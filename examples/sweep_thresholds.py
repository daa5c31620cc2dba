"""
Accuracy and cost of a ThinkingViT at every τ, from one pass over the images:

    python examples/sweep_thresholds.py --model examples/checkpoints/thinkingvit-cifar10 --dataset uoft-cs/cifar10

prints a table, and writes `results.json` (which `push_to_hub.py` takes) and plots as PNG and SVG. On several GPUs:
`accelerate launch examples/sweep_thresholds.py ...`. Of a segmentation model, mean IoU, over windows of the model's
size; `gmacs` are per image, of all of its windows. Needs `pip install "hf-thinkingvit[examples]"`.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForSemanticSegmentation

from hf_thinkingvit.auto import AutoImageProcessor, auto_class_of
from hf_thinkingvit.evaluation import evaluate_segmentation_thresholds, evaluate_thresholds, label_map_argument
from hf_thinkingvit.evaluation.calibration import threshold_grid
from hf_thinkingvit.evaluation.plots import (
    plot_accuracy_against_macs,
    plot_exit_shares,
    plot_score_histogram,
    save_figure,
)
from hf_thinkingvit.masks import read_mask_values


COLUMNS = {"top1": ("top-1 %", 1), "top5": ("top-5 %", 1), "mean_iou": ("mIoU %", 100)}
COLUMNS |= {"overall_accuracy": ("pixels %", 100), "gmacs": ("GMACs", None), "gmacs_per_window": ("a window", None)}


def table(rows: list[dict]) -> str:
    num_stages = len(rows[0]["exit_shares"])
    shares = "".join(f"{f'stage {stage}':>10}" for stage in range(num_stages))
    names = [name for name in COLUMNS if name in rows[0]]
    lines = [f"{'τ':>8}{''.join(f'{COLUMNS[name][0]:>12}' for name in names)}{shares}"]
    for row in rows:
        shares = "".join(f"{share:>10.1%}" for share in row["exit_shares"])
        cells = "".join(
            f"{row[name]:>12.5g}" if COLUMNS[name][1] is None else f"{COLUMNS[name][1] * row[name]:>12.2f}"
            for name in names
        )
        lines.append(f"{row['threshold']:>8.3f}{cells}{shares}")
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
    parser.add_argument("--mask-values", nargs="+", default=[], help="of segmentation, each class's, such as 1-150")
    parser.add_argument("--ignored-mask-values", nargs="+", default=["255"], help="of pixels that do not count")
    parser.add_argument("--short-side", type=int, help="of segmentation: pixels of the shorter side; else as they are")
    parser.add_argument("--long-side", type=int, help="of segmentation: the most pixels of the longer side")
    parser.add_argument("--max-samples", type=int, help="use this many random images; of a stream, the first ones")
    parser.add_argument("--streaming", action="store_true")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/sweep"))
    arguments = parser.parse_args()

    # Accelerate does not find out by itself that several processes run on CPUs.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    auto_class = auto_class_of(AutoConfig.from_pretrained(arguments.model))
    model = auto_class.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    if auto_class is AutoModelForSemanticSegmentation:
        evaluate = evaluate_segmentation_thresholds
        options = {
            "mask_values": read_mask_values(arguments.mask_values),
            "ignored_mask_values": read_mask_values(arguments.ignored_mask_values),
            "short_side": arguments.short_side,
            "long_side": arguments.long_side,
        }
    else:
        evaluate, options = evaluate_thresholds, {"label_map": arguments.label_map, "streaming": arguments.streaming}
    answers, rows = evaluate(
        model,
        arguments.dataset,
        AutoImageProcessor.from_pretrained(arguments.model),
        arguments.thresholds or (),
        split=arguments.split,
        **options,
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
    for stage in range(answers.num_stages - 1 if hasattr(answers, "top1") else 0):  # of right and of wrong answers
        figures[f"scores_stage_{stage}"] = plot_score_histogram(answers, stage)
    for name, figure in figures.items():
        save_figure(figure, arguments.output_dir / name)
    results = answers.results([row["threshold"] for row in rows])
    results["plot"] = "sweep.png"
    (arguments.output_dir / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"\nresults and plots: {arguments.output_dir}")


if __name__ == "__main__":
    main()
