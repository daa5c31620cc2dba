"""Loads the model of a command, and says what it is."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..auto import TASKS, AutoImageProcessor, saved_task
from ..conversion.loading import load_official_source
from ..families import FAMILIES, task_of
from ..families.official import UnstatedField
from ..families.record import IMAGE_CLASSIFICATION
from ..inference import ExportedModel, from_exported
from ..inference.class_scores import check_has_classes
from ..inference.runtimes import is_exported
from ..models.configuration_staged import thinks_in_stages
from ..models.task_classification import ImageClassificationTask
from ..models.weights_from_official import hub_arguments, is_official
from .command import check_model_folder, say


def load_model(
    name: str, task: str | None = IMAGE_CLASSIFICATION, **options: Any
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """
    A model in evaluation mode, and its image processor.

    Args:
        name (`str`): folder or Hub id, also of an official checkpoint, or the file of one: these are converted in
            memory.
        task (`str`, *optional*): that the model must be for; `None` for any, which its configuration says.
        options: of `from_pretrained`.

    Raises:
        OSError, ValueError: if there is none, or it is for another task (another head would get random weights); the
            message says what is missing.
    """
    check_model_folder(name)
    if is_exported(name):
        raise ValueError(
            f"`{name}` is an exported folder, which has no weights: give the folder of the model. The command "
            "`classify`, `from_exported` and the engine take exported ones."
        )
    try:
        if is_official(name, options):
            return _load_official(name, task, options)
        found = hub_arguments(options)
        config = AutoConfig.from_pretrained(name, **found)
        saved = saved_task(config)
        if task is None and saved is None:
            raise ValueError(f"`{name}` is no model of this package with a head: its class is {config.architectures}.")
        _check_task(name, saved, task)
        model = load_whole(TASKS[saved or task][0], name, **options)
        return model, AutoImageProcessor.from_pretrained(name, **found)
    except OSError as error:
        if Path(name).exists():
            raise
        raise OSError(
            f"`{name}` is no folder here, and cannot be loaded from the Hub: it is not there, or needs "
            "`hf auth login`, or the Hub cannot be reached."
        ) from error


def load_baseline(name: str, **options: Any) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """
    An image classifier to compare with, of this package or of Transformers, in evaluation mode, and its image
    processor. The arguments are those of `load_model`.

    Raises:
        OSError, ValueError: as in `load_model`.
    """
    check_model_folder(name)
    found = hub_arguments(options)
    if is_official(name, options) or AutoConfig.from_pretrained(name, **found).model_type in FAMILIES:
        return load_model(name, **options)
    model = load_whole(AutoModelForImageClassification, name, **options)
    return model, AutoImageProcessor.from_pretrained(name, **found)


def load_whole(auto_class: Any, name: str, **options: Any) -> PreTrainedModel:
    """A saved model in evaluation mode. `ValueError` if it lacks weights, which would be drawn at random."""
    model, info = auto_class.from_pretrained(name, output_loading_info=True, **options)
    absent = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if absent:
        raise ValueError(
            f"`{name}` has no weights for {', '.join(absent[:4])}{' and others' if len(absent) > 4 else ''} of a "
            f"{type(model).__name__}, which would be random: give the folder of a trained one."
        )
    return model.eval()


def _load_official(name: str, task: str | None, options: dict[str, Any]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    try:
        model, processor = load_official_source(name, **options)
    except UnstatedField as error:
        raise ValueError(f"{error} Commands take the folder that `hf-thinkingvit convert` makes of it then.") from error
    _check_task(name, task_of(model), task)
    return model, processor


def _check_task(name: str, found: str | None, task: str | None) -> None:
    if None not in (task, found) and found != task:
        raise ValueError(f"`{name}` is a model for {found}, and this command is for {task}.")


def load_classifier(
    name: str, precision: str | None = None, threads: int | None = None
) -> tuple[PreTrainedModel | ExportedModel, BaseImageProcessor]:
    """
    A classifier for the engine, and its image processor: of a model, or of a folder that `export_model` wrote.

    Args:
        name (`str`): as in `load_model`, or an exported folder.
        precision, threads (*optional*): of an exported folder, as in `from_exported`.

    Raises:
        OSError, ValueError: as in `load_model` and `from_exported`; for an exported folder without an image processor,
            or of a model for another task; for `precision` or `threads` of another model; for a regression.
    """
    if not is_exported(name):
        if precision is not None or threads is not None:
            raise ValueError(f"`precision` and `threads` are of exported folders, and `{name}` is none.")
        model, processor = load_model(name)
        check_has_classes(model.config)
        return model, processor
    model = from_exported(name, precision, threads=threads)
    if not isinstance(model, ImageClassificationTask):
        raise ValueError(f"`{name}` was exported from a model for another task than classification.")
    check_has_classes(model.config)
    if model.processor is None:
        raise ValueError(f"`{name}` has no image processor: `export_model(..., processor=processor)` saves it.")
    return model, model.processor


def start(model: PreTrainedModel | ExportedModel, **facts: Any) -> None:
    """Print what a command is about to do: device, precision and model, then `facts`."""
    if isinstance(model, ExportedModel):
        device, dtype, size = model.runtime, model.precision, ""
        name = type(model.config).__name__.removesuffix("Config")
    else:
        device, dtype = next(model.parameters()).device, str(next(model.parameters()).dtype).removeprefix("torch.")
        name, size = type(model).__name__, f"{model.num_parameters() / 1e6:.2f} M parameters, "
    stages = getattr(model.config, "num_stages", None)
    say(
        device=f"{device}, {dtype}",
        model=f"{name}, {size}{model.config.num_labels} classes" + (f", {stages} stages" if stages else ""),
        answers="random, by numbers drawn from the seed 0" if answers_are_random(model) else None,
        **facts,
    )


def answers_are_random(model: PreTrainedModel | ExportedModel) -> bool:
    """Whether the model's exit rule draws a number for each image (PonderNet's sampling)."""
    return thinks_in_stages(model) and model.exit_rule().draws


def best_device() -> torch.device:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
