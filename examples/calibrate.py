"""
Choose τ for a limit on the loss of accuracy, or for a budget of compute:

    python examples/calibrate.py --model MODEL --dataset uoft-cs/cifar10 --max-drop 0.01 --delta 0.05
    python examples/calibrate.py --model MODEL --dataset uoft-cs/cifar10 --gmacs 0.03

A share of the images (`--check`) is held out from the calibration; accuracy and cost at τ are printed for both parts.
`--output-dir` gets the model with the new τ, in the dtype in which it was measured, and `calibration.json`.

A classifier loses an image that the last stage gets right and its exit wrong; a segmentation model loses shares of an
image's pixels so.

The limit on accuracy is statistical: it holds only with images that were used neither to train the model nor to select
its best epoch.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSemanticSegmentation

from hf_thinkingvit.auto import AutoImageProcessor, auto_class_of
from hf_thinkingvit.evaluation import (
    calibrate_budget,
    calibrate_risk,
    evaluate_segmentation_thresholds,
    evaluate_thresholds,
    label_map_argument,
    measure_stage_milliseconds,
)
from hf_thinkingvit.masks import read_mask_values
from hf_thinkingvit.models.configuration_checks import as_pair


def accuracy(row: dict) -> str:
    """Top-1 of a classifier, mean IoU of a segmentation model."""
    return f"top-1 {row['top1']:.2f} %" if "top1" in row else f"mean IoU {100 * row['mean_iou']:.2f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--dataset", required=True, help="Hub id, folder of images or Parquet files, Parquet file")
    parser.add_argument("--split", help="by default validation, else test; first what is new to the model")
    parser.add_argument(
        "--label-map",
        type=label_map_argument,
        help="JSON file from the dataset's label names to the model's, or \"index\"",
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"], help="to measure in")
    parser.add_argument("--allow-training-images", action="store_true", help="also on those that chose the epoch")
    parser.add_argument("--mask-values", nargs="+", default=[], help="of segmentation, each class's, such as 1-150")
    parser.add_argument("--ignored-mask-values", nargs="+", default=["255"], help="of pixels that do not count")
    parser.add_argument("--short-side", type=int, help="of segmentation: pixels of the shorter side; else as they are")
    parser.add_argument("--long-side", type=int, help="of segmentation: the most pixels of the longer side")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--max-drop", type=float, help="greatest share of answers that only the last stage gets right")
    goal.add_argument("--max-error", type=float, help="greatest share of wrong answers, a fraction")
    goal.add_argument("--gmacs", type=float, help="mean multiply-accumulates per image, in 10^9")
    goal.add_argument("--milliseconds", type=float, help="mean time per image, on this device in this batch size")
    parser.add_argument("--delta", type=float, default=0.05, help="probability that the limit on accuracy is exceeded")
    parser.add_argument("--per-exit", action="store_true", help="one τ per exit")
    parser.add_argument("--check", type=float, default=0.5, help="share of the images to check on")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these images")
    parser.add_argument("--max-samples", type=int, help="use this many random images")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/calibrated"))
    arguments = parser.parse_args()
    if not 0 <= arguments.check < 1:
        parser.error("--check must be at least 0 and below 1")

    auto_class = auto_class_of(AutoConfig.from_pretrained(arguments.model))
    model = auto_class.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    processor = AutoImageProcessor.from_pretrained(arguments.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if auto_class is AutoModelForSemanticSegmentation:
        evaluate = evaluate_segmentation_thresholds
        options = {
            "mask_values": read_mask_values(arguments.mask_values),
            "ignored_mask_values": read_mask_values(arguments.ignored_mask_values),
            "short_side": arguments.short_side,
            "long_side": arguments.long_side,
        }
    else:
        evaluate, options = evaluate_thresholds, {"label_map": arguments.label_map}
    answers, _ = evaluate(
        model.to(device),
        arguments.dataset,
        processor,
        split=arguments.split,
        **options,
        max_samples=arguments.max_samples,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
    )
    order = torch.randperm(len(answers), generator=torch.Generator().manual_seed(arguments.seed))
    held_out = round(arguments.check * len(answers))
    check, calibration = answers.select(order[:held_out]), answers.select(order[held_out:])
    if arguments.gmacs is not None:
        found = calibrate_budget(calibration, gmacs=arguments.gmacs, per_exit=arguments.per_exit)
    elif arguments.milliseconds is not None:
        batch = torch.randn(arguments.batch_size, model.config.num_channels, *as_pair(model.config.image_size))
        times = measure_stage_milliseconds(model, batch.to(device, model.dtype))
        found = calibrate_budget(
            calibration, milliseconds=arguments.milliseconds, stage_milliseconds=times, per_exit=arguments.per_exit
        )
    else:
        risk = answers.risks[0 if arguments.max_error is None else 1]
        epsilon = arguments.max_drop if arguments.max_error is None else arguments.max_error
        found = calibrate_risk(
            calibration,
            epsilon,
            arguments.delta,
            risk,
            arguments.per_exit,
            allow_training_images=arguments.allow_training_images,
        )
    print(f"{answers.dataset}, split {answers.split}, measured in {arguments.dtype}")
    print(f"τ = {found.threshold}\n{found.statement}")
    facts = found.to_dict()
    for name, part in (("calibration", calibration), ("check", check)):
        if len(part):
            row = part.row(found.threshold)
            last = part.stage_rows()[-1]
            measure = "top1" if "top1" in row else "mean_iou"
            facts[f"{name}_images"] = {"images": len(part), f"last_stage_{measure}": last[measure], **row}
            print(
                f"{name:>12}: {len(part)} images, {accuracy(row)} (last stage {accuracy(last)}), "
                f"{row['gmacs']:.4g} GMACs (last stage {last['gmacs']:.4g})"
            )
    found.apply(model)
    model.save_pretrained(arguments.output_dir)
    processor.save_pretrained(arguments.output_dir)
    (arguments.output_dir / "calibration.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    print(f"model: {arguments.output_dir}")


if __name__ == "__main__":
    main()
