"""The preprocessing that a model expects, read from its image processor, and the image processor of a run."""

import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import cached_file

from ..image_processing import (
    SEGMENTATION_MEAN,
    SEGMENTATION_STD,
    evaluation_image_processor,
    segmentation_image_processor,
)
from ..models.configuration_checks import as_pair


if TYPE_CHECKING:
    from .config import TrainingConfig


class Preprocessing(NamedTuple):
    """
    Attributes:
        image_mean, image_std: per channel, for pixel values between 0 and 1.
        image_size: (height, width) of the processed image.
        resample: the interpolation.
    """

    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    image_size: tuple[int, int]
    resample: Image.Resampling


def load_image_processor(source: str | os.PathLike, **overrides: Any) -> BaseImageProcessor | None:
    """
    The image processor saved with a model; `None` if there is none.

    Raises:
        OSError, ValueError: if there is one that cannot be loaded, or the Hub cannot be reached.
    """
    try:
        return AutoImageProcessor.from_pretrained(source, **overrides)
    except (OSError, ValueError):
        if cached_file(source, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False) is None:
            return None
        raise


def read_preprocessing(processor: BaseImageProcessor, image_size: int | tuple[int, int], name: str) -> Preprocessing:
    """
    The preprocessing of an image of `image_size`. It is measured on images of one colour, because the settings of image
    processors differ from class to class.

    Args:
        processor (`BaseImageProcessor`): the image processor of any model.
        image_size (`int` or `(height, width)`): in pixels.
        name (`str`): of the model, for error messages.

    Raises:
        ValueError: if the processor does more to colours than scale and shift each channel, or pads.
    """
    height, width = as_pair(image_size)
    colours = torch.tensor([(0, 0, 0), (255, 255, 255), (51, 102, 204)], dtype=torch.float64)
    images = [Image.new("RGB", (width, height), tuple(colour)) for colour in colours.int().tolist()]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    if not torch.is_tensor(pixels) or pixels.dim() != 4 or pixels.shape[1] != 3:
        raise ValueError(
            f"The image processor of `{name}` ({type(processor).__name__}) must make `pixel_values` of shape (batch, "
            f"3, height, width), got {tuple(pixels.shape) if torch.is_tensor(pixels) else type(pixels).__name__}."
        )
    pixels = pixels.double()
    black, white, between = pixels.mean(dim=(2, 3))
    spread = (pixels.amax(dim=(2, 3)) - pixels.amin(dim=(2, 3))).max()
    off = (black + (white - black) * colours[2] / 255 - between).abs().max()
    if max(spread, off) > 1e-3 or (white - black).abs().min() < 1e-6:
        raise ValueError(
            f"The image processor of `{name}` ({type(processor).__name__}) does more to colours than to scale and "
            "shift each channel, or it pads images: it cannot be used here."
        )
    std = 1 / (white - black)
    resample = getattr(processor, "resample", None)
    if resample is None and isinstance(settings := getattr(processor, "data_config", None), dict):  # of timm's models
        resample = getattr(Image.Resampling, str(settings.get("interpolation")).upper(), None)
    return Preprocessing(
        # Rounded, because 0.485 is measured in float32.
        image_mean=tuple(round(value, 6) for value in (-black * std).tolist()),
        image_std=tuple(round(value, 6) for value in std.tolist()),
        image_size=(pixels.shape[2], pixels.shape[3]),
        resample=Image.Resampling(Image.Resampling.BICUBIC if resample is None else resample),
    )


