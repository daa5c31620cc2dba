"""
Accuracy and cost of a model that prunes tokens, over its keep rate and τ, beside a model without pruning:

    python examples/sweep_keep_rates.py --model outputs/thinkingvit-cifar10-pruned/last \
        --unpruned examples/checkpoints/thinkingvit-cifar10 --dataset uoft-cs/cifar10

prints one table, and writes it as `keep_rates.json` and `keep_rates.csv`. One pass over the images for each rate serves
every τ. Multiply-accumulates are those of matrix products, with the score predictors. Needs
`pip install "hf-thinkingvit[examples]"`.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModelForImageClassification

from hf_thinkingvit.auto import AutoImageProcessor
from hf_thinkingvit.evaluation import evaluate_thresholds


def rows_of(arguments: argparse.Namespace, name: str, folder: str, keep_rates: list[float | None]) -> list[dict]:
    """One row per keep rate (None for a model without pruning) and τ."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=getattr(torch, arguments.dtype))
    if not getattr(model.config, "pruning_layers", None) and keep_rates != [None]:
        raise SystemExit(f"error: {folder} prunes no tokens: give it as --unpruned")
    processor, rows = AutoImageProcessor.from_pretrained(folder), []
    for keep_rate in keep_rates:
        if keep_rate is not None:  # counted by the configuration as well
            model.config.pruning_keep_rate = keep_rate
            model.config.validate()
        answers, found = evaluate_thresholds(
            model,
            arguments.dataset,
            processor,
            arguments.thresholds if model.config.num_stages > 1 else [0.0],
            split=arguments.split,
            max_samples=arguments.max_samples,
            batch_size=arguments.batch_size,
            accelerator=accelerator,
        )
        rows.extend(row_of(name, keep_rate, row, answers.split, len(answers)) for row in found)
    return rows


def row_of(name: str, keep_rate: float | None, row: dict[str, Any], split: str, num_images: int) -> dict[str, Any]:
    return {
        "model": name,
        "keep_rate": keep_rate,
        "threshold": row["threshold"],
        "top1": row["top1"],
        "gmacs": row["gmacs"],
        "last_stage_share": row["exit_shares"][-1],
        "split": split,
        "images": num_images,
    }


def table(rows: list[dict]) -> str:
    lines = ["| model | keep rate | τ | top-1 (%) | GMACs | reach the last stage |", "|---|---|---|---|---|---|"]
    for row in rows:
        rate = "-" if row["keep_rate"] is None else f"{row['keep_rate']:g}"
        lines.append(
            f"| {row['model']} | {rate} | {row['threshold']:g} | {row['top1']:.2f} | {row['gmacs']:.4g} | "
            f"{row['last_stage_share']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a model that prunes tokens")
    parser.add_argument("--unpruned", help="folder or Hub id of a model to set beside it, with the same exit criterion")
    parser.add_argument("--dataset", required=True, help="Hub id, folder of images or Parquet files, Parquet file")
    parser.add_argument("--split", help="by default validation, else test; first what is new to the model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"], help="to measure in")
    parser.add_argument("--keep-rates", type=float, nargs="+", default=[1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.0, 0.4, 0.8, 1.2, 1.6])
    parser.add_argument("--max-samples", type=int, help="use this many random images")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/keep-rates"))
    arguments = parser.parse_args()

    rows = rows_of(arguments, "unpruned", arguments.unpruned, [None]) if arguments.unpruned else []
    rows += rows_of(arguments, "pruned", arguments.model, arguments.keep_rates)
    print(table(rows))
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "keep_rates.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    with (arguments.output_dir / "keep_rates.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"\ntable: {arguments.output_dir}")


if __name__ == "__main__":
    main()
