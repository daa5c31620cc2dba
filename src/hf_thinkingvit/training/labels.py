"""Whether two models number the same classes, and in which order: of the data, a starting point and a teacher."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


LABEL_MAPS = ("name", "index")


class LabelMatch(NamedTuple):
    """
    Attributes:
        order: for each label, the other model's class of that meaning.
        by_number: whether the numbers alone say so, because names are missing or were not to be compared.
    """

    order: tuple[int, ...]
    by_number: bool

    @property
    def same_order(self) -> bool:
        return self.order == tuple(range(len(self.order)))


def label_names(id2label: Mapping[int, str]) -> list[str]:
    """Names by index."""
    return [id2label[index] for index in sorted(id2label)]


def match_labels(names: Sequence[str], other: Sequence[str], label_map: str = "name") -> LabelMatch | None:
    """
    Find for each label the class of another model that means the same.

    Names agree whatever their case, underscores and further synonyms ("tench" and "Tench, Tinca tinca"). Names such as
    `LABEL_3`, which Transformers gives where there are none, say nothing: such classes are taken by number. Labels that
    are called by a number mean the class of that number, as in [`~hf_thinkingvit.evaluation.LabelMap`].

    Args:
        names, other (`list[str]`): by index, of the labels and of the other model's classes.
        label_map (`str`): `"name"`, or `"index"` to take them by number whatever they are called.

    Returns:
        `LabelMatch`; `None` if they are not the same classes, or there are more of one than of the other.
    """
    count = len(names)
    if count != len(other):
        return None
    if label_map == "index":
        return LabelMatch(tuple(range(count)), by_number=True)
    if all(_synonyms(name) & _synonyms(found) for name, found in zip(names, other)):
        return LabelMatch(tuple(range(count)), by_number=False)
    plain, plain_other = ([_normalised(name) for name in some] for some in (names, other))
    if len(set(plain)) == count and set(plain) == set(plain_other):
        return LabelMatch(tuple(plain_other.index(name) for name in plain), by_number=False)
    if sorted(plain) == sorted(map(str, range(count))):
        return LabelMatch(tuple(map(int, plain)), by_number=True)
    if _nameless(other) or _nameless(names):
        return LabelMatch(tuple(range(count)), by_number=True)
    return None


def first_difference(names: Sequence[str], other: Sequence[str]) -> tuple[int, str, str]:
    """The first label that the two do not call alike: its index, and both names."""
    pairs = enumerate(zip(names, other))
    return next((index, name, found) for index, (name, found) in pairs if not _synonyms(name) & _synonyms(found))


def _nameless(names: Sequence[str]) -> bool:
    return all(name == f"LABEL_{index}" for index, name in enumerate(names))


def _normalised(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _synonyms(name: str) -> set[str]:
    return {_normalised(part) for part in name.split(",")} - {""}
