"""
Reads image files as RGB with 8 bits per channel.

Pillow's `convert("RGB")` clips the values of wider grey images at 255, which turns nearly all of a 16-bit image white.
"""

import base64
import os
from io import BytesIO
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


# TIFF tags.
BITS_PER_SAMPLE, PHOTOMETRIC_INTERPRETATION = 258, 262

# Of the formats that Pillow knows, those of photographs. Some of the others are no images but programs (EPS).
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP")


def read_image(source: str | os.PathLike | Image.Image, timeout: float | None = None) -> Image.Image:
    """
    An upright RGB image from a path, a URL, base64 text or an image, as Transformers' `load_image` takes them.

    Args:
        source (`str`, `os.PathLike` or `PIL.Image.Image`): where the image is, or the image.
        timeout (`float`, *optional*): for URLs, in seconds.

    Raises:
        ValueError: if the image cannot be read, or the range of its grey values is unknown (see `as_rgb`).
    """
    if isinstance(source, Image.Image):
        return as_rgb(source)
    source = os.fspath(source)
    if source.startswith(("http://", "https://")):
        request = Request(source, headers={"User-Agent": "hf-thinkingvit"})  # some servers refuse Python's default
        with urlopen(request, timeout=timeout) as response:
            content = response.read()
        return as_rgb(Image.open(BytesIO(content)), source)
    if os.path.isfile(source):
        with Image.open(source) as image:
            return as_rgb(image, source)
    try:
        image = Image.open(BytesIO(base64.decodebytes(source.rpartition(",")[2].encode())))
    except Exception as error:  # neither a path nor base64
        raise ValueError(
            f"There is no file `{source[:200]}`, and it is no URL and no image in base64 either."
        ) from error
    return as_rgb(image, "in base64")


def open_photo(content: bytes) -> Image.Image:
    """
    An image, not decoded yet, from the bytes of a file that a stranger may have sent.

    Args:
        content (`bytes`): of a file in one of `PHOTO_FORMATS`; AVIF and WebP only if Pillow was built with them.

    Raises:
        ValueError: if it is in none of these formats.
    """
    Image.init()
    formats = [name for name in PHOTO_FORMATS if name in Image.SAVE]  # `Image.OPEN` has those without a codec, too
    try:
        return Image.open(BytesIO(content), formats=formats)
    except UnidentifiedImageError as error:  # its text is the address of the buffer
        raise ValueError(f"its {len(content)} bytes are in none of the formats {', '.join(formats)}") from error


def unreadable(name: str, error: Exception) -> ValueError:
    """The error for an image that cannot be read. Decoders raise many types, without the name of the image."""
    failure = ValueError(f"Cannot read the image {name[:200]}: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def as_rgb(image: Image.Image, name: str | None = None) -> Image.Image:
    """
    An image as RGB and upright. Grey values of 16 bits (12 in some TIFF files) are scaled to 8 bits.

    Args:
        image (`PIL.Image.Image`): of any mode.
        name (`str`, *optional*): for messages; by default the name of its file.

    Raises:
        ValueError: if the range of its values is unknown: 32-bit or signed integers, and floats. PNG and PGM files are
            accepted, because their values end at 65535 even if Pillow opens them as 32-bit integers.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return ImageOps.exif_transpose(image).convert("RGB")
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(
            f"The image {name or getattr(image, 'filename', '') or 'without a name'} has grey values of unknown range "
            f"(mode {image.mode!r}): scale them to 8 or 16 bits first, so that black is 0 and white 255 or 65535."
        )
    tiff = getattr(image, "tag_v2", {})
    white = 2**12 - 1 if tiff.get(BITS_PER_SAMPLE) == (12,) else 2**16 - 1
    values = np.asarray(ImageOps.exif_transpose(image)).astype(np.uint32)
    if tiff.get(PHOTOMETRIC_INTERPRETATION) == 0:  # white is 0, and Pillow does not invert the values
        values = white - values
    return Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8)).convert("RGB")


__all__ = ["as_rgb", "open_photo", "read_image", "unreadable"]
