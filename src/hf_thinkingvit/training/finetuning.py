"""
Fine-tuning in one call: from a folder of images and a source to a calibrated adaptive model in a folder.

    from hf_thinkingvit.training import finetune

    done = finetune("photos", "examples/checkpoints/thinkingvit-cifar10", "outputs/photos")
    print(done.summary)

It is a training run as of `train`, with settings that follow from the number of images instead of a paper's.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..accelerate_state import released_afterwards
from ..data import ImageSplit, Rows, evaluation_batches, load_splits, num_shared_rows, without_unreadable
from ..evaluation.accuracy import evaluate_accuracy, main_measure
from ..evaluation.calibration import Calibration, calibrate_accuracy, calibrate_risk, least_images
from ..evaluation.labels import LabelMap
from ..evaluation.splits import ALL, why_not_new
from ..evaluation.sweep import StageAnswers, collect_stage_answers
from ..evaluation.threshold_points import distinct_thresholds
from ..files import replace_file
from ..hub import accuracy_results, model_card
from ..models.configuration_staged import thinks_in_stages
from ..public_names import public_name
from .adapters import adapter_facts
from .config import TrainingConfig
from .data import load_data
from .finetuning_plan import find_source, settings_for
from .held_out_record import check_record, write_record
from .loop import TrainingRun
from .photographs import with_smaller_photographs
from .splits import TrainingData, hold_out, one_half, other_half
from .starting_point import source_labels
from .summary import finetuning_summary, start_summary


RUN = "training"  # the folder of the training run within the output folder
RESERVED = ("task", "dataset", "output_dir", "from_pretrained", "from_vit", "streaming", "validation_fraction")


@dataclass(frozen=True)
class FineTuned:
    """
    What a fine-tuning run has made; everything is in `folder` as well.

    Attributes:
        model (`PreTrainedModel`): the last of the run, or an earlier one that is clearly better, with the calibrated τ,
            in evaluation mode.
        processor (`BaseImageProcessor`): its image processor.
        folder (`Path`): the folder that `from_pretrained` and `pipeline` load.
        results (`dict`): what was measured, as in `results.json`.
        calibration (`Calibration`, *optional*): of τ; `None` for a model that does not think in stages.
        summary (`str`): the same in words.
    """

    model: PreTrainedModel
    processor: BaseImageProcessor
    folder: Path
    results: dict[str, Any]
    calibration: Calibration | None
    summary: str


@released_afterwards()
def finetune(
    dataset: str | os.PathLike | datasets.Dataset | Mapping[str, datasets.Dataset],
    source: str | os.PathLike,
    output_dir: str | os.PathLike = "outputs/finetuned",
    *,
    held_out: float = 0.2,
    max_drop: float = 0.02,
    delta: float = 0.1,
    **overrides: Any,
) -> FineTuned:
    """
    Fine-tune a model for the labels of a few dozen to some ten thousand images, and calibrate its τ.

    Images are held out of the training images (or taken of the validation split, if there is one), the same share of
    each label and the same ones in every run. One half of them chooses the epoch: the last, unless an earlier one is
    better by more than the standard error. The other half, which has no part in making the model, measures its stages
    and calibrates τ: with a promise (see [`~hf_thinkingvit.evaluation.calibrate_risk`]) if there are enough of them,
    else as the cheapest τ that loses no accuracy on all held-out images, without a promise.

    Args:
        dataset (`str`, `os.PathLike`, `datasets.Dataset` or a mapping of splits): folder of images (one folder a
            label), Hub id, Parquet file; or images and labels as `datasets` holds them.
        source (`str` or `os.PathLike`): folder or Hub id of a plain ViT, DeiT or Swin, of an official checkpoint, or of
            a model of this package.
        output_dir (`str` or `os.PathLike`): gets the model with image processor and card, `results.json`,
            `calibration.json`, `splits.json` (which images were held out), and the training run in `training`.
        held_out (`float`): share of the training images to hold out where there is no validation split.
        max_drop (`float`): the greatest share of images that may be right at the last stage and wrong where they exit.
        delta (`float`): the greatest probability with which that may fail.
        overrides: fields of [`TrainingConfig`], instead of those that follow from the number of images (`epochs`,
            `batch_size`, `learning_rate`, `seed`, `horizontal_flip`, `mixed_precision`, `resume`, ...).

    Returns:
        [`FineTuned`].

    Raises:
        FileNotFoundError, ValueError: if data or source cannot be found or used, or an override does not exist; before
            anything is trained.
    """
    _check_overrides(overrides)
    for name, value in (("held_out", held_out), ("max_drop", max_drop), ("delta", delta)):
        if not 0 < value < 1:
            raise ValueError(f"`{name}` must be above 0 and below 1, got {value!r}.")
    output_dir = Path(output_dir)
    start = find_source(source, output_dir / RUN / "source", overrides.get("model_type"))
    start["model"] = {**start.get("model", {}), **overrides.pop("model", {})}
    splits, name = _splits(dataset)
    config = TrainingConfig(
        **{**start, "dataset": name, "output_dir": str(output_dir / RUN), "validation_fraction": held_out, **overrides}
    )
    for split in filter(None, (config.eval_split, config.test_split)):
        if shared := num_shared_rows(splits, config.train_split, split):
            raise ValueError(
                f"{shared} images are both in {split!r} and in {config.train_split!r}, which is trained on: choose "
                "other splits, or leave `eval_split` out, and images are held out."
            )
    # Before anything is trained: an evaluation ends at an image that it cannot read.
    data, unreadable = _without_unreadable(load_data(config, splits))
    data, calibration_images = _divide(data)
    check_record(config, data, calibration_images, output_dir)
    num_images = len(data.train.rows)
    known = len(source_labels(config, data.id2label)) / len(data.id2label)
    settings = settings_for(num_images, config.model_type, config.from_vit is not None, overrides, known)
    config = replace(config, **settings)
    run = TrainingRun(config, data)
    run.accelerator.print(start_summary(run, output_dir, calibration_images, unreadable))
    if run.accelerator.is_main_process:  # before anything is trained, for a run that goes on to compare
        output_dir.mkdir(parents=True, exist_ok=True)
        write_record(run.config, run.data, calibration_images, output_dir)
    run.data = replace(run.data, train=with_smaller_photographs(run.data.train, run.model_config.image_size))
    run.run()
    try:
        return _finish(run, calibration_images, unreadable, output_dir, max_drop, delta)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{error} What was trained is not lost: it is in {run.output_dir}, and the same call with `resume='auto'` "
            "goes on with its evaluation."
        ) from error


def _check_overrides(overrides: Mapping[str, Any]) -> None:
    known = {entry.name for entry in fields(TrainingConfig)} - set(RESERVED)
    for name in overrides:
        if name not in known:
            raise ValueError(f"`finetune` has no argument `{name}`, and it is no field of a training run to override.")


def _splits(dataset: Any) -> tuple[Mapping[str, Rows], str]:
    """The splits of a dataset in any form, and its name."""
    if isinstance(dataset, (str, os.PathLike)):
        return load_splits(os.fspath(dataset)), os.fspath(dataset)
    splits = dataset if isinstance(dataset, Mapping) else {"train": dataset}
    if not all(isinstance(rows, datasets.Dataset) for rows in splits.values()):
        raise ValueError(f"`dataset` must be a path, a Hub id, or `datasets.Dataset`s, got a {type(dataset).__name__}.")
    first = next(iter(splits.values()))
    return splits, first.info.dataset_name or "dataset"


def _without_unreadable(data: TrainingData) -> tuple[TrainingData, list[str]]:
    """The data without images to evaluate on that cannot be decoded, and the names of those; training skips its own."""
    evaluation, unreadable = without_unreadable(data.evaluation)
    test, others = (None, []) if data.test is None else without_unreadable(data.test)
    return replace(data, evaluation=evaluation, test=test), [*unreadable, *others]


def _divide(data: TrainingData) -> tuple[TrainingData, ImageSplit]:
    """The data with half of their evaluation images to choose the best epoch by, and the other half."""
    count = len(data.evaluation.rows)
    if count < 4:
        raise ValueError(
            f"There are {count} images to choose the best epoch by and to calibrate on: it takes 4 at the least, and "
            "some of each label to be of use. Add images, or hold more of them out (`held_out`)."
        )
    calibration, validation = hold_out(data.evaluation, 0.5)
    selected_on = one_half(data.selected_on)
    split = other_half(selected_on) if data.test is None else data.split
    return replace(data, evaluation=validation, selected_on=selected_on, split=split), calibration


def _finish(
    run: TrainingRun,
    calibration_images: ImageSplit,
    unreadable: list[str],
    output_dir: Path,
    max_drop: float,
    delta: float,
) -> FineTuned:
    """Measure and calibrate the model of a finished run, and save it with all reports."""
    accelerator, data = run.accelerator, run.data
    chosen = choose_model(run)
    model = AutoModelForImageClassification.from_pretrained(run.output_dir / chosen, dtype=torch.float32).eval()
    model.to(accelerator.device)
    name, calibrated_on = public_name(run.config.dataset), other_half(data.selected_on)
    split, images = (calibrated_on, calibration_images) if data.test is None else (data.split, data.test)
    calibration, remark = None, None
    if thinks_in_stages(model):
        measured = _answers(run, model, images, split)
        calibrating = measured if data.test is None else _answers(run, model, calibration_images, calibrated_on)
        calibrating = replace(calibrating, seen=_seen_by_source(run.config))
        choosing = _answers(run, model, data.evaluation, data.selected_on)
        calibration, remark = _calibrate(calibrating, choosing, max_drop, delta)
        calibration.apply(model)
        results = measured.results(distinct_thresholds(measured, including=calibration.threshold))
        results |= {"at_threshold": measured.row(calibration.threshold), "calibration": calibration.to_dict()}
    else:
        found = evaluate_accuracy(accelerator, {"model": model}, accelerator.prepare(_batches(run, images)))["model"]
        results = accuracy_results(model, found, name, split=split)
    results |= {"selected_on": data.selected_on, "training": _training_facts(run, chosen, unreadable)}
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(output_dir)
        run.processor.save_pretrained(output_dir)
        license = run.config.model_license
        title = f"{run.config.model_type}-{name.rpartition('/')[2]}"
        model_card(model, results, name=title, license=license, datasets=name).save(output_dir / "README.md")
        replace_file(output_dir / "results.json", json.dumps(results, indent=1))
        if calibration is not None:
            replace_file(output_dir / "calibration.json", json.dumps(calibration.to_dict(), indent=1))
    accelerator.wait_for_everyone()
    summary = finetuning_summary(run, chosen, results, calibration, remark, output_dir)
    return FineTuned(model, run.processor, output_dir, results, calibration, summary)


def choose_model(run: TrainingRun) -> str:
    """
    `"last"` or `"best"`: the folder of the model to take. The learning rate has come to its end in the last one, so an
    earlier one must be better by more than the standard error of a difference of accuracies, which is large on few
    images.
    """
    entries = {entry["step"]: entry["results"][entry["chosen"]] for entry in run.history}
    last, best = entries[run.history[-1]["step"]], entries.get(run.progress.best_step)
    if best is None or not (run.output_dir / "best").is_dir():
        return "last"
    images = best["images"]
    top1 = main_measure(best, "top1")
    share = (top1 / 100 * images + 1) / (images + 2)  # Laplace's, or the error would be 0 at 100 %
    error = 100 * math.sqrt(2 * share * (1 - share) / images)
    return "best" if top1 > main_measure(last, "top1") + error else "last"


def _batches(run: TrainingRun, images: ImageSplit) -> Any:
    return evaluation_batches(images, run.processor, run.config.eval_batch_size, run.config.num_workers)


def _answers(run: TrainingRun, model: PreTrainedModel, images: ImageSplit, split: str) -> StageAnswers:
    labels = LabelMap(model.config, images.label_names, name=images.name)
    batches = run.accelerator.prepare(_batches(run, images))
    return collect_stage_answers(model, batches, labels, run.accelerator, progress=False, split=split)


def _calibrate(
    calibrating: StageAnswers, choosing: StageAnswers, max_drop: float, delta: float
) -> tuple[Calibration, str | None]:
    """τ with a promise; or, if there are too few images for one, without, and a remark that says so."""
    least = least_images(max_drop, delta)
    if len(calibrating) >= least and calibrating.seen is None:
        return calibrate_risk(calibrating, max_drop, delta), None
    both = replace(
        calibrating,
        **{
            name: torch.cat([getattr(calibrating, name), getattr(choosing, name)])
            for name in ("scores", "top1", "top5")
        },
        split=f"{choosing.split} + {calibrating.split}",
        seen=calibrating.seen or "half of them chose its best epoch",
    )
    found = calibrate_accuracy(both)
    why = (
        f"a promise of a drop of at most {max_drop:.1%} takes {least} calibration images, and there are "
        f"{len(calibrating)}"
    )
    return found, (
        f"τ loses no accuracy on the {len(both)} held-out images, which promises nothing for others: "
        f"{calibrating.seen or why}"
    )


def _seen_by_source(config: TrainingConfig) -> str | None:
    """Why images of the data are not new to a model that this one started from, in words; `None` if they are."""
    if config.from_pretrained is None:
        return None
    trained_on = getattr(AutoConfig.from_pretrained(config.from_pretrained), "training_data", None)
    seen = why_not_new(trained_on, config.dataset, ALL)
    return None if seen is None else f"of the source, {seen}"


def _training_facts(run: TrainingRun, chosen: str, unreadable: list[str]) -> dict[str, Any]:
    """Of the training, for the model card; `chosen` as of `choose_model`."""
    config, count = run.config, len(unreadable) + run.progress.skipped_images
    step = run.progress.best_step if chosen == "best" else run.history[-1]["step"]
    epoch = next(entry["epoch"] for entry in run.history if entry["step"] == step)
    return {
        "data": f"`{public_name(config.dataset)}`, split `{config.train_split}`, {run.num_images} images",
        "started from": public_name(config.from_vit or config.from_pretrained),
        "classifier": f"starts from {run.progress.classifier}" if run.progress.classifier else None,
        "epochs": f"{epoch} of {run.num_epochs}, {step} optimizer steps",
        "batch size": config.batch_size,
        "learning rate": f"{config.scaled_learning_rate:g}, times {config.layer_decay:g} for each earlier layer",
        **adapter_facts(config),
        "seed": config.seed,
        "left out": f"{count} images that cannot be decoded" if count else None,
    }
