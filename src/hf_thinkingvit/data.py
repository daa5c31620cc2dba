"""
Images and labels from anything that `datasets` reads: a Hub id, a folder of images or of Parquet files, a stream.

Images stay encoded until they are used, so that the error for a broken one can name it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from .models.image_files import as_rgb
from .public_names import is_missing_path


DIGITS = "sklearn-digits"
SAMPLE_SEED = 0  # fixed, so that measurements of several models are of the same images
Rows = datasets.Dataset | datasets.IterableDataset


class ClassLabels:
    """Labels that are one class for each image: a class index, a name, or several of them."""

    def decode(self, label: Any, image: Image.Image, where: str) -> Any:
        """The label of an image, from its entry in the column of labels; `where` is what messages call the image."""
        return label

    def are_known(self, rows: Rows, column: str) -> bool:
        """Whether images have labels; published test splits often have -1. Of a stream, only the first is read."""
        if isinstance(rows, datasets.IterableDataset):
            labels = [row[column] for row in rows.take(1)]
        else:
            labels = rows.unique(column)
        return bool(labels) and all(label is not None and label != -1 for label in labels)

    def strata(self, rows: Rows, column: str) -> np.ndarray:
        """A group for each image, of which held-out images are to be a fair sample: the label."""
        return np.asarray(rows.select_columns(column).with_format("numpy")[:][column])

    def transformed(self, transform: Any, image: Image.Image, label: Any) -> tuple[torch.Tensor, Any]:
        """The augmented image, and its label, which augmentation leaves as it is."""
        return transform(image), label


@dataclass(frozen=True)
class ImageSplit:
    """
    A split of encoded images with labels.

    Attributes:
        rows: the data, with two columns.
        image_column, label_column: names of the columns.
        label_names: name of each label; `None` if the labels are not indices with names.
        name: name of the data in messages and model cards.
        labels: what the labels are: `ClassLabels`, or [`~hf_thinkingvit.masks.MaskLabels`] where they are masks.
    """

    rows: Rows
    image_column: str
    label_column: str
    label_names: list[str] | None
    name: str
    labels: Any = ClassLabels()

    def take(self, count: int | None) -> "ImageSplit":
        """The first `count` images, all for `None`."""
        return self if count is None else replace(self, rows=self.rows.take(count))

    def sample(self, count: int | None) -> "ImageSplit":
        """
        A fixed random sample of `count` images in their order, which contains the samples of smaller counts; all for
        `None`. Random, because image folders are sorted by label. Of a stream, which has no random access, the first
        `count` images.
        """
        if count is None or isinstance(self.rows, datasets.IterableDataset):
            return self.take(count)
        drawn = np.random.default_rng(SAMPLE_SEED).permutation(len(self.rows))[:count]
        return replace(self, rows=self.rows.select(np.sort(drawn)))


def load_splits(dataset: str, streaming: bool = False) -> dict[str, Rows]:
    """
    Args:
        dataset (`str`): Hub id, folder of images (one folder a label) or of Parquet files, Parquet file, or
            "sklearn-digits".
        streaming (`bool`): read as a stream instead of downloading first.

    Raises:
        ValueError: if the dataset cannot be found; for gated and private ones, the message says how to log in.
    """
    if dataset == DIGITS:
        splits = load_digits()
        return {name: split.to_iterable_dataset() for name, split in splits.items()} if streaming else splits
    path = Path(dataset)
    if is_missing_path(dataset):
        raise ValueError(f"There is no dataset `{dataset}`: no such file or folder.")
    if path.is_dir() and not any(path.iterdir()):
        raise ValueError(f"The folder `{dataset}` is empty: there are no images in it.")
    try:
        if path.is_file():
            return datasets.load_dataset("parquet", data_files={"train": str(path)}, streaming=streaming)
        return datasets.load_dataset(dataset, streaming=streaming)
    except ConnectionError as error:
        raise ValueError(f"`{dataset}` is no folder here, and the Hub cannot be reached: {error}.") from error
    except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        if "gated" in str(error):
            raise ValueError(
                f"`{dataset}` is gated: accept its terms at https://huggingface.co/datasets/{dataset}, "
                "then log in with `hf auth login` (or set HF_TOKEN) on this machine."
            ) from error
        raise ValueError(
            f"There is no dataset `{dataset}`: it must be a Hub id, a folder of images (one folder a label) or "
            f"of Parquet files, a Parquet file, or {DIGITS!r}. If it is private, log in with `hf auth login`."
        ) from error


def find_split(splits: Mapping[str, Rows], name: str | None, dataset: str, candidates: Sequence[str] = ()) -> Rows:
    """
    The split called `name`, or the first of `candidates` that exists. `name` may be a slice, or several joined by `+`,
    as `datasets` writes them: `"train[:80%]"`, `"train[100:200]+test"`.

    Raises:
        ValueError: if there is no such split (the message lists those that exist), or a stream is to be sliced.
    """
    wanted = name or next((candidate for candidate in candidates if candidate in splits), None)
    if wanted is None:
        raise ValueError(f"`{dataset}` has none of the splits {list(candidates)}: it has {list(splits)}. Name one.")
    if wanted in splits:
        return splits[wanted]
    if "[" not in wanted and "+" not in wanted:
        raise ValueError(f"`{dataset}` has no split {wanted!r}: it has {list(splits)}.")
    if any(isinstance(rows, datasets.IterableDataset) for rows in splits.values()):
        raise ValueError(f"A stream has no slices and sums of splits, such as {wanted!r}: download the data instead.")
    try:
        parts = split_parts(splits, wanted)
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"`{dataset}` has no split {wanted!r} ({error}): it has {list(splits)}.") from error
    found = [splits[split].select(range(first, end)) for split, first, end in parts]
    return found[0] if len(found) == 1 else datasets.concatenate_datasets(found)


def split_parts(splits: Mapping[str, datasets.Dataset], name: str) -> list[tuple[str, int, int]]:
    """The split, first row and row after the last of each part of a slice or sum of splits."""
    sizes = {split: len(rows) for split, rows in splits.items()}
    parts = datasets.ReadInstruction.from_spec(name).to_absolute(sizes)
    return [(part.splitname, part.from_, part.to) for part in parts]


def num_shared_rows(splits: Mapping[str, Rows], one: str, other: str) -> int:
    """How many rows are in both of two splits, slices or sums of splits; of streams, 0 if their names differ."""
    if any(isinstance(rows, datasets.IterableDataset) for rows in splits.values()):
        return int(one == other)
    return sum(
        max(0, min(end, other_end) - max(first, other_first))
        for split, first, end in split_parts(splits, one)
        for other_split, other_first, other_end in split_parts(splits, other)
        if split == other_split
    )


def as_image_split(
    rows: Rows, name: str, image_column: str | None = None, label_column: str | None = None
) -> ImageSplit:
    """
    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): data with a column of images and one of labels.
        name (`str`): name of the data.
        image_column, label_column (`str`, *optional*): found by their types by default.

    Raises:
        ValueError: if a column is missing or ambiguous.
    """
    rows, image_column = as_images(rows, name, image_column)
    features = rows.features
    labels = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels = labels or [column for column in ("label", "labels", "fine_label") if column in features]
    if not labels and label_column is None and Path(name).is_dir():
        raise ValueError(
            f"The images of `{name}` have no labels: put them into folders, one a label, and two of them at the least."
        )
    label_column = column_of("label_column", label_column, labels, features, name)
    kind = features[label_column]
    names = kind.names if isinstance(kind, datasets.ClassLabel) else None
    return ImageSplit(rows.select_columns([image_column, label_column]), image_column, label_column, names, name)


def as_images(rows: Rows, name: str, image_column: str | None = None) -> tuple[Rows, str]:
    """The rows with images left encoded, and the name of the image column; arguments and errors of `as_image_split`."""
    features = rows.features
    if features is None:
        raise ValueError(f"`{name}` does not state its columns, which streaming needs: download it instead.")
    images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    image_column = column_of("image_column", image_column, images, features, name)
    return rows.cast_column(image_column, datasets.Image(decode=False)), image_column


def column_of(argument: str, given: str | None, candidates: list[str], features: datasets.Features, name: str) -> str:
    if given is None and len(candidates) != 1:
        what = "several columns" if candidates else "no column"
        raise ValueError(f"`{name}` has {what} for `{argument}` among {list(features)}: name it.")
    if given is not None and given not in features:
        raise ValueError(f"`{name}` has no column {given!r}: it has {list(features)}.")
    return given or candidates[0]


def load_digits() -> datasets.DatasetDict:
    """scikit-learn's 8 × 8 handwritten digits, 1257 to train on and 540 to test on, as RGB."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits = load()
    images = [Image.fromarray((pixels * 255 / 16).astype(np.uint8)).convert("RGB") for pixels in digits.images]
    parts = train_test_split(images, digits.target.tolist(), test_size=0.3, random_state=0, stratify=digits.target)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict({"image": part, "label": labels}, features=features)
            for name, part, labels in (("train", parts[0], parts[2]), ("test", parts[1], parts[3]))
        }
    )