def run_image_processor(
    config: "TrainingConfig", model_config: PreTrainedConfig, report: Callable[[str], None]
) -> tuple[BaseImageProcessor, "TrainingConfig"]:
    """
    The image processor of a run, which is saved with its models: that of the model the run starts from, with the
    configured changes; without such a model, one with ImageNet's normalisation.

    Args:
        config (`TrainingConfig`): of the run.
        model_config (`PreTrainedConfig`): of the model to train.
        report (`Callable`): called with a message that describes the processor.

    Returns:
        The processor, and `config` with `image_mean`, `image_std` and `interpolation` (and without a source,
        `crop_pct`) filled in.

    Raises:
        ValueError: if the processor cannot interpolate as configured.
    """
    source = config.from_vit or config.from_pretrained
    size = as_pair(model_config.image_size)
    found = load_image_processor(source) if source else None
    crop_pct = 0.9 if config.crop_pct is None else config.crop_pct
    resample = None if config.interpolation is None else Image.Resampling[config.interpolation.upper()]
    if found is None:
        processor = evaluation_image_processor(
            size,
            crop_pct,
            IMAGENET_DEFAULT_MEAN if config.image_mean is None else config.image_mean,
            IMAGENET_DEFAULT_STD if config.image_std is None else config.image_std,
            Image.Resampling.BICUBIC if resample is None else resample,
        )
        if source and None in (config.image_mean, config.image_std, config.crop_pct):
            report(f"`{source}` has no image processor: ImageNet's normalisation and crop where none are configured")
        return processor, _filled_in(config, processor.image_mean, processor.image_std, crop_pct, processor.resample)
    settings = read_preprocessing(found, size, str(source))
    mean, std = config.image_mean or settings.image_mean, config.image_std or settings.image_std
    resample = settings.resample if resample is None else resample
    if config.crop_pct is not None or settings.image_size != size:
        processor = evaluation_image_processor(size, crop_pct, mean, std, resample)
    else:
        crop_pct, overrides = None, {}
        if config.image_mean or config.image_std:
            overrides |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
            overrides |= {"image_mean": list(mean), "image_std": list(std)}
        if resample != settings.resample:
            overrides["resample"] = resample
        processor = load_image_processor(source, **overrides) if overrides else found
        if read_preprocessing(processor, size, str(source)).resample != resample:
            raise ValueError(
                f"The image processor of `{source}` ({type(processor).__name__}) does not interpolate otherwise than "
                f"{settings.resample.name.lower()}: leave `interpolation` out, or replace it by setting `crop_pct`."
            )
    changed = [
        name
        for name, value, own in (("image_mean", mean, settings.image_mean), ("image_std", std, settings.image_std))
        if tuple(value) != own
    ]
    changed += ["crop_pct"] if config.crop_pct is not None else []
    changed += ["interpolation"] if resample != settings.resample else []
    kept = f"; {', '.join(f'`{name}`' for name in changed)} as configured" if changed else ""
    report(
        f"image processor of `{source}`: mean {list(mean)}, standard deviation {list(std)}, "
        f"{resample.name.lower()}, {size[0]} × {size[1]} pixels{kept}"
    )
    return processor, _filled_in(config, mean, std, crop_pct, resample)


def segmentation_run_processor(
    config: "TrainingConfig", model_config: PreTrainedConfig, report: Callable[[str], None]
) -> tuple[BaseImageProcessor, "TrainingConfig"]:
    """
    The same for segmentation, whose images are not cropped: they are resized bilinearly by the run itself, and the
    processor only normalises.

    Raises:
        ValueError: for another interpolation, or `crop_pct`.
    """
    if config.interpolation not in (None, "bilinear") or config.crop_pct is not None:
        raise ValueError(
            "Segmentation resizes images bilinearly and crops none: leave out `interpolation`, `crop_pct`."
        )
    source = config.from_vit or config.from_pretrained
    size = as_pair(model_config.image_size)
    found = load_image_processor(source) if source else None
    mean, std = config.image_mean, config.image_std
    if found is not None:
        settings = read_preprocessing(found, size, str(source))
        mean, std = mean or settings.image_mean, std or settings.image_std
    elif source and None in (mean, std):
        report(f"`{source}` has no image processor: ImageNet's normalisation where none is configured")
    processor = segmentation_image_processor(size, mean or SEGMENTATION_MEAN, std or SEGMENTATION_STD)
    return processor, _filled_in(config, processor.image_mean, processor.image_std, None, Image.Resampling.BILINEAR)


def _filled_in(
    config: "TrainingConfig", mean: Any, std: Any, crop_pct: float | None, resample: int
) -> "TrainingConfig":
    interpolation = Image.Resampling(resample).name.lower()
    return dataclasses.replace(
        config, image_mean=list(mean), image_std=list(std), crop_pct=crop_pct, interpolation=interpolation
    )
