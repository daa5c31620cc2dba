"""
Accuracy and cost of a ThinkingViT at every τ, from one pass over the images:

    python examples/sweep_thresholds.py --model examples/checkpoints/thinkingvit-cifar10 --dataset uoft-cs/cifar10

prints a table, and writes `results.json` (which `push_to_hub.py` takes) and plots as PNG and SVG. On several GPUs:
`accelerate launch examples/sweep_thresholds.py ...`. Needs `pip install "hf-thinkingvit[examples]"`.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForImageClassification

from hf_thinkingvit.auto import AutoImageProcessor
from hf_thinkingvit.evaluation import evaluate_thresholds, label_map_argument
from hf_thinkingvit.evaluation.calibration import threshold_grid
from hf_thinkingvit.evaluation.plots import (
    plot_accuracy_against_macs,
    plot_exit_shares,
    plot_score_histogram,
    save_figure,
)


def table(rows: list[dict]) -> str:
    num_stages = len(rows[0]["exit_shares"])
    shares = "".join(f"{f'stage {stage}':>10}" for stage in range(num_stages))
    lines = [f"{'τ':>8}{'top-1 %':>10}{'top-5 %':>10}{'GMACs':>12}{shares}"]
    for row in rows:
        shares = "".join(f"{share:>10.1%}" for share in row["exit_shares"])
        lines.append(f"{row['threshold']:>8.3f}{row['top1']:>10.2f}{row['top5']:>10.2f}{row['gmacs']:>12.5g}{shares}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--dataset", required=True, help="Hub id, folder of images or Parquet files, Parquet file")
    parser.add_argument("--split", help="by default validation, else test; first what is new to the model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"], help="to measure in")
    parser.add_argument("--thresholds", type=float, nargs="+", help="by default 24 over the range of the criterion")
    parser.add_argument(
        "--label-map",
        type=label_map_argument,
        help="JSON file from the dataset's label names to the model's, or \"index\"",
    )
    parser.add_argument("--max-samples", type=int, help="use this many random images; of a stream, the first ones")
    parser.add_argument("--streaming", action="store_true")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/sweep"))
    arguments = parser.parse_args()

    # Accelerate does not find out by itself that several processes run on CPUs.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    model = AutoModelForImageClassification.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    answers, rows = evaluate_thresholds(
        model,
        arguments.dataset,
        AutoImageProcessor.from_pretrained(arguments.model),
        arguments.thresholds or (),
        split=arguments.split,
        label_map=arguments.label_map,
        streaming=arguments.streaming,
        max_samples=arguments.max_samples,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        accelerator=accelerator,
    )
    if not accelerator.is_main_process:
        return
    rows = rows or [answers.row(threshold) for threshold in threshold_grid(answers, steps=23)]
    print(f"{answers.dataset}, split {answers.split}, {len(answers)} images, measured in {arguments.dtype}")
    print(table(rows))
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    fine = [answers.row(threshold) for threshold in threshold_grid(answers, steps=400)]
    figures = {"sweep": plot_accuracy_against_macs(answers, fine), "exit_shares": plot_exit_shares(answers, fine)}
    for stage in range(answers.num_stages - 1):
        figures[f"scores_stage_{stage}"] = plot_score_histogram(answers, stage)
    for name, figure in figures.items():
        save_figure(figure, arguments.output_dir / name)
    results = answers.results([row["threshold"] for row in rows])
    results["plot"] = "sweep.png"
    (arguments.output_dir / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"\nresults and plots: {arguments.output_dir}")


if __name__ == "__main__":
    main()
