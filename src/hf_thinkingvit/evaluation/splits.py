"""Which split of a dataset to evaluate on, and whether a model may have been trained on it."""

import logging
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ..data import Rows, find_split, load_splits
from ..public_names import UNNAMED, public_name


logger = logging.getLogger(__name__)

ALL = "all"  # data without splits
UNKNOWN = "unknown"  # a `datasets.Dataset` without `split`
CANDIDATES = ("validation", "test", "val")

_FILES_OF_IMAGES = (".parquet", ".arrow", ".zip", ".tar", ".tar.gz", ".tgz")
# A split must be the whole name: "Bullet Train" and "Test Tube" are classes of images.
_KINDS = {
    "training": "training|train",
    "validation": "validation|valid|val|dev",
    "test": "evaluation|eval|testing|test",
}
_SPLIT = "|".join(_KINDS.values())
_FILLER = r"set|data|images?|imgs?|jpe?gs?|split|\d"
_ONLY_SPLIT = re.compile(rf"(?:{_SPLIT}|{_FILLER}|[\W_])+")
# Or it ends a data set's name, after a separator other than a space: "cifar10-train", "pets_trainset-0".
_LAST_IS_SPLIT = re.compile(rf".+?[-_.](?P<last>(?:{_SPLIT}|{_FILLER})+?)(?:[-_.]?\d)*")
_WORD = re.compile("|".join(f"(?P<{kind}>{words})" for kind, words in _KINDS.items()))
_SHARD = re.compile(r"[-_.]\d+-of-\d+(-[0-9a-f]{16})?$")  # as `datasets` writes them
_SUFFIX = re.compile(f"({'|'.join(map(re.escape, _FILES_OF_IMAGES))})$")
_GENERIC = ("dataset", "imagefolder", "folder", "parquet", "arrow", "webdataset")  # some are `datasets`' readers
_WAY_OUT = (
    'Where the model was not trained on these images, `split="all"` (`--split all`) evaluates on all of them; '
    '`split="train"` does so as on training images.'
)
_LISTED = 64  # entries to read per sub-folder: a folder of one class may hold thousands of images


def evaluation_rows(
    dataset: Any, split: str | None = None, streaming: bool = False, trained_on: Mapping[str, str] | None = None
) -> tuple[Rows, str]:
    """
    The images to evaluate on, and the name of their split.

    Args:
        dataset (`str`, `datasets.Dataset` or `datasets.IterableDataset`): as in
            [`~hf_thinkingvit.evaluation.evaluate_thresholds`].
        split (`str`, *optional*): the split to read; for a dataset given as an object, the name of its split.
        streaming (`bool`): read a stream.
        trained_on (`dict`, *optional*): the `training_data` of a model's configuration. Without `split`, a split that
            had no part in making the model is preferred.

    Returns:
        The rows, and the name of their split: `split` if given; `"all"` for a folder or Parquet file without splits;
        for a `datasets.Dataset` its own `split`, or `"unknown"`. `datasets` calls data without splits "train". Here
        they count as training images only if a whole name says so (`train_images`, `pets-train.parquet`; not
        `Bullet Train`): the name of the data or of the folder that holds them (as written, and with links resolved), of
        a folder in the first two levels below, of a Parquet file or of an archive. `split="all"` reads all images,
        whatever the names.

    Raises:
        ValueError: if there is no such split; if `split` is not given and there are neither validation nor test images;
            if `datasets` reads folders that are named after several splits (`Training`, `Testing`) as one split, unless
            `split="all"`.
    """
    if not isinstance(dataset, str):
        named = split or getattr(dataset, "split", None)
        return dataset, str(named) if named else UNKNOWN
    splits = load_splits(dataset, streaming)
    said = None
    if list(splits) == ["train"]:
        if split == ALL:
            return splits["train"], ALL
        _check_not_merged(dataset)
        if split is None:
            said = _says_train(dataset)
            if said is None:
                return splits["train"], ALL
    if split is None and not any(candidate in splits for candidate in CANDIDATES):
        raise ValueError(
            f"`{dataset}` has none of the splits {', '.join(CANDIDATES)}, only {', '.join(splits)}"
            + (f" ({said})" if said else "")
            + ": name the one to evaluate on (`split`). Training images tell nothing of how a model does on others."
            + (f" {_WAY_OUT}" if said else "")
        )
    candidates = [candidate for candidate in CANDIDATES if candidate in splits]
    new = [candidate for candidate in candidates if why_not_new(trained_on, dataset, candidate) is None]
    wanted = split or (new or candidates)[0]
    return find_split(splits, wanted, dataset), wanted


def why_not_new(trained_on: Mapping[str, str] | None, dataset: Any, split: str) -> str | None:
    """
    How images were used in making a model, in words; `None` if no use is recorded.

    Args:
        trained_on (`dict`, *optional*): the `training_data` of the model's configuration: `dataset` (a public name),
            `split` (that it was trained on) and `selected_on` (by which its best epoch was chosen).
        dataset (`str` or object of `datasets`): the data set of the images, compared by name (see [`same_data`]).
        split (`str`): their split, such as `"test[:50%]"` or `"train+test"`; `"all"` and `"unknown"` match any split.
    """
    if not trained_on or not same_data(trained_on.get("dataset"), dataset):
        return None
    learned, selected = str(trained_on.get("split") or ""), str(trained_on.get("selected_on") or "")
    parts = _parts(split)
    whole = bool(parts & {ALL, UNKNOWN})
    if whole or learned.lower() in parts:
        return f"the model was trained on split {learned!r} of data called `{trained_on['dataset']}`"
    if selected.lower() in parts:
        return f"the best epoch of the model was chosen by split {selected!r} of data called `{trained_on['dataset']}`"
    return None


