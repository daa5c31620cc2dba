"""Images of callers, read and preprocessed one by one, so that an error can name the one that it is about."""

import os
from typing import Any

import numpy as np
from transformers.image_processing_utils import BaseImageProcessor

from ..models.image_files import read_image, unreadable


URL_SECONDS = 60.0  # to wait for an image from the network


def name_of(index: int, image: Any) -> str:
    """What errors call an image: its path or URL, or its place."""
    return str(image)[:200] if isinstance(image, (str, os.PathLike)) else f"at place {index}"


def prepare_image(processor: BaseImageProcessor, image_size: tuple[int, int], index: int, image: Any) -> np.ndarray:
    """
    The pixel values `(num_channels, height, width)` of a picture of Pillow, or of the file at a path or URL.

    Raises:
        ValueError: if it cannot be read, or has not `image_size` (height, width) after the image processor.
    """
    try:
        pixels = processor(read_image(image, timeout=URL_SECONDS), return_tensors="np")["pixel_values"][0]
    except Exception as error:
        raise unreadable(name_of(index, image), error) from error
    if pixels.shape[1:] != image_size:
        raise ValueError(
            f"The image {name_of(index, image)} has {pixels.shape[1]}×{pixels.shape[2]} pixels after the folder's "
            f"image processor, and the programs take {image_size[0]}×{image_size[1]}: resize it first."
        )
    return pixels
