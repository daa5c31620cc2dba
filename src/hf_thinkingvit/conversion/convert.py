"""`convert_checkpoint`: detect the family, check every tensor, and only then write anything."""

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
)

from ..families import FAMILIES, Family, family_of
from ..families.official import Checkpoint, OfficialFormat
from ..image_processing import evaluation_image_processor, segmentation_image_processor
from .checkpoint import read_checkpoint
from .labels import label_fields
from .recognition import describe_unofficial


# What upstream Segmenter's `variant.yml` calls its normalisations; the official ThinkingViT code has one of its own.
NORMALIZATIONS = {
    "vit": {"image_mean": IMAGENET_STANDARD_MEAN, "image_std": IMAGENET_STANDARD_STD},
    "deit": {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD},
}
EXIT_RULE = ("threshold", "exit_criterion")


def convert_checkpoint(source: str | os.PathLike, output_dir: str | os.PathLike, **config_overrides) -> PreTrainedModel:
    r"""
    Convert an official checkpoint into a folder that `from_pretrained` and `pipeline` load: configuration, safetensors,
    image processor settings and the model's code.

    Args:
        source (`str` or `os.PathLike`):
            A folder or Hub id with `model.safetensors` and a timm-style `config.json`, or a `.pth` / `.pth.tar` file,
            for segmentation models with the `variant.yml` beside it.
            Averaged weights (`state_dict_ema`) are preferred. Only tensors and plain data are unpickled.
        output_dir (`str` or `os.PathLike`):
            Where to write. Nothing is written unless every tensor fits.
        config_overrides:
            Fields of the configuration, such as `threshold` or `id2label`, which win over the source. Some must be
            given where the source does not state them: `thinking_stages` or `head_rounds` for a bare file, `gate_scale`
            and `gate_center` for an A-ViT, `pruning_keep_rate` for a model that prunes tokens. If neither names the
            classes and there are 1000, they get ImageNet-1K's names.

    Returns:
        The converted model, in evaluation mode.

    Raises:
        FileNotFoundError: if there is no such source.
        ValueError: if the source is damaged or unrelated; the message names missing and unexpected keys.
    """
    checkpoint = read_checkpoint(source)
    output_dir = Path(output_dir)
    if output_dir.is_file() or output_dir.resolve() == checkpoint.path.parent.resolve():
        raise ValueError(
            f"`output_dir` ({output_dir}) must be a folder other than the source's: it would be overwritten."
        )
    model = load_official(checkpoint, **config_overrides)
    processor = build_image_processor(checkpoint, model)
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    return model


@dataclass(frozen=True)
class Converted:
    """
    A checkpoint in the form of this package.

    Attributes:
        family (`Family`): which it is of.
        model_class (`type`): with its head.
        config (`PreTrainedConfig`): of the model.
        state_dict (`dict[str, torch.Tensor]`): exactly the model's parameters.
        dtype (`torch.dtype`): of the tensors; if they differ, the one that holds all of them.
    """

    family: Family
    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    state_dict: dict[str, torch.Tensor]
    dtype: torch.dtype


def load_official(checkpoint: Checkpoint, **config_overrides) -> PreTrainedModel:
    """The model of a checkpoint, in its dtype; `ValueError` if a tensor is missing, unknown or has another shape."""
    converted = convert(checkpoint, **config_overrides)
    model = converted.model_class(converted.config).eval().to(converted.dtype)
    model.load_state_dict(converted.state_dict)
    return model


def convert(checkpoint: Checkpoint, **config_overrides) -> Converted:
    """Convert a checkpoint in memory; `ValueError` if a tensor is missing, unknown or has another shape."""
    family, official = detect(checkpoint, config_overrides)
    _require(checkpoint, list(official.required))
    for name, dimensions in official.required.items():
        if checkpoint.state_dict[name].dim() != dimensions:
            shape = tuple(checkpoint.state_dict[name].shape)
            raise ValueError(f"{checkpoint.path}: {name} must have {dimensions} dimensions, got the shape {shape}.")
    checkpoint = replace(checkpoint, state_dict=official.prepare(checkpoint, **config_overrides))
    labels = label_fields(checkpoint, official.num_labels(checkpoint.state_dict), config_overrides)
    config = _build_config(official, checkpoint, {**labels, **config_overrides})
    if (unread := official.unread(config)) is not None:
        read = {name: tensor for name, tensor in checkpoint.state_dict.items() if not re.match(unread, name)}
        checkpoint = replace(checkpoint, state_dict=read)
    model_class = family.heads[official.task]
    with torch.device("meta"):  # names and shapes alone
        parameters = model_class(config).state_dict()
    official_names = {name: official.official_name(name) for name in parameters}
    _require(checkpoint, list(dict.fromkeys(official_names.values())), check_unexpected=True)
    converted = {
        name: official.convert_tensor(name, checkpoint.state_dict[official_name])
        for name, official_name in official_names.items()
    }
    misshapen = [
        f"{official_names[name]} (for {name}): expected {tuple(parameters[name].shape)}, got {tuple(tensor.shape)}"
        for name, tensor in converted.items()
        if tensor.shape != parameters[name].shape
    ]
    if misshapen:
        raise ValueError(f"{checkpoint.path} does not fit its configuration:\n" + "\n".join(misshapen))
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in converted.values()})
    return Converted(family, model_class, config, converted, dtype)


