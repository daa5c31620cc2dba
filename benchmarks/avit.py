"""
A-ViT's sparse computation against its masked one and a plain DeiT of the same size, in one run:

    python -m benchmarks.avit --size tiny small --batch-size 1 16 64

Pixels in, logits out, 224 × 224, random weights; the models take turns, and the median over the repeats counts. The
plain DeiT is Transformers' `ViTForImageClassification`, which is how DeiT without distillation runs there. The gate's
centre is set in two ways: so that tokens run 7.2 of 12 layers on average (Tiny) or 9.4 (Small), as in the trained
models, and so that no token halts. The goal is a speedup of 0.9 times the ratio of multiply-accumulates, plain over
spent.
"""

import argparse
import statistics

import torch

from benchmarks.measure import describe_run, measure
from benchmarks.rivals import plain_vit
from hf_thinkingvit import AViTConfig, AViTForImageClassification


SIZES = {"tiny": (3, 7.2), "small": (6, 9.4)}


def plain_macs(heads: int, num_tokens: int = 197, layers: int = 12, num_labels: int = 1000) -> int:
    """Multiply-accumulates of a plain ViT of DeiT proportions on one 224 × 224 image."""
    width = 64 * heads
    layer = 12 * width**2 * num_tokens + 2 * width * num_tokens**2
    return layers * layer + (num_tokens - 1) * 768 * width + width * num_labels


@torch.no_grad()
def set_mean_depth(model: AViTForImageClassification, pixel_values: torch.Tensor, target: float | None) -> float:
    """Set the gate's centre for the mean depth `target`, or with `None` so that no token halts. Returns the depth."""
    config = model.config
    if target is None:
        config.gate_center = 1e4
        return model(pixel_values).mean_depth.mean().item()
    low, high = -200.0, 200.0
    for _ in range(24):
        config.gate_center = (low + high) / 2
        depth = model(pixel_values).mean_depth.mean().item()
        low, high = (config.gate_center, high) if depth < target else (low, config.gate_center)
    return depth


@torch.no_grad()
def compare(size: str, batch_sizes: list[int], repeats: int, device: torch.device, dtype: torch.dtype) -> None:
    heads, target = SIZES[size]
    torch.manual_seed(0)
    plain = plain_vit(heads).to(device, dtype).eval()
    model = AViTForImageClassification(AViTConfig(num_attention_heads=heads, num_labels=1000, gate_scale=20.0))
    for parameter in model.avit.embeddings.parameters():  # tokens that differ, so that they halt at different depths
        parameter.normal_(std=0.3)
    model.to(device, dtype).eval()
    for batch_size in batch_sizes:
        pixel_values = torch.randn(batch_size, 3, 224, 224, device=device, dtype=dtype)
        for goal in (target, None):
            depth = set_mean_depth(model, pixel_values, goal)
            spent = model(pixel_values).macs.float().mean().item()
            rivals = {
                "sparse": lambda pixel_values=pixel_values: model(pixel_values),
                "masked": lambda pixel_values=pixel_values: model.avit(pixel_values),
                "plain": lambda pixel_values=pixel_values: plain(pixel_values),
            }
            seconds = measure(rivals, max(repeats // batch_size, 7), device)
            medians = {name: statistics.median(values) * 1e3 / batch_size for name, values in seconds.items()}
            speedup = statistics.median(theirs / ours for ours, theirs in zip(seconds["sparse"], seconds["plain"]))
            print(
                f"| {size} | {batch_size} | {depth:.2f} | {plain_macs(heads) / spent:.2f} | {medians['sparse']:.1f} | "
                f"{medians['masked']:.1f} | {medians['plain']:.1f} | {speedup:.2f} |",
                flush=True,
            )


def print_tables(sizes: list[str], batch_sizes: list[int], repeats: int, device: torch.device, dtype: str) -> None:
    print(describe_run(device, dtype))
    print(
        "| size | batch | mean depth | MACs: plain / spent | sparse, ms per image | masked | plain | plain / sparse |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for size in sizes:
        compare(size, batch_sizes, repeats, device, getattr(torch, dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--repeats", type=int, default=60, help="divided by the batch size, at least 7")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print_tables(arguments.size, arguments.batch_size, arguments.repeats, device, arguments.dtype)


if __name__ == "__main__":
    main()
