"""
Segmentation: what the stages and the exit criteria cost at 512 × 512 pixels and 150 classes, in one process, in turns:

    python -m benchmarks.segmentation --threads 1 --repeats 7
    python -m benchmarks.segmentation --decisions MODEL --images images.parquet --window 128

The first compares ThinkingViT 3 → 6 with a linear decoder, random weights, with a plain model of one stage of each
size and with Transformers' Segformer-B0, pixels in, logits at each model's own grid out; and the criteria with stage 1:
`mean_pixel_entropy` in the official form (whole map of probabilities) and in ours, and `mean_grid_entropy`. It also
prints the largest tensor that each criterion makes. The second runs a trained model on windows of real images, and
counts at which share of them the two criteria decide differently, with each criterion's τ set so that the same share of
windows leaves at stage 1.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from datasets import Image, load_dataset
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from benchmarks.measure import describe_run, measure, median_and_quartiles
from hf_thinkingvit import ThinkingViTConfig, ThinkingViTForSemanticSegmentation
from hf_thinkingvit.models.exit_scores import mean_grid_entropy, mean_pixel_entropy


SIDE, NUM_LABELS = 512, 150


def segmenter(stages: list[int]) -> ThinkingViTForSemanticSegmentation:
    config = ThinkingViTConfig(
        thinking_stages=stages,
        decoder_type="linear",
        num_labels=NUM_LABELS,
        image_size=SIDE,
        exit_criterion="mean_grid_entropy",  # next to free, so that the rows of the stages are those of the model
        threshold=0.0,
    )
    return ThinkingViTForSemanticSegmentation(config).eval()


def official_entropy(logits: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """Mean entropy over pixels from the whole map of probabilities."""
    size = [count * side for count, side in zip(logits.shape[2:], patch_size)]
    probabilities = F.interpolate(logits, size=size, mode="bilinear", align_corners=False).softmax(dim=1)
    return -(probabilities * probabilities.clamp(min=1e-8).log()).sum(dim=1).mean(dim=(1, 2))


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that any operation returns."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        sizes = [leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.nbytes = max(self.nbytes, *sizes, 0)
        return output


@torch.no_grad()
def compare_times(batch_size: int, repeats: int, device: torch.device) -> None:
    torch.manual_seed(0)
    model, tiny, small = (segmenter(stages).to(device) for stages in ([3, 6], [3], [6]))
    segformer = SegformerForSemanticSegmentation(SegformerConfig(num_labels=NUM_LABELS)).to(device).eval()
    pixel_values = torch.randn(batch_size, 3, SIDE, SIDE, device=device)
    logits = torch.randn(batch_size, NUM_LABELS, SIDE // 16, SIDE // 16, device=device)
    criteria: dict[str, Callable[[], torch.Tensor]] = {
        "mean_pixel_entropy, official form": lambda: official_entropy(logits, (16, 16)),
        "mean_pixel_entropy": lambda: mean_pixel_entropy(logits, (16, 16)),
        "mean_grid_entropy": lambda: mean_grid_entropy(logits),
    }
    rivals = {
        "stage 1": lambda: model(pixel_values, max_stages=1),
        "both stages": lambda: model(pixel_values),
        "plain, 3 heads": lambda: tiny(pixel_values),
        "plain, 6 heads": lambda: small(pixel_values),
        "Segformer-B0": lambda: segformer(pixel_values),
        **criteria,
    }
    torch.testing.assert_close(criteria["mean_pixel_entropy"](), official_entropy(logits, (16, 16)))
    seconds = measure(rivals, repeats, device)
    print(
        "| | ms per image | time: stage 1 = 1 | time: Segformer-B0 = 1 | largest tensor, MiB |\n|---|---|---|---|---|"
    )
    for name, values in seconds.items():
        first, other = (
            median_and_quartiles([value / rival for value, rival in zip(values, seconds[key])])
            for key in ("stage 1", "Segformer-B0")
        )
        largest = ""
        if name in criteria:
            with LargestTensor() as mode:
                criteria[name]()
            largest = f"{mode.nbytes / 2**20:.1f}"
        print(f"| {name} | {statistics.median(values) / batch_size * 1e3:.1f} | {first} | {other} | {largest} |")


def windows(images: Path, processor, window: int) -> Iterator[torch.Tensor]:
    """Windows of the images of a Parquet file, without overlap."""
    for row in load_dataset("parquet", data_files=str(images), split="train").cast_column("image", Image(mode="RGB")):
        pixel_values = processor(row["image"], do_resize=False, return_tensors="pt")["pixel_values"][0]
        for rows in pixel_values.split(window, dim=1):
            yield from (part for part in rows.split(window, dim=2) if part.shape[1:] == (window, window))


@torch.no_grad()
def compare_decisions(path: str, images: Path, window: int, limit: int) -> None:
    model = AutoModelForSemanticSegmentation.from_pretrained(path).eval()
    patch_size = (model.config.patch_size,) * 2 if isinstance(model.config.patch_size, int) else model.config.patch_size
    pixel, grid = [], []
    for number, part in enumerate(windows(images, AutoImageProcessor.from_pretrained(path), window)):
        if number == limit:
            break
        logits = model(part[None], max_stages=1).logits
        pixel.append(mean_pixel_entropy(logits, tuple(patch_size)))
        grid.append(mean_grid_entropy(logits))
    pixel, grid = torch.cat(pixel), torch.cat(grid)
    print(f"{len(pixel)} windows; entropy over pixels {pixel.mean():.3f}, over patches {grid.mean():.3f} on average")
    print(
        "| leave at stage 1 | decided differently, each with its own τ | with the pixels' τ for both |\n|---|---|---|"
    )
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        count = round(len(pixel) * share)
        exits, same_share = (values < values.sort().values[count] for values in (pixel, grid))
        same_tau = grid < pixel.sort().values[count]
        print(f"| {share:.0%} | {(exits ^ same_share).float().mean():.1%} | {(exits ^ same_tau).float().mean():.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--decisions", metavar="MODEL", help="folder or Hub id of a trained model")
    parser.add_argument("--images", type=Path, help="Parquet file with a column `image`")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--limit", type=int, default=2000, help="windows")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(describe_run(device, "float32"))
    if arguments.decisions is not None:
        compare_decisions(arguments.decisions, arguments.images, arguments.window, arguments.limit)
    else:
        compare_times(arguments.batch_size, arguments.repeats, device)


if __name__ == "__main__":
    main()
