"""
Masks of semantic segmentation: files whose pixels stand for classes, and folders that hold them beside their images.

A mask is an image of integers. Which values stand for which class is data (`MaskLabels`); every value must be a class
or be said to be ignored, because a value left out by mistake would otherwise pass as one that does not count.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from .data import ImageSplit, Rows, as_images, column_of


MASK_COLUMNS = ("annotation", "mask", "label", "labels", "segmentation")


@dataclass(frozen=True)
class MaskLabels:
    """
    The classes of masks.

    Attributes:
        names (`tuple[str]`): of the classes, in order.
        values (`tuple[int]`): the value in the files that stands for each class; ADE20K's are 1 to 150.
        ignored (`tuple[int]`): values of pixels that do not count.
        ignore_index (`int`): the label of such pixels, `config.semantic_loss_ignore_index` of the model.

    Raises:
        ValueError: if there are not as many values as names, or a value has several meanings.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    ignored: tuple[int, ...] = (255,)
    ignore_index: int = 255

    def __post_init__(self):
        if len(self.names) != len(self.values):
            raise ValueError(f"There are {len(self.names)} classes, but {len(self.values)} values of masks for them.")
        meanings = [*self.values, *self.ignored]
        repeated = sorted({value for value in meanings if meanings.count(value) > 1})
        if repeated:
            raise ValueError(f"Values of masks have several meanings: {repeated[:10]}.")
        if any(not 0 <= value < 2**16 for value in meanings):
            raise ValueError(f"Values of masks must lie between 0 and 65535, got {min(meanings)} to {max(meanings)}.")
        if 0 <= self.ignore_index < len(self.names):
            raise ValueError(
                f"Label {self.ignore_index} cannot be both a class and that of pixels that do not count: set another "
                "`semantic_loss_ignore_index`."
            )

    @property
    def dtype(self) -> type:
        return np.uint8 if len(self.names) <= 256 and 0 <= self.ignore_index < 256 else np.int32

    def decode(self, mask: dict[str, Any] | None, image: Image.Image, where: str) -> torch.Tensor:
        """
        The labels of the pixels of an image.

        Args:
            mask (`dict`): encoded, as `datasets` holds images that are not decoded.
            image (`PIL.Image.Image`): the image, upright.
            where (`str`): what it is called in messages.

        Returns:
            `torch.Tensor` of shape `(height, width)`: class indices and `ignore_index`, uint8 or int32.

        Raises:
            ValueError: if the mask is no image of integers, is not of the image's size, or has a value without meaning.
        """
        if mask is None:
            raise ValueError(f"Image {where} has no mask.")
        picture = datasets.Image().decode_example(mask)
        if picture.mode not in ("P", "L", "1", "I") and not picture.mode.startswith("I;16"):
            raise ValueError(
                f"The mask of image {where} has colours or other pixels that are no integers (mode {picture.mode!r}): "
                "masks must be images with one channel, or palette images, whose values are class indices."
            )
        if picture.size != image.size:
            raise ValueError(
                f"The mask of image {where} has {picture.width} × {picture.height} pixels, the image "
                f"{image.width} × {image.height}: resize the mask, by nearest neighbour."
            )
        values = np.asarray(picture)
        if values.dtype.itemsize > 2:  # 32-bit integers
            values = np.where((values < 0) | (values >= 2**16), 2**16, values)
        labels = self._table[values.astype(np.int32)]
        unknown = labels == _UNKNOWN
        if unknown.any():
            values = np.asarray(picture)
            found, pixels = np.unique(values[unknown], return_counts=True)
            row, column = np.argwhere(unknown)[0]
            more = f" and {len(found) - 10} other values" if len(found) > 10 else ""
            raise ValueError(
                f"The mask of image {where} has values that are no class and are not ignored: "
                f"{found[:10].tolist()}{more} in {pixels.sum()} pixels, the first at row {row}, column {column}. The "
                f"classes are {_ranges(self.values)}, ignored is {_ranges(self.ignored) or 'nothing'} (`mask_values`, "
                "`ignored_mask_values` of a training run)."
            )
        return torch.from_numpy(labels.astype(self.dtype))

    @cached_property
    def _table(self) -> np.ndarray:
        table = np.full(2**16 + 1, _UNKNOWN, dtype=np.int32)  # the last for values beyond 16 bits
        table[list(self.values)] = np.arange(len(self.values))
        table[list(self.ignored)] = self.ignore_index
        return table

    def are_known(self, rows: Rows, column: str) -> bool:
        """Whether there are masks; only the first image is asked, since masks are files."""
        first = next(iter(rows.take(1)), None)
        return first is not None and first[column] is not None

    def strata(self, rows: Rows, column: str) -> np.ndarray:
        """A group for each image, of which held-out images are to be a fair sample: one group, as masks have all."""
        return np.zeros(len(rows), dtype=np.int64)

    def transformed(self, transform: Any, image: Image.Image, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return transform(image, mask)


_UNKNOWN = np.iinfo(np.int32).min


def as_mask_split(
    rows: Rows, name: str, labels: MaskLabels, image_column: str | None = None, label_column: str | None = None
) -> ImageSplit:
    """
    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): data with a column of images and one of masks.
        name (`str`): name of the data.
        labels (`MaskLabels`): the classes of the masks.
        image_column, label_column (`str`, *optional*): by default the columns of images, of which that of masks is
            called "annotation", "mask", "label", "labels" or "segmentation".

    Raises:
        ValueError: if a column is missing or ambiguous.
    """
    features = rows.features or {}
    pictures = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    masks = [column for column in pictures if column in MASK_COLUMNS and column != image_column]
    label_column = column_of("label_column", label_column, masks, features, name)
    others = [column for column in pictures if column != label_column]
    image_column = column_of("image_column", image_column, others, features, name)
    rows, image_column = as_images(rows, name, image_column)
    rows = rows.cast_column(label_column, datasets.Image(decode=False))
    rows = rows.select_columns([image_column, label_column])
    return ImageSplit(rows, image_column, label_column, list(labels.names), name, labels)


def load_mask_folders(folder: str | Path, image_files: str, mask_files: str) -> dict[str, datasets.Dataset]:
    """
    The splits of a folder that holds images and masks in trees of their own, with the columns "image" and "annotation".

    Args:
        folder (`str` or `Path`): the data.
        image_files, mask_files (`str`):
            Patterns of their paths below it, with `{split}` where the name of the split stands and with the wildcard
            `*`. An image and a mask belong together if split and wildcards stand for the same text. ADE20K has
            `images/{split}/*.jpg` and `annotations/{split}/*.png`; Cityscapes
            `leftImg8bit/{split}/*/*_leftImg8bit.png` and `gtFine/{split}/*/*_gtFine_labelIds.png`.

    Raises:
        ValueError: if there are no images, an image has no mask, or a pattern is not as described.
    """
    images, masks = (_files(Path(folder), pattern) for pattern in (image_files, mask_files))
    if not images:
        raise ValueError(f"`{folder}` has no images {image_files}.")
    missing = sorted(images[key] for key in images.keys() - masks.keys())
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(images)} images in `{folder}` have no mask {mask_files}; the first is "
            f"{missing[0]}."
        )
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    splits: dict[str, dict[str, list[str]]] = {}
    for key in sorted(images):
        rows = splits.setdefault(key[0], {"image": [], "annotation": []})
        rows["image"].append(str(images[key]))
        rows["annotation"].append(str(masks[key]))
    return {
        name: datasets.Dataset.from_dict(rows, features=features, split=datasets.NamedSplit(name))
        for name, rows in splits.items()
    }


