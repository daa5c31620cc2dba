"""What commands that measure a model at any τ share: options of images and masks, and the pass over them."""

import argparse
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..evaluation import evaluate_segmentation_thresholds, evaluate_thresholds
from ..evaluation.segmentation import StageConfusions
from ..evaluation.sweep import StageAnswers
from ..families import task_of
from ..families.record import IMAGE_SEGMENTATION
from ..image_sizes import recorded_sides
from ..masks import read_mask_values


# Columns of a table of τ: what a row calls it, its title, its format, and its factor.
COLUMNS = (
    ("top1", "top-1 %", "10.2f", 1.0),
    ("top5", "top-5 %", "10.2f", 1.0),
    ("mean_iou", "mIoU %", "10.2f", 100.0),
    ("overall_accuracy", "pixels %", "10.2f", 100.0),
    ("gmacs", "GMACs", "12.5g", 1.0),
    ("gmacs_per_window", "a window", "12.5g", 1.0),
)


def sides_of(arguments: argparse.Namespace, config: PreTrainedConfig) -> tuple[int | None, int | None]:
    """The `short_side` and `long_side` that the options of `add_sides` ask for; `ValueError` if they cannot be."""
    if arguments.short_side is None:
        if arguments.long_side is not None:
            raise ValueError("`long_side` limits what `short_side` asks for: give both.")
        return recorded_sides(config)
    if arguments.short_side < 0:
        raise ValueError(f"`short_side` must be at least 0, got {arguments.short_side}.")
    return (arguments.short_side, arguments.long_side) if arguments.short_side else (None, None)


def size_words(short_side: int | None, long_side: int | None) -> str:
    """The sides as options of a command."""
    return f"--short-side {short_side or 0}" + (f" --long-side {long_side}" if short_side and long_side else "")


def segments(model: PreTrainedModel) -> bool:
    return task_of(model) == IMAGE_SEGMENTATION


def batch_size_of(arguments: argparse.Namespace, model: PreTrainedModel) -> int:
    return arguments.batch_size or (16 if segments(model) else 64)


def evaluate(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    arguments: argparse.Namespace,
    thresholds: Sequence[float] = (),
    accelerator: Accelerator | None = None,
    streaming: bool = False,
) -> tuple[StageAnswers | StageConfusions, list[dict[str, Any]]]:
    """One pass by the options of `add_evaluation`: the stages' answers, and a row for each of `thresholds`."""
    options: dict[str, Any] = {"label_map": arguments.label_map, "streaming": streaming}
    function = evaluate_thresholds
    if segments(model):
        if arguments.label_map is not None or streaming:
            raise ValueError("`label_map` and `streaming` are not for a segmentation model.")
        function = evaluate_segmentation_thresholds
        short_side, long_side = sides_of(arguments, model.config)
        options = {
            "mask_values": read_mask_values(arguments.mask_values),
            "ignored_mask_values": read_mask_values(arguments.ignored_mask_values),
            "short_side": short_side,
            "long_side": long_side,
        }
    return function(
        model,
        arguments.dataset,
        processor,
        thresholds,
        split=arguments.split,
        max_samples=arguments.max_samples,
        batch_size=batch_size_of(arguments, model),
        num_workers=arguments.num_workers,
        accelerator=accelerator,
        **options,
    )


def measure_of(row: dict[str, Any]) -> tuple[str, str, float]:
    """What a row of a sweep measures first: its name, in words, and its value in per cent."""
    return ("top1", "top-1", row["top1"]) if "top1" in row else ("mean_iou", "mean IoU", 100 * row["mean_iou"])
