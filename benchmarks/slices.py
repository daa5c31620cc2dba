"""
Time of the linear maps on leading slices of wide weights, against contiguous weights of the same size:

    python -m benchmarks.slices --dtype bfloat16

The linear maps of the first stage of ThinkingViT 3 → 6, with a view of the full weight and with a contiguous copy of
the view, taking turns. A ratio above 1 is what contiguous weights would save.
"""

import argparse
from functools import partial

import torch
from torch.nn.functional import linear

from benchmarks.measure import add_run_arguments, describe_run, measure, median_and_quartiles


# (rows, columns) of the slice and of the full weight: attention's projections, and the two of the MLP.
SLICES = (((192, 192), (384, 384)), ((768, 192), (1536, 384)), ((192, 768), (384, 1536)))


def repeatedly(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    for _ in range(8):  # one product is too short to be timed
        linear(tokens, weight, bias)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, repeats=100)
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    print(describe_run(device, arguments.dtype))
    print("| batch | slice | of | time with the slice / with a copy: median (quartiles) |\n|---|---|---|---|")
    for batch_size in arguments.batch_size:
        for (rows, columns), whole in SLICES:
            weight = torch.randn(whole, device=device, dtype=dtype)
            view, bias = weight[:rows, :columns], torch.randn(rows, device=device, dtype=dtype)
            tokens = torch.randn(batch_size, 197, columns, device=device, dtype=dtype)
            rivals = {
                "view": partial(repeatedly, tokens, view, bias),
                "packed": partial(repeatedly, tokens, view.contiguous(), bias),
            }
            seconds = measure(rivals, arguments.repeats, device)
            ratios = [view_time / packed_time for view_time, packed_time in zip(seconds["view"], seconds["packed"])]
            print(f"| {batch_size} | {rows} × {columns} | {whole[0]} × {whole[1]} | {median_and_quartiles(ratios)} |")


if __name__ == "__main__":
    main()