def _files(folder: Path, pattern: str) -> dict[tuple[str, ...], Path]:
    """The files of a pattern, by the split and what the wildcards stand for."""
    if pattern.count("{split}") != 1:
        raise ValueError(f"A pattern of files must have `{{split}}` once, got {pattern!r}.")
    found = {}
    words = "".join(
        "(?P<split>[^/]+)" if part == "{split}" else "([^/]*)" if part == "*" else re.escape(part)
        for part in re.split(r"(\{split\}|\*)", pattern)
    )
    for path in folder.glob(pattern.replace("{split}", "*")):
        match = re.fullmatch(words, path.relative_to(folder).as_posix())
        if match is not None:
            split = match["split"]
            position = match.re.groupindex["split"]
            found[(split, *(text for index, text in enumerate(match.groups(), 1) if index != position))] = path
    return found


def read_label_names(words: Sequence[str]) -> tuple[str, ...]:
    """
    Names of classes: `words` themselves; or, of a single word that is a file, its lines, or, of JSON, a list or an
    object from indices to names.

    Raises:
        ValueError: if the file cannot be read so.
    """
    if len(words) != 1 or not Path(words[0]).is_file():
        return tuple(words)
    path = Path(words[0])
    text = path.read_text(encoding="utf-8")
    if path.suffix.lower() != ".json":
        return tuple(line.strip() for line in text.splitlines() if line.strip())
    try:
        found = json.loads(text)
        if isinstance(found, dict):
            found = [found[str(index)] for index in range(len(found))]
        return tuple(str(name) for name in found)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must hold a JSON list of names, or an object from 0, 1, … to names.") from error


def read_mask_values(words: Sequence[str]) -> tuple[int, ...]:
    """Values of masks, such as 1, 2, 3 and 7 from `["1-3", "7"]`; `ValueError` for other words."""
    values: list[int] = []
    for word in map(str, words):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"Values of masks must be numbers or ranges such as 1-150, got {word!r}.")
        values += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(values)


def _ranges(values: Sequence[int]) -> str:
    """Values in words, with runs as ranges: "0-2, 5"."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
