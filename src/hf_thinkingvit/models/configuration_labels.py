"""Completes `id2label` and `label2id` of a configuration if only one of them, or the number of labels, is given."""

from collections import Counter
from collections.abc import Mapping
from typing import Any


def label2id_of(id2label: Mapping[int, str]) -> dict[str, int]:
    """
    The inverse of `id2label`. Names that several classes share are left out, so that looking one up is an error instead
    of silently giving the last of its classes.
    """
    counts = Counter(id2label.values())
    return {label: index for index, label in id2label.items() if counts[label] == 1}


def complete_labels(given: Mapping[str, Any]) -> dict[str, dict]:
    """
    The configuration's fields `id2label` and `label2id`, from any of them and `num_labels`.

    Args:
        given (`dict`): fields of a configuration, of which only these three are read; `None` means not given.

    Returns:
        Both fields, with Transformers' names (`LABEL_0` and so on) if only `num_labels` is given; an empty dict if none
        of the three is.

    Raises:
        ValueError: if the classes are not numbered from 0 on, or two of the three fields contradict each other.
    """
    num_labels, id2label, label2id = (given.get(name) for name in ("num_labels", "id2label", "label2id"))
    if num_labels is None and id2label is None and label2id is None:
        return {}
    for name, value in (("id2label", id2label), ("label2id", label2id)):
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"`{name}` must map classes and their names, got {type(value).__name__}: {value!r}.")
    if id2label is None:
        if label2id is not None:
            id2label = {index: label for label, index in label2id.items()}
        else:
            id2label = {index: f"LABEL_{index}" for index in range(num_labels)}
    id2label = {int(index): label for index, label in id2label.items()}
    if sorted(id2label) != list(range(len(id2label))):
        raise ValueError(
            f"`id2label` and `label2id` must number the classes from 0 to {len(id2label) - 1}, got {sorted(id2label)}."
        )
    if num_labels is not None and num_labels != len(id2label):
        raise ValueError(f"`num_labels` is {num_labels}, but `id2label` or `label2id` names {len(id2label)} classes.")
    id2label = dict(sorted(id2label.items()))
    if label2id is None:
        return {"id2label": id2label, "label2id": label2id_of(id2label)}
    for label, index in label2id.items():
        if id2label.get(int(index)) != label:
            raise ValueError(
                f"`label2id` and `id2label` contradict each other: {label!r} is class {index} in the one, and that is "
                f"{id2label.get(int(index))!r} in the other."
            )
    return {"id2label": id2label, "label2id": {label: int(index) for label, index in label2id.items()}}


__all__ = ["complete_labels", "label2id_of"]