def _build_config(official: OfficialFormat, checkpoint: Checkpoint, overrides: Mapping) -> PreTrainedConfig:
    """
    The configuration, with the rules of saved models for overrides (`StagedConfig.from_dict`): a τ or an exit criterion
    of `None` is not given, and a criterion alone does not read a τ that is stated for another one.
    """
    given = {name: value for name, value in overrides.items() if value is not None or name not in EXIT_RULE}
    config = official.build_config(checkpoint, **given)
    if "exit_criterion" in given and "threshold" not in given:
        stated = official.build_config(checkpoint, **{name: given[name] for name in given if name != "exit_criterion"})
        if stated.threshold == config.threshold:
            type(stated).from_dict(stated.to_dict(), exit_criterion=given["exit_criterion"])
    return config


def build_image_processor(checkpoint: Checkpoint, model: PreTrainedModel) -> BaseImageProcessor:
    """The evaluation settings of `pretrained_cfg` or `variant.yml`, with the official ones as defaults."""
    if getattr(model.config, "decoder_type", None) is not None:
        normalization = (checkpoint.variant.get("net_kwargs") or {}).get("normalization")
        if normalization is None:
            return segmentation_image_processor(model.config.image_size)
        if normalization not in tuple(NORMALIZATIONS):  # a tuple takes whatever YAML holds, also what has no hash
            raise ValueError(
                f"`net_kwargs.normalization` in the `variant.yml` of {checkpoint.path} must be one of "
                f"{sorted(NORMALIZATIONS)}, got {normalization!r}: correct the file, or remove the line for the mean "
                "and deviation of the official ThinkingViT code."
            )
        if normalization == "deit" and checkpoint.variant.get("thinking_kwargs"):
            # The official ThinkingViT code evaluates with its own roundings of the same statistics, stated or not.
            return segmentation_image_processor(model.config.image_size)
        return segmentation_image_processor(model.config.image_size, **NORMALIZATIONS[normalization])
    settings = checkpoint.preprocessing
    options = {
        "crop_pct": settings.get("crop_pct") or family_of(model).official.crop_pct(checkpoint),
        "image_mean": settings.get("mean"),
        "image_std": settings.get("std"),
    }
    options = {name: value for name, value in options.items() if value is not None}
    interpolation = str(settings.get("interpolation", "bicubic")).upper()
    if interpolation in Image.Resampling.__members__:  # timm also writes "random", for which evaluation uses bicubic
        options["resample"] = Image.Resampling[interpolation]
    return evaluation_image_processor(model.config.image_size, **options)


def detect(checkpoint: Checkpoint, overrides: Mapping) -> tuple[Family, OfficialFormat]:
    """The family of a checkpoint, and which of its formats it has; `ValueError`, which says what it is, if none."""
    missing, stated = {}, {name: value for name, value in overrides.items() if value is not None}
    for name, family in FAMILIES.items():
        for form in family.official_formats:
            if form.matches(checkpoint, stated):
                return family, form
            form_name = name if form is family.official else f"{name} {form.task}"
            missing[form_name] = [key for key in form.required if key not in checkpoint.state_dict]
    if (found := describe_unofficial(checkpoint)) is not None:
        raise ValueError(f"{checkpoint.path} is no official checkpoint. {found}")
    raise ValueError(
        f"{checkpoint.path} is a checkpoint of none of the known families ({', '.join(missing)}). Missing keys: "
        + "; ".join(f"for {name}, {_shorten(keys)}" for name, keys in missing.items())
        + f". Unexpected keys: {_shorten(sorted(checkpoint.state_dict))}."
    )


def _require(checkpoint: Checkpoint, needed: list[str], check_unexpected: bool = False) -> None:
    missing = [name for name in needed if name not in checkpoint.state_dict]
    unexpected = [name for name in checkpoint.state_dict if name not in needed] if check_unexpected else []
    if missing or unexpected:
        message = f"{checkpoint.path} does not hold the expected weights. Missing keys: {_shorten(missing)}."
        # Which keys are unexpected depends on the sizes, so it is unknown while tensors that state them are missing.
        raise ValueError(message + (f" Unexpected keys: {_shorten(unexpected)}." if check_unexpected else ""))


def _shorten(names: list[str], limit: int = 30) -> str:
    if not names:
        return "none"
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")