def decode(image: dict[str, Any]) -> Image.Image:
    """An encoded image of `datasets` as RGB (see `as_rgb`)."""
    return as_rgb(datasets.Image().decode_example(image), image.get("path"))


def without_unreadable(split: ImageSplit) -> tuple[ImageSplit, list[str]]:
    """
    A split, not a stream, without the images that cannot be decoded, and the names of those. Decodes every image once.
    """

    def unreadable(index: int) -> str | None:
        image = split.rows[index][split.image_column]
        try:
            decode(image)
        except Exception as error:  # Pillow's decoders raise many types
            return f"{(image or {}).get('path') or f'image {index}'} ({error})"

    with ThreadPool() as threads:  # decoders leave the interpreter to other threads
        found = threads.map(unreadable, range(len(split.rows)))
    if not any(found):
        return split, []
    whole = [index for index, problem in enumerate(found) if problem is None]
    return replace(split, rows=split.rows.select(whole)), [problem for problem in found if problem is not None]


@dataclass
class ImageCollator:
    """
    Encoded rows to `pixel_values` and `labels` `(batch,)`, or `(batch, most)` padded with -1 if images have several
    labels or none. An image that cannot be decoded is a `ValueError` that names it.
    """

    split: ImageSplit
    processor: Any

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        images = [self._decode(row[self.split.image_column]) for row in rows]
        pixel_values = self.processor(images, return_tensors="pt")["pixel_values"]
        labels = [row[self.split.label_column] for row in rows]
        if any(isinstance(label, list) for label in labels):  # several correct labels, or none
            most = max(1, *map(len, labels))
            labels = [label + [-1] * (most - len(label)) for label in labels]
        return {"pixel_values": pixel_values, "labels": torch.tensor(labels)}

    def _decode(self, image: dict[str, Any]) -> Image.Image:
        try:
            return decode(image)
        except Exception as error:  # Pillow's decoders raise many types
            path = (image or {}).get("path") or "without a name"
            raise ValueError(
                f"An evaluation image ({path}) of `{self.split.name}` cannot be decoded: {error}. Leaving it out would "
                "change what is measured, so mend or remove it."
            ) from error


def evaluation_batches(split: ImageSplit, processor: Any, batch_size: int, num_workers: int = 0) -> DataLoader:
    """Batches of every image once, in order: `pixel_values` and `labels`. To be sharded by `Accelerator.prepare`."""
    return DataLoader(
        split.rows,
        batch_size=batch_size,
        num_workers=0 if isinstance(split.rows, datasets.IterableDataset) else num_workers,
        collate_fn=ImageCollator(split, processor),
    )
