"""
The images that a run is trained on, those that its best epoch is chosen by, and those that are reported.

Accuracy on the images that the best epoch was chosen by is optimistic. So for data without a validation split, images
are held out of the training split to choose by, and the test split is measured once, at the end.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..data import ImageSplit, Rows, find_split
from .config import TrainingConfig


# Not the run's seed: runs with different seeds are then comparable, and a run that starts from the model of another one
# holds out the same images, which neither was trained on.
HOLD_OUT_SEED = 0
ONE_HALF = "one half"
VALIDATION_SPLITS = ("validation", "val")


@dataclass(frozen=True)
class TrainingData:
    """
    The splits that a run reads, with the same labels.

    Attributes:
        train: to train on.
        evaluation: measured after epochs; the best epoch is chosen by it.
        id2label: names of the labels.
        test: measured once, at the end; `None` if `evaluation` is reported instead.
        selected_on: name of the images in `evaluation`, for reports.
        split: name of the images that are reported.
    """

    train: ImageSplit
    evaluation: ImageSplit
    id2label: dict[int, str]
    test: ImageSplit | None
    selected_on: str
    split: str

    @property
    def summary(self) -> str:
        if self.selected_on == self.split:
            return f"the best epoch is chosen by the images that are reported (`{self.split}`)"
        return f"the best epoch is chosen by `{self.selected_on}`; `{self.split}` is measured once, at the end"


def selection_split(config: TrainingConfig, splits: Mapping[str, Rows]) -> str | None:
    """
    Name of the split to choose the best epoch by; `None` if images are to be held out of the training split.

    Raises:
        ValueError: if there is no such split, or the data are a stream and have no validation split.
    """
    if config.eval_split is not None:
        find_split(splits, config.eval_split, config.dataset)
        return config.eval_split
    candidates = VALIDATION_SPLITS if config.validation_fraction else (*VALIDATION_SPLITS, "test")
    found = [name for name in candidates if name in splits and name != config.train_split]
    if found:
        return found[0]
    if not config.validation_fraction:
        find_split(splits, None, config.dataset, candidates)
        raise ValueError(f"`{config.dataset}` has nothing but its training split to evaluate on: name an `eval_split`.")
    if config.streaming:
        raise ValueError(
            f"`{config.dataset}` has no validation split to choose the best epoch by (it has {list(splits)}), and no "
            "images can be held out of a stream: name an `eval_split` (with `test`, the best epoch is chosen by the "
            "images that are reported), or download the data instead."
        )
    return None


def reported_split(config: TrainingConfig, splits: Mapping[str, Rows], selected_on: str | None) -> str | None:
    """
    Name of the split to measure once, at the end, if it has labels; `None` to report the images that the best epoch is
    chosen by.

    Raises:
        ValueError: if there is no such split, or it is the one that images are held out of.
    """
    if config.test_split is not None:
        find_split(splits, config.test_split, config.dataset)
        if selected_on is None and config.test_split == config.train_split:
            raise ValueError(
                f"`test_split` is {config.test_split!r}, which the run learns from except for the images held out of "
                "it. Name another split, or leave `test_split` out."
            )
        return None if config.test_split == selected_on else config.test_split
    return "test" if "test" in splits and "test" not in (selected_on, config.train_split) else None


def held_out_from(train_split: str) -> str:
    """The name of images held out of the training split."""
    return f"held out from {train_split}"


def one_half(selected_on: str) -> str:
    """The name of one half of the images of that name; the other is that of `other_half`."""
    images = f"the images {selected_on}" if selected_on.startswith("held out") else selected_on
    return f"{ONE_HALF} of {images}"


def other_half(half: str) -> str:
    """The name of the other half, from that of `one_half`."""
    return half.replace(ONE_HALF, "the other half", 1)


def hold_out(split: ImageSplit, fraction: float, most: int | None = None) -> tuple[ImageSplit, ImageSplit]:
    """
    Divide a split into training images and held out images: a random `fraction` of each label's images, at least one
    image in all, and the same ones in every run. Smaller fractions give subsets. Both parts are in the split's order.

    Args:
        split (`ImageSplit`): not a stream.
        fraction (`float`): above 0 and below 1.
        most (`int`, *optional*): return at most so many of the held out images, again spread over the labels.

    Raises:
        ValueError: if nothing would be left to train on.
    """
    labels = split.labels.strata(split.rows, split.label_column)
    count, held_out = len(labels), math.ceil(fraction * len(labels))
    if held_out >= count:
        raise ValueError(
            f"Holding {held_out} of the {count} training images of `{split.name}` out leaves none to train on: lower "
            "`validation_fraction`, or name an `eval_split`."
        )
    ranking = stratified_ranking(labels)
    parts = ranking[held_out:], ranking[:held_out][:most]
    return tuple(replace(split, rows=split.rows.select(np.sort(part))) for part in parts)


def stratified_ranking(labels: np.ndarray) -> np.ndarray:
    """
    All indices in a fixed random order of which every prefix has about the same shares of labels as the whole: the i-th
    (from 0) of the n images of a label is placed at (i + 1/2) / n of the order.

    Args:
        labels (`np.ndarray` of shape `(num_images,)`): the label of each image.
    """
    # NumPy guarantees that the numbers of `RandomState` never change; those of newer generators may.
    shuffled = np.random.RandomState(HOLD_OUT_SEED).permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, first, counts = np.unique(labels[by_label], return_index=True, return_counts=True)
    position = np.empty(len(labels))
    position[by_label] = (np.arange(len(labels)) - np.repeat(first, counts) + 0.5) / np.repeat(counts, counts)
    return shuffled[np.argsort(position[shuffled], kind="stable")]
