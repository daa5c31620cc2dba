"""Inputs of callers: one image, or a stream of images."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers.image_utils import is_numpy_array, is_pil_image, is_torch_tensor


NO_DICT = 'It is a dict: give its images, as in `(row["image"] for row in rows)`.'


def is_one_image(inputs: Any) -> bool:
    """Whether this is one image rather than a stream: a path, a PIL image, an array, a tensor of three dimensions."""
    if is_torch_tensor(inputs):
        return inputs.ndim == 3
    if is_numpy_array(inputs):
        return inputs.ndim in (2, 3)
    if isinstance(inputs, (str, os.PathLike)) or is_pil_image(inputs):
        return True
    return callable(inputs) and not hasattr(inputs, "__iter__")


def each_image(inputs: Any) -> Iterable[Any]:
    """
    The images of `inputs`, one by one.

    Args:
        inputs: an image (a stream of one), or an iterable of images. A `DataLoader` gives the images of its batches, a
            tensor or array of four dimensions its own.

    Raises:
        ValueError: if `inputs` is a folder, a dict or bytes, or neither an image nor iterable.
    """
    if isinstance(inputs, (str, os.PathLike)) and os.path.isdir(inputs):
        raise ValueError(
            f"{os.fspath(inputs)!r} is a folder: give its files, as in `sorted(Path(folder).rglob('*.jpg'))`, or use "
            "examples/classify_folder.py."
        )
    if isinstance(inputs, Mapping):
        raise ValueError(f"Expected an image or an iterable of images. {NO_DICT}")
    if isinstance(inputs, (bytes, bytearray)):
        raise ValueError("Expected an image or an iterable of images, got bytes: decode them with `PIL.Image.open`.")
    if is_one_image(inputs):
        return [inputs]
    if isinstance(inputs, DataLoader) and inputs.batch_sampler is not None:
        return _images_of_batches(inputs)
    # Iteration is preferred: objects with a length may lack indices (webdataset), or raise in `__getitem__` (torch's
    # IterableDataset). Indices stop at the length, since torch's map-style datasets need not raise an IndexError.
    if hasattr(inputs, "__iter__"):
        return inputs
    if hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__"):
        return (inputs[index] for index in range(len(inputs)))
    raise ValueError(f"Expected an image or an iterable of images, got {type(inputs).__name__}.")


def _images_of_batches(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, Mapping):
            yield batch  # refused later, with the index of the input
        else:
            yield from batch


def check_one_image(image: Any) -> None:
    """`ValueError` if an image processor would take `image` for several images, of which only the first would count."""
    if isinstance(image, Mapping):
        raise ValueError(f"Expected one image. {NO_DICT}")
    if isinstance(image, (list, tuple)):
        raise ValueError(f"Expected one image, got a {type(image).__name__} of {len(image)}: give images one by one.")
    if (is_torch_tensor(image) or is_numpy_array(image)) and image.ndim > 3:
        raise ValueError(f"Expected one image, got a batch of shape {tuple(image.shape)}: give images one by one.")


def as_8_bits(image: Any) -> Any:
    """
    Convert arrays and tensors of integers to uint8, with 16-bit values scaled as in image files. Anything else is
    returned unchanged.

    Image processors assume that integers are 8-bit values, so wider ones would be out of the range of training images.

    Args:
        image: the caller's image. Unsigned 16-bit values range up to 65535; image processors scale floats.

    Raises:
        ValueError: if integers other than unsigned 16-bit ones have values outside of 0 to 255, so that their range is
            unknown; if unsigned 16-bit values are all within 0 to 255, so that they may be 8-bit values.
    """
    if is_torch_tensor(image):
        if image.is_floating_point() or image.dtype in (torch.uint8, torch.bool):
            return image
        values = image.to(torch.int64)
        if image.dtype == torch.uint16:
            _check_16_bits(values)
            return _scaled_to_8_bits(values).to(torch.uint8)
    elif is_numpy_array(image) and image.dtype.kind in "iu" and image.dtype != np.uint8:
        values = image
        if image.dtype.kind == "u" and image.dtype.itemsize == 2:  # of either byte order
            _check_16_bits(values)
            return _scaled_to_8_bits(values.astype(np.uint32)).astype(np.uint8)
    else:
        return image
    if 0 not in values.shape and (values.min() < 0 or values.max() > 255):
        raise ValueError(
            f"Expected an image of 8-bit (uint8) or 16-bit (uint16) values or of floats, got {image.dtype} from "
            f"{values.min().item()} to {values.max().item()}, whose range is unknown: scale it to uint8 first."
        )
    return values.to(torch.uint8) if is_torch_tensor(image) else values.astype(np.uint8)


def _check_16_bits(values: Any) -> None:
    if 0 not in values.shape and 0 < values.max() <= 255:
        raise ValueError(
            f"Expected 16-bit values (uint16) up to 65535, got none above {values.max().item()}: 8-bit values would "
            "come out black. Hand those over as uint8, and 16-bit images this dark scaled to uint8."
        )


def _scaled_to_8_bits(values: Any) -> Any:
    return (values * 255 + 32767) // 65535  # rounded


__all__ = ["NO_DICT", "as_8_bits", "check_one_image", "each_image", "is_one_image"]