def may_share_images(one: str, other: str) -> bool:
    """
    Whether two splits of the same data can have images in common, by their names: slices of one split may, and `"all"`
    and `"unknown"` with any.
    """
    parts, others = _parts(one), _parts(other)
    return bool(parts & others or (parts | others) & {ALL, UNKNOWN})


def _parts(split: str) -> set[str]:
    """The names of the splits in a slice or sum of splits."""
    return {part.partition("[")[0].strip().lower() for part in split.split("+")}


def warn_if_not_new(trained_on: Mapping[str, str] | None, dataset: Any, split: str) -> str | None:
    """The same, and a warning of such images, and of those that are called training images."""
    seen = why_not_new(trained_on, dataset, split)
    if seen or is_training_split(split):
        logger.warning(
            "The images of split %r are not new to the model (%s): on them it does better than on others.",
            split,
            seen or "they are called training images",
        )
    return seen


def same_data(recorded: str | None, dataset: Any) -> bool:
    """
    Whether a public name and a name, path or object of `datasets` are the same data set, by their names. Publisher and
    location make no difference, unless the name is generic (`data`, `images`, `train`): it then matches only the same
    Hub id, or a path that ends in the same name (which may be other data).
    """
    is_path = isinstance(dataset, str)
    if not is_path:
        dataset = getattr(getattr(dataset, "info", None), "dataset_name", None)
    if not recorded or not dataset:
        return False
    name = public_name(dataset)
    if name == UNNAMED:
        return False
    last = recorded.rpartition("/")[2]
    if _letters(last) == "":
        return False
    if _is_generic(last):
        return recorded == name and ("/" in recorded or is_path)
    return _letters(name.rpartition("/")[2]) == _letters(last)


def _letters(name: str) -> str:
    """`name` in lower case without punctuation, which `datasets` changes in names."""
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", name).lower())


def _is_generic(name: str) -> bool:
    name = _stem(name)
    return name in _GENERIC or _ONLY_SPLIT.fullmatch(name) is not None


def _stem(name: str) -> str:
    return _SHARD.sub("", _SUFFIX.sub("", name.lower()))


def _kind(name: str) -> str | None:
    """The split that a folder or file is named after: `"training"` also for `trainval`; `None` if it is no split."""
    name = _stem(name)
    if not _ONLY_SPLIT.fullmatch(name):
        found = _LAST_IS_SPLIT.fullmatch(name)
        if found is None:
            return None
        name = found["last"]
    kinds = {found.lastgroup for found in _WORD.finditer(name)}
    return next((kind for kind in _KINDS if kind in kinds), None)


def is_training_split(split: str) -> bool:
    """Whether a split has training images, by its name: `"train"`, `"train[:10%]"`, `"trainval"`, `"test+train"`."""
    return any(part.strip().lower().startswith("train") for part in split.split("+"))


def _says_train(dataset: str) -> str | None:
    """
    Why the single split of `dataset` must be one of training images, in words; `None` if "train" may be only what
    `datasets` calls data without splits. The name of the folder that holds the data counts, unless the data's own name
    says validation or test; the names of folders further up do not.
    """
    path = Path(dataset)
    if not path.exists():  # on the Hub, the publisher has named the split
        return "so its publisher calls them"
    written, resolved = Path(os.path.abspath(path)), Path(os.path.realpath(path))
    own = [written.name, resolved.name]
    held_out = any(_kind(name) in ("validation", "test") for name in own)
    above = [] if held_out else [written.parent.name, resolved.parent.name]
    for name in (*own, *above, *_names_below(path)):
        if _kind(name) == "training":
            return f"the name {name!r} says training images"
    if (path / "README.md").is_file():
        return "its README.md can name splits"
    return None


def _check_not_merged(dataset: str) -> None:
    """Refuse folders and files that are named after several splits, which `datasets` has read as one."""
    path = Path(dataset)
    if not path.is_dir() or (path / "README.md").is_file():  # README.md can name the splits
        return
    found: dict[str, str] = {}
    for name in _names_below(path):
        kind = _kind(name)
        if kind is not None:
            found.setdefault(kind, name)
    if len(found) > 1:
        raise ValueError(
            f"`{dataset}` holds folders or files named after several splits "
            f"({', '.join(sorted(set(found.values())))}), but `datasets`, which knows train, validation and test in "
            "lower case, reads all of it as one. Give the one folder or file to evaluate on as the dataset, or rename "
            'them. If the model was trained on none of these images, `split="all"` (`--split all`) evaluates on all.'
        )


def _names_below(path: Path) -> Iterator[str]:
    """Names of folders in the first two levels, and of Parquet files and archives there, without listing all images."""
    if not path.is_dir():
        return
    with os.scandir(path) as entries:
        first = [(entry.name, entry.path, entry.is_dir()) for entry in entries]
    for name, place, is_folder in sorted(first):
        if is_folder:
            yield name
            with os.scandir(place) as entries:
                for entry in islice(entries, _LISTED):
                    if entry.is_dir() or entry.name.lower().endswith(_FILES_OF_IMAGES):
                        yield entry.name
        elif name.lower().endswith(_FILES_OF_IMAGES):
            yield name
