"""The image processor settings of ImageNet evaluation, for an image processor of Transformers."""

import math
from collections.abc import Sequence

import torch
from PIL import Image
from transformers import BitImageProcessorPil
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import is_torchvision_available

from .models.configuration_checks import as_pair


def evaluation_image_processor(
    image_size: int | Sequence[int] = 224,
    crop_pct: float = 0.9,
    image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> BaseImageProcessor:
    """
    An image processor for the evaluation of the official checkpoints: it resizes the shorter side to `image_size /
    crop_pct` (248 for 224 / 0.9), crops the centre and normalises. It uses torchvision if installed, else Pillow.

    Args:
        image_size (`int` or `(height, width)`): input size of the model, in pixels.
        crop_pct (`float`): share of the resized shorter side that the crop keeps, above 0 and at most 1.
        image_mean, image_std (`list[float]`): one per channel, for pixel values between 0 and 1.
        resample (`PIL.Image.Resampling`): the interpolation.

    Raises:
        ValueError: if `crop_pct` is outside its range.
    """
    if not 0.0 < crop_pct <= 1.0:
        raise ValueError(f"`crop_pct` must be above 0 and at most 1, got {crop_pct!r}.")
    if is_torchvision_available():
        from transformers import BitImageProcessor as processor_class
    else:
        processor_class = BitImageProcessorPil
    height, width = as_pair(image_size)
    return processor_class(
        size={"shortest_edge": math.floor(max(height, width) / crop_pct)},
        crop_size={"height": height, "width": width},
        resample=resample,
        image_mean=list(image_mean),
        image_std=list(image_std),
    )


def processed_size(processor: BaseImageProcessor, image_size: Sequence[int]) -> tuple[int, int] | None:
    """
    (height, width) of what the processor makes of an RGB image of `image_size` (height, width), measured, because the
    settings of image processors differ from class to class. `None` if it cannot be told: the processor fails on such an
    image, or makes something else than one image.
    """
    height, width = image_size
    try:
        pixels = processor(Image.new("RGB", (width, height)), return_tensors="pt")["pixel_values"]
    except Exception:  # whatever a foreign processor raises; it may be for other images
        return None
    return tuple(pixels.shape[2:]) if isinstance(pixels, torch.Tensor) and pixels.dim() == 4 else None


# Of the official segmentation code: ImageNet's, in steps of 1/255 rounded to two decimals.
SEGMENTATION_MEAN = tuple(value / 255 for value in (123.68, 116.28, 103.53))
SEGMENTATION_STD = tuple(value / 255 for value in (58.4, 57.12, 57.38))


def segmentation_image_processor(
    image_size: int | Sequence[int] = 512,
    image_mean: Sequence[float] = SEGMENTATION_MEAN,
    image_std: Sequence[float] = SEGMENTATION_STD,
) -> BaseImageProcessor:
    """
    An image processor for semantic segmentation: it resizes whole images to `image_size` (bilinear; masks by nearest
    neighbour), normalises, and has `post_process_semantic_segmentation`, which resizes answers to each image's size.
    It uses torchvision if installed, else Pillow.

    Args:
        image_size (`int` or `(height, width)`): in pixels. Cost grows with it, whatever the size of the images.
        image_mean, image_std (`list[float]`): one per channel, for pixel values between 0 and 1.
    """
    if is_torchvision_available():
        from transformers import SegformerImageProcessor as processor_class
    else:
        from transformers.models.segformer.image_processing_pil_segformer import (
            SegformerImageProcessorPil as processor_class,
        )
    height, width = as_pair(image_size)
    return processor_class(
        size={"height": height, "width": width}, image_mean=list(image_mean), image_std=list(image_std)
    )
