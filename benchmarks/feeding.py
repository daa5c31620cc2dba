"""
How the engine is fed: its own overhead per image, and the share of the time in which the model runs on image files.

    python -m benchmarks.feeding
    python -m benchmarks.feeding --dataset ../shared/data/imagenet-1k-samples --runtime openvino --precision bf16

The overhead is the time of a stream of ready tensors less the time in stages, of a tiny model, per image. With
`--dataset`, a folder of images or what `datasets` reads, at most `--images` of its images are written as JPEG files
into a temporary folder and classified by a ThinkingViT (3, 6 heads, random weights) at a τ at which half of them exit
early.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.inference import spread_entropies, threshold_for_share
from benchmarks.measure import describe_run
from benchmarks.rivals import FAMILIES
from hf_thinkingvit import ThinkingViTConfig, ThinkingViTForImageClassification
from hf_thinkingvit.commands.classify import find_images
from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.inference import AdaptiveEngine, with_runtime
from hf_thinkingvit.models.image_files import read_image


def overhead(batch_size: int, repeats: int) -> float:
    """Microseconds per image in which no stage runs."""
    config = ThinkingViTConfig(
        thinking_stages=[1, 2], hidden_size=16, num_hidden_layers=1, image_size=8, patch_size=8, num_labels=10
    )
    engine = AdaptiveEngine(ThinkingViTForImageClassification(config), batch_size=batch_size)
    images, found = torch.randn(16 * batch_size, 3, 8, 8), []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        count = sum(1 for _ in engine(images))
        found.append(1e6 * (time.perf_counter() - started - engine.stats.seconds) / count)
    return statistics.median(found[1:])


def write_files(dataset: str, images: int, folder: Path) -> list[Path]:
    source, paths = find_images(dataset, None, None), []
    for place in range(min(images, len(source.names))):
        image = source.read(place)
        paths.append(folder / f"{place:05}.jpg")
        read_image(image() if callable(image) else image).save(paths[-1], quality=90)
    return paths


@torch.no_grad()
def profile(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    network = FAMILIES["thinkingvit"].build().to(arguments.device).eval()
    spread_entropies(network)
    processor = evaluation_image_processor(224)
    model = with_runtime(network, arguments.runtime, arguments.precision)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(arguments.dataset, arguments.images, Path(folder))
        first = AdaptiveEngine(model, processor, batch_size=arguments.batch_size, max_stages=1)
        threshold = threshold_for_share(torch.tensor([result.entropy for result in first(paths)]), 0.5)
        print("\n| workers | images/s | the model runs | batches |\n|---|---|---|---|")
        for num_workers in arguments.num_workers:
            engine = AdaptiveEngine(
                model, processor, batch_size=arguments.batch_size, threshold=threshold, num_workers=num_workers
            )
            started = time.perf_counter()
            count = sum(1 for _ in engine(paths))
            seconds = time.perf_counter() - started
            share = engine.stats.seconds / seconds
            print(
                f"| {num_workers} | {count / seconds:.0f} | {share:.0%} of the time | {engine.stats.batches} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="folder of images, or what `datasets` reads")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runtime", choices=["torch", "compiled", "openvino", "onnxruntime"], default="torch")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    print(
        describe_run(torch.device(arguments.device), f"{arguments.runtime} {arguments.precision or ''}".strip()),
        flush=True,
    )
    print(
        f"Overhead at batch size 1024: {overhead(1024, arguments.repeats):.1f} µs per image (goal: at most 10)",
        flush=True,
    )
    if arguments.dataset is not None:
        profile(arguments)


if __name__ == "__main__":
    main()
