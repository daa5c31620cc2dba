"""Matches the labels of the data with those of a starting point or of a teacher."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple


LABEL_MAPS = ("name", "index")


class LabelMatch(NamedTuple):
    """
    Attributes:
        order: for each label, the index of the matching class of the other model.
        by_number: whether labels were matched by index, because names are missing or were not to be compared.
    """

    order: tuple[int, ...]
    by_number: bool

    @property
    def same_order(self) -> bool:
        return self.order == tuple(range(len(self.order)))


def label_names(id2label: Mapping[int, str]) -> list[str]:
    """The names, in the order of their indices."""
    return [id2label[index] for index in sorted(id2label)]


def match_labels(names: Sequence[str], other: Sequence[str], label_map: str = "name") -> LabelMatch | None:
    """
    Find the class of another model for each label.

    Names match regardless of case, underscores and further synonyms ("tench" and "Tench, Tinca tinca"), as long as each
    matches one class only. Names such as `LABEL_3`, which Transformers makes up for models without names, carry no
    information: such classes are matched by index, and a label whose name is a number is then the class of that
    index, as in [`~hf_thinkingvit.evaluation.LabelMap`] (folders "0", "1", "10" are labels 0, 1, 2, but not classes).

    Args:
        names, other (`list[str]`): the names of the labels and of the other model's classes, in order.
        label_map (`str`): `"name"`, or `"index"` to match by index whatever the names are, except names that are
            numbers.

    Returns:
        `LabelMatch`; `None` if the classes are not the same, or their numbers differ.
    """
    count = len(names)
    if count != len(other):
        return None
    plain, plain_other = ([_normalised(name) for name in some] for some in (names, other))
    order = _order_by_name(plain, plain_other)
    numbers = sorted(map(str, range(count)))
    numbered, numbered_other = sorted(plain) == numbers, sorted(plain_other) == numbers
    by_number = label_map == "index"
    if order is not None and (not by_number or numbered):
        return LabelMatch(order, by_number)
    if numbered and (by_number or _nameless(other)):
        return LabelMatch(tuple(map(int, plain)), by_number=True)
    if numbered_other and (by_number or _nameless(names)):
        return LabelMatch(tuple(plain_other.index(str(index)) for index in range(count)), by_number=True)
    if by_number or _nameless(other) or _nameless(names):
        return LabelMatch(tuple(range(count)), by_number=True)
    return None


def known_labels(names: Sequence[str], other: Sequence[str], label_map: str = "name") -> dict[int, int]:
    """
    The labels that another model knows, also where its other classes are different ones: for the index of each, that
    of the class.

    Args:
        names, other (`list[str]`), label_map (`str`): as for `match_labels`, whose match is returned if there is one.
            Else labels are matched by name only: with the class of the same name, or the only one with a common
            synonym. A label or class that is not the only one of its name is left out.
    """
    match = match_labels(names, other, label_map)
    if match is not None:
        return dict(enumerate(match.order))
    if label_map == "index" or _nameless(names) or _nameless(other):
        return {}
    plain, plain_other = ([_normalised(name) for name in some] for some in (names, other))
    places, places_other = _places(plain), _places(plain_other)
    found = {places[name][0]: places_other[name][0] for name in plain if _only(places, places_other, name)}
    left = [index for index in range(len(other)) if index not in found.values()]
    for index in range(len(names)):
        if index not in found:
            common = [each for each in left if _synonyms(names[index]) & _synonyms(other[each])]
            if len(common) == 1:
                found[index] = common[0]
    classes = list(found.values())
    return {index: found[index] for index in sorted(found) if classes.count(found[index]) == 1}


def _only(places: Mapping[str, list[int]], places_other: Mapping[str, list[int]], name: str) -> bool:
    return len(places[name]) == len(places_other.get(name, ())) == 1


def _order_by_name(names: list[str], other: list[str]) -> tuple[int, ...] | None:
    """
    The index in `other` that each name matches: of the equal name, else of the only remaining name with a common
    synonym. If several remain (ImageNet has "maillot" and "maillot, tank suit", and lists of short names have "maillot"
    twice), the one at the same index is taken, provided that all names are in the same order and at least half of them
    match without it. `None` if there is no such pairing. Both lists are normalised and equally long.
    """
    places, places_other = _places(names), _places(other)
    order: dict[int, int] = {}
    by_place = 0
    repeated = False  # several classes have the same name and are matched by their indices
    for name, indices in places.items():
        if indices == places_other.get(name) or len(indices) == len(places_other.get(name, [])) == 1:
            order.update(zip(indices, places_other[name]))
            repeated |= len(indices) > 1
    left = set(range(len(other))) - set(order.values())
    with_synonym: dict[str, set[int]] = defaultdict(set)
    for index in left:
        for synonym in _synonyms(other[index]):
            with_synonym[synonym].add(index)
    for index in set(range(len(names))) - order.keys():
        synonyms = _synonyms(names[index])
        candidates = set().union(*(with_synonym.get(synonym, ()) for synonym in synonyms))
        if len(candidates) > 1 and index in candidates:
            here = _synonyms(other[index])
            if synonyms <= here or here <= synonyms:
                candidates, by_place = {index}, by_place + 1
        if len(candidates) != 1:
            return None
        order[index] = candidates.pop()
    found = tuple(order[index] for index in range(len(names)))
    if len(set(found)) != len(found) or 2 * by_place > len(found):
        return None
    return None if (repeated or by_place) and found != tuple(range(len(found))) else found


def _places(names: list[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        places[name].append(index)
    return dict(places)


def first_difference(names: Sequence[str], other: Sequence[str]) -> tuple[int, str, str]:
    """
    The first label whose two names have no synonym in common, else the first whose names differ: its index and both
    names.
    """
    pairs = list(enumerate(zip(names, other)))
    differences = [
        *((i, name, found) for i, (name, found) in pairs if not _synonyms(name) & _synonyms(found)),
        *((i, name, found) for i, (name, found) in pairs if _normalised(name) != _normalised(found)),
    ]
    return differences[0]


def _nameless(names: Sequence[str]) -> bool:
    return all(name == f"LABEL_{index}" for index, name in enumerate(names))


def _normalised(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _synonyms(name: str) -> set[str]:
    return {_normalised(part) for part in name.split(",")} - {""}
