"""
ThinkingViT 3 → 6 against Transformers' plain ViTs of the same sizes, in one run:

    python -m benchmarks.inference --batch-size 1 16

Pixels in, logits out, 224 × 224, random weights, rivals interleaved, median over the repeats. Three exit shares: all
images leave after the first stage (τ = 10), against ViT-Tiny; none does (τ = 0), against ViT-Tiny and ViT-Small in
sequence; 36 % go on (the published share at τ = 1), against the same two. The share is exact: τ is set between the
entropies of the batch. At batch 1 it is the mean over 25 single images of which 9 go on.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from transformers import ViTConfig, ViTForImageClassification

from hf_thinkingvit import ThinkingViTConfig, ThinkingViTForImageClassification


SHARE = 0.36
SINGLE_IMAGES = 25


def plain_vit(heads: int) -> ViTForImageClassification:
    """A Transformers ViT of DeiT proportions: 3 heads are ViT-Tiny, 6 are ViT-Small."""
    config = ViTConfig(
        hidden_size=64 * heads, num_attention_heads=heads, intermediate_size=256 * heads, num_labels=1000
    )
    return ViTForImageClassification(config)


def threshold_for_share(entropies: torch.Tensor, share: float) -> float:
    """τ halfway between the two entropies that part the most uncertain `share` of the images from the others."""
    entropies = entropies.sort().values
    exits = round(len(entropies) * (1 - share))
    return float((entropies[exits - 1] + entropies[exits]) / 2)


def describe_run(device: torch.device, dtype: str) -> str:
    """What a table of measurements needs above it: hardware, threads, dtype, versions and date."""
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return (
        f"{hardware}, {torch.get_num_threads()} CPU threads, {dtype}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {time.strftime('%Y-%m-%d')}\n"
    )


def measure(rivals: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call of each rival, taken in turns."""
    seconds = {name: [] for name in rivals}
    for repeat in range(repeats + 2):
        for name, call in rivals.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 2:  # the first two rounds warm up
                seconds[name].append(time.perf_counter() - started)
    return seconds


@torch.no_grad()
def compare(batch_size: int, repeats: int, device: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tiny, small = (plain_vit(heads).to(device, dtype).eval() for heads in (3, 6))
    model = ThinkingViTForImageClassification(ThinkingViTConfig(num_labels=1000)).to(device, dtype).eval()
    count = SINGLE_IMAGES if batch_size == 1 else batch_size
    pixel_values = torch.randn(count, 3, 224, 224, device=device, dtype=dtype)
    threshold = threshold_for_share(model(pixel_values, max_stages=1).entropy, SHARE)
    goes_on = model(pixel_values, threshold=threshold).exit_stage.float().mean().item()

    batches = pixel_values.split(batch_size)
    turn = iter(range(10**9))

    def of_next_batch(call: Callable[[torch.Tensor], object]) -> Callable[[], object]:
        return lambda: call(batches[next(turn) % len(batches)])

    def of_all_batches(call: Callable[[torch.Tensor], object]) -> Callable[[], object]:
        return lambda: [call(batch) for batch in batches]

    fixed = {
        "ViT-Tiny": of_next_batch(tiny),
        "ViT-Tiny + ViT-Small": of_next_batch(lambda batch: (tiny(batch), small(batch))),
        "first stage alone": of_next_batch(lambda batch: model(batch, threshold=10.0)),
        "all stages": of_next_batch(lambda batch: model(batch, threshold=0.0)),
    }
    mixed = {
        "both": of_all_batches(lambda batch: (tiny(batch), small(batch))),
        "mixed": of_all_batches(lambda batch: model(batch, threshold=threshold)),
    }
    seconds = measure(fixed, repeats, device)
    seconds.update(measure(mixed, max(repeats // len(batches), 5), device))
    for name, rival, label in (
        ("first stage alone", "ViT-Tiny", "first stage alone (τ = 10) / ViT-Tiny"),
        ("all stages", "ViT-Tiny + ViT-Small", "all stages (τ = 0) / ViT-Tiny + ViT-Small"),
        ("mixed", "both", f"{goes_on:.0%} go on / ViT-Tiny + ViT-Small"),
    ):
        images = batch_size if rival != "both" else count
        ratios = [ours / theirs for ours, theirs in zip(seconds[name], seconds[rival])]
        ours, theirs = (statistics.median(seconds[key]) / images * 1e3 for key in (name, rival))
        spread = statistics.quantiles(ratios, n=4)
        print(
            f"| {batch_size} | {label} | {ours:.1f} | {theirs:.1f} | {statistics.median(ratios):.3f} "
            f"({spread[0]:.3f} to {spread[2]:.3f}) |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(describe_run(device, arguments.dtype))
    print("| batch | comparison | ms per image | rival's | ratio of times: median (quartiles) |\n|---|---|---|---|---|")
    for batch_size in arguments.batch_size:
        compare(batch_size, arguments.repeats, device, getattr(torch, arguments.dtype))


if __name__ == "__main__":
    main()
