"""From images as callers give them to pixel values, in chunks: in a thread of the reader, or in its workers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from ..models.image_files import read_image, unreadable
from ..models.image_inputs import NO_DICT, as_8_bits, check_one_image


@dataclass(frozen=True)
class Reading:
    """
    Images that were read, which have one size, or the reason why an image could not be read.

    Attributes:
        indices: their places in the input; empty if iterating over the input raised.
        pixel_values: `(images, channels, height, width)`, on the CPU; `None` if there is an error.
        error: the reason; any `BaseException` if iterating over the input raised.
    """

    indices: list[int] = field(default_factory=list)
    pixel_values: torch.Tensor | None = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Preparation:
    """
    Decodes and preprocesses images. It can be sent to another process.

    Args:
        processor (`BaseImageProcessor`, *optional*): preprocesses inputs that are not tensors.
    """

    processor: BaseImageProcessor | None

    def __call__(self, chunk: list[tuple[int, Any]]) -> list[Reading]:
        """Readings of all images of the chunk, `(place in the input, image)` each, in order."""
        images: list[Any] = [self._read(index, image) for index, image in chunk]
        # One call for all pictures: the processor then resizes and normalises those of a size together. Arrays may
        # differ in their layout, which it would take from the first.
        pictures = [place for place, image in enumerate(images) if isinstance(image, Image.Image)]
        if len(pictures) > 1:
            try:
                prepared = self.processor([images[place] for place in pictures], return_tensors="pt")["pixel_values"]
                for place, pixel_values in zip(pictures, prepared, strict=True):
                    images[place] = pixel_values
            except Exception:
                pass  # one by one, which says of which image it is, or gives them different sizes
        return _joined([index for index, _ in chunk], [self._prepare(*entry) for entry in zip(chunk, images)])

    def _read(self, index: int, image: Any) -> Any:
        """A tensor that is ready, a picture or an array that is decoded, or the error."""
        if isinstance(image, Exception):  # the caller could not read this image
            return image
        if isinstance(image, torch.Tensor):
            if image.dim() == 3 and image.is_floating_point():
                return image
            return ValueError(
                f"Input {index} must be a tensor (channels, height, width) of floats, preprocessed, got "
                f"{tuple(image.shape)} of {image.dtype}."
            )
        if isinstance(image, Mapping):
            return ValueError(f"Input {index} is not an image. {NO_DICT}")
        if self.processor is None:
            return ValueError(f"Input {index} is a {type(image).__name__}, which needs a `processor`.")
        name = _name(index, image)
        try:
            if callable(image):
                image = image()
            if isinstance(image, (str, Image.Image)) or hasattr(image, "__fspath__"):
                image = read_image(image)
            check_one_image(image)
            image = as_8_bits(image)
        except Exception as error:
            return unreadable(name, error)
        return image if isinstance(image, Image.Image) else _Array(image)

    def _prepare(self, entry: tuple[int, Any], image: Any) -> torch.Tensor | Exception:
        if isinstance(image, (torch.Tensor, Exception)):
            return image
        try:
            image = image.values if isinstance(image, _Array) else image
            return self.processor(image, return_tensors="pt")["pixel_values"][0]
        except Exception as error:
            return unreadable(_name(*entry), error)


@dataclass(frozen=True)
class _Array:
    """An array or tensor of a caller, to be preprocessed: unlike tensors that are preprocessed already."""

    values: Any


def _name(index: int, image: Any) -> str:
    return f"at place {index}" if callable(image) or isinstance(image, Image.Image) else str(image)


def _joined(indices: list[int], images: list[torch.Tensor | Exception]) -> list[Reading]:
    """Neighbours in the input, of one size and dtype, in one tensor."""
    readings: list[Reading] = []
    start = 0
    for stop in range(1, len(images) + 1):
        image = images[start]
        if stop < len(images) and isinstance(image, torch.Tensor) and isinstance(images[stop], torch.Tensor):
            following, is_next = images[stop], indices[stop] == indices[stop - 1] + 1
            if is_next and following.shape == image.shape and following.dtype == image.dtype:
                continue
        if isinstance(image, torch.Tensor):
            together = image[None] if stop == start + 1 else torch.stack(images[start:stop])
            readings.append(Reading(indices[start:stop], together))
        else:
            readings.append(Reading(indices[start:stop], error=image))
        start = stop
    return readings
