"""Small images with masks, as files and as Parquet, that tests share."""

import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image


CLASSES = ["dark", "grey", "light"]


def picture(seed: int, size: tuple[int, int] = (24, 40)) -> tuple[np.ndarray, np.ndarray]:
    """An image `(height, width, 3)` of rectangles, and the mask of how light each pixel is; 255 in the first row."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(size, dtype=np.uint8)
    for label in (1, 2):
        top, left = rng.integers(0, size[0] // 2), rng.integers(0, size[1] // 2)
        mask[top : top + size[0] // 2, left : left + size[1] // 2] = label
    image = np.stack([mask * 100 + 20] * 3, axis=-1) + rng.integers(0, 20, (*size, 3), dtype=np.uint8)
    mask[:1] = 255
    return image.astype(np.uint8), mask


def encoded(pixels: np.ndarray | Image.Image) -> dict:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_scenes(folder: Path, counts: dict[str, int] | None = None) -> Path:
    """Parquet files of images and masks: 12 to train on, 4 to choose by, 5 to test on."""
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    for number, (split, count) in enumerate((counts or {"train": 12, "validation": 4, "test": 5}).items()):
        pictures = [picture(100 * number + index) for index in range(count)]
        rows = {
            "image": [encoded(image) | {"path": f"{split}-{index}.png"} for index, (image, _) in enumerate(pictures)],
            "annotation": [encoded(mask) for _, mask in pictures],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder
