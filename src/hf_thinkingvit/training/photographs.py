"""Few large photographs, which take longer to decode in every epoch than a small model takes to learn from them."""

import io
from dataclasses import replace
from typing import Any

from PIL import Image

from ..data import ImageSplit, decode
from ..models.configuration_checks import as_pair


MOST_IMAGES = 10_000  # they are held in memory, each of some 50 kB for a model of 224 × 224 pixels
ENLARGEMENT = 2  # of the model's image size: crops down to a quarter of the area are not enlarged
LOOKED_AT = 32


def with_smaller_photographs(split: ImageSplit, image_size: int | tuple[int, int]) -> ImageSplit:
    """
    A training split whose photographs are scaled down, in memory, to twice the size of the model's images, if they are
    larger and not too many. Others, and images that cannot be decoded, stay as they are.

    Args:
        split (`ImageSplit`): to train on. Images to evaluate on must keep their pixels.
        image_size (`int` or `(height, width)`): the model's.
    """
    side, rows, column = ENLARGEMENT * max(as_pair(image_size)), split.rows, split.image_column
    looked_at = range(0, len(rows), max(1, len(rows) // LOOKED_AT))
    if len(rows) > MOST_IMAGES or not any(_shorter_side(rows[index][column]) > side for index in looked_at):
        return split
    smaller = rows.map(
        lambda row: {column: _smaller(row[column], side)},
        features=rows.features,
        keep_in_memory=True,
        load_from_cache_file=False,
        desc="scaling photographs down",
    )
    return replace(split, rows=smaller)


def _shorter_side(image: dict[str, Any]) -> int:
    """In pixels, from the header of the file; 0 if it cannot be read."""
    try:
        with Image.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])) as opened:
            return min(opened.size)
    except Exception:  # Pillow's decoders raise many types; training skips and counts these images
        return 0


def _smaller(image: dict[str, Any], side: int) -> dict[str, Any]:
    if _shorter_side(image) <= side:
        return image
    try:
        decoded = decode(image)
    except Exception:
        return image
    factor = side / min(decoded.size)
    size = [max(side, round(length * factor)) for length in decoded.size]
    buffer = io.BytesIO()
    decoded.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0).save(buffer, "JPEG", quality=95, subsampling=0)
    return {"bytes": buffer.getvalue(), "path": image["path"]}
