"""
ThinkingSwin (Swin-S, head rounds (3, 3, 6, 12) → (3, 6, 12, 24)) against Transformers' Swin-S, in one run:

    python -m benchmarks.swin --batch-size 1 16

Pixels in, logits out, 224 × 224, random weights; the models take turns, and the median over the repeats counts. The
last round alone is a ThinkingSwin of one round with all heads and Swin-S's weights; that both give the same logits is
checked first. The last column is the speedup over Swin-S divided by the ratio of multiply-accumulates, Swin-S over
ThinkingSwin. The goal is 0.9 for the first round, and 1 for the last.
"""

import argparse
import statistics

import torch

from benchmarks.measure import add_run_arguments, describe_run, measure
from benchmarks.rivals import swin_small
from hf_thinkingvit import ThinkingSwinConfig, ThinkingSwinForImageClassification
from hf_thinkingvit.evaluation import stage_macs


@torch.no_grad()
def compare(batch_size: int, repeats: int, device: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    swin = swin_small().to(device, dtype).eval()
    last = ThinkingSwinForImageClassification.from_swin(swin, [swin.config.num_heads])
    model = ThinkingSwinForImageClassification(ThinkingSwinConfig(num_labels=1000)).to(device, dtype).eval()
    pixel_values = torch.randn(batch_size, 3, 224, 224, device=device, dtype=dtype)
    torch.testing.assert_close(last(pixel_values).logits, swin(pixel_values).logits, atol=1e-2, rtol=1e-2)
    rivals = {
        "Swin-S": lambda: swin(pixel_values),
        "last round alone": lambda: last(pixel_values),
        "first round alone": lambda: model(pixel_values, threshold=1000.0),
        "all rounds": lambda: model(pixel_values, threshold=0.0),
    }
    (plain,) = stage_macs(last.config)
    first, second = stage_macs(model.config)
    macs = {"last round alone": plain, "first round alone": first, "all rounds": first + second}
    seconds = measure(rivals, repeats, device)
    theirs = statistics.median(seconds["Swin-S"]) / batch_size * 1e3
    for name, spent in macs.items():
        ratios = [rival / ours for rival, ours in zip(seconds["Swin-S"], seconds[name])]
        ours = statistics.median(seconds[name]) / batch_size * 1e3
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"| {batch_size} | {name} | {ours:.1f} | {theirs:.1f} | {middle:.2f} ({low:.2f} to {high:.2f}) | "
            f"{plain / spent:.2f} | {middle * spent / plain:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, repeats=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(describe_run(device, arguments.dtype))
    print(
        "| batch | ThinkingSwin | ms per image | Swin-S | Swin-S / ours: median (quartiles) | MACs: Swin-S / ours | "
        "time over MACs |\n|---|---|---|---|---|---|---|"
    )
    for batch_size in arguments.batch_size:
        compare(batch_size, arguments.repeats, device, getattr(torch, arguments.dtype))


if __name__ == "__main__":
    main()
