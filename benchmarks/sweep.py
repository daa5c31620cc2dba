"""
One pass that evaluates 50 thresholds, against one run at τ = 0, and against 50 runs with one threshold each:

    python -m benchmarks.sweep --model examples/checkpoints/thinkingvit-cifar10 --dataset uoft-cs/cifar10

Every run decodes and preprocesses the images. The first two take turns, and the median over the repeats counts; the 50
runs are timed once.
"""

import argparse
import statistics
import time

import torch
from transformers import AutoModelForImageClassification

from benchmarks.measure import describe_run, measure
from hf_thinkingvit.auto import AutoImageProcessor
from hf_thinkingvit.data import as_image_split, evaluation_batches, find_split, load_splits
from hf_thinkingvit.evaluation import evaluate_thresholds
from hf_thinkingvit.evaluation.calibration import threshold_grid


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    model = AutoModelForImageClassification.from_pretrained(arguments.model, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(arguments.model)
    rows = find_split(load_splits(arguments.dataset), None, arguments.dataset, ("validation", "test"))
    rows = rows.take(arguments.images)

    def single_run(threshold: float) -> int:
        batches = evaluation_batches(as_image_split(rows, arguments.dataset), processor, arguments.batch_size)
        return sum(
            int((model(batch["pixel_values"], threshold=threshold).logits.argmax(-1) == batch["labels"]).sum())
            for batch in batches
        )

    answers, _ = evaluate_thresholds(model, rows, processor, batch_size=arguments.batch_size, progress=False)
    thresholds = threshold_grid(answers, steps=48)[:50]

    def sweep() -> None:
        evaluate_thresholds(model, rows, processor, thresholds, batch_size=arguments.batch_size, progress=False)

    seconds = measure({"sweep": sweep, "full": lambda: single_run(0.0)}, arguments.repeats, model.device)
    ratio = statistics.median(one / other for one, other in zip(seconds["sweep"], seconds["full"]))
    started = time.perf_counter()
    hits = [single_run(threshold) for threshold in thresholds]
    all_runs = time.perf_counter() - started
    assert hits == [round(answers.row(threshold)["top1"] / 100 * len(rows)) for threshold in thresholds]
    print(describe_run(model.device, "float32"))
    one_pass, full = (statistics.median(seconds[name]) for name in ("sweep", "full"))
    print(f"{len(rows)} images: {len(thresholds)} thresholds in one pass {one_pass:.1f} s, one full run {full:.1f} s")
    print(f"ratio {ratio:.2f}; {len(thresholds)} single runs {all_runs:.1f} s, with the same right answers at each")


if __name__ == "__main__":
    main()
