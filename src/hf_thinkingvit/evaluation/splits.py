"""Which images a figure is of: the split that is read, and whether a model may have been trained on it."""

import os
import re
from pathlib import Path
from typing import Any

from ..data import Rows, find_split, load_splits


ALL = "all"  # of data that have no splits
UNKNOWN = "unknown"  # of a `datasets.Dataset` that does not say
CANDIDATES = ("validation", "test", "val")

# As `datasets` finds splits in the names of files and folders.
_NAMED_TRAINING = re.compile(r"(^|[-._ 0-9])train(ing)?([-._ 0-9]|$)")


def evaluation_rows(dataset: Any, split: str | None = None, streaming: bool = False) -> tuple[Rows, str]:
    """
    The images to evaluate on, and the name of their split.

    Args:
        dataset (`str`, `datasets.Dataset` or `datasets.IterableDataset`): as in
            [`~hf_thinkingvit.evaluation.evaluate_thresholds`].
        split (`str`, *optional*): the split to read; of a dataset that is no name, what its images are called.

    Returns:
        The rows, and their split: as named; `"all"` for a folder or Parquet file that has no splits; for a
        `datasets.Dataset` its own `split`, or `"unknown"`. `datasets` calls data without splits "train"; only where
        the name of a file or folder says so does it count as training data here.

    Raises:
        ValueError: if there is no such split, or none was named and there are only others, such as training images.
    """
    if not isinstance(dataset, str):
        named = split or getattr(dataset, "split", None)
        return dataset, str(named) if named else UNKNOWN
    splits = load_splits(dataset, streaming)
    if split in (None, ALL) and list(splits) == ["train"] and not _says_train(dataset):
        return splits["train"], ALL
    if split is None and not any(candidate in splits for candidate in CANDIDATES):
        raise ValueError(
            f"`{dataset}` has none of the splits {', '.join(CANDIDATES)}, only {', '.join(splits)}: name the one to "
            "evaluate on (`split`). Training images tell nothing of how a model does on others."
        )
    wanted = split or next(candidate for candidate in CANDIDATES if candidate in splits)
    return find_split(splits, wanted, dataset), wanted


def is_training_split(split: str) -> bool:
    """Whether a split is of training images, by its name: `"train"`, `"train[:10%]"`, `"trainval"`, `"test+train"`."""
    return any(part.strip().lower().startswith("train") for part in split.split("+"))


def _says_train(dataset: str) -> bool:
    """Whether the single split of `dataset` is one of training images by its name, and not only by convention."""
    path = Path(dataset)
    if not path.exists():  # on the Hub, who publishes a single split "train" means it
        return True
    if _NAMED_TRAINING.search(os.path.basename(os.path.abspath(path))):
        return True
    if (path / "README.md").is_file():  # which can name the splits
        return True
    return any(_NAMED_TRAINING.search(name) for _, folders, files in os.walk(path) for name in (*folders, *files))
