"""Large photographs are scaled down once, and nothing else is changed."""

import io

import datasets
import numpy as np
from PIL import Image

from hf_thinkingvit.data import as_image_split, decode
from hf_thinkingvit.training.photographs import with_smaller_photographs


def split_of(*files: bytes):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": file, "path": f"{index}.png"} for index, file in enumerate(files)]}
    return as_image_split(datasets.Dataset.from_dict({**rows, "label": [0] * len(files)}, features=features), "photos")


def picture(width: int, height: int) -> bytes:
    ramp = np.linspace(0, 255, width, dtype=np.uint8)[None, :, None].repeat(height, 0).repeat(3, 2)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")
    return buffer.getvalue()


def test_large_ones_shrink_and_others_stay():
    large, small, broken = picture(200, 100), picture(60, 40), b"no image"
    split = with_smaller_photographs(split_of(large, small, broken), 24)
    images = [row["image"] for row in split.rows]
    assert decode(images[0]).size == (96, 48)
    pixels = np.asarray(decode(images[0])).astype(int)
    assert abs(pixels - np.asarray(Image.open(io.BytesIO(large)).resize((96, 48)))).max() <= 3
    assert images[1]["bytes"] == small and images[2]["bytes"] == broken
    assert split.rows["label"][:] == [0, 0, 0]


def test_small_images_are_not_copied():
    split = split_of(picture(40, 40))
    assert with_smaller_photographs(split, 24) is split
