"""Names of a converted model's classes: from its files, or ImageNet-1K's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..families.official import Checkpoint
from ..models.configuration_labels import complete_labels


def imagenet_1k_classes() -> list[str]:
    """The 1000 names of ImageNet-1K in the order of the official checkpoints, as `ILSVRC/imagenet-1k` spells them."""
    return Path(__file__).with_name("imagenet_1k_classes.txt").read_text(encoding="utf-8").splitlines()


def label_fields(checkpoint: Checkpoint, num_labels: int, overrides: Mapping[str, Any]) -> dict[str, dict]:
    """
    `id2label` and `label2id`: from `overrides`, else from the files, else ImageNet-1K's if there are 1000 classes.

    Args:
        checkpoint (`Checkpoint`): whose `config.json` may name the classes.
        num_labels (`int`): classes of the classifier.
        overrides: fields of the configuration that the caller states.

    Raises:
        ValueError: if the overrides contradict each other, or the names are not one string for each class.
    """
    id2label, label2id = overrides.get("id2label"), overrides.get("label2id")
    if id2label is not None or label2id is not None:
        for field, given in (("id2label", id2label), ("label2id", label2id)):
            if given is not None and not isinstance(given, Mapping):
                raise ValueError(f"`{field}` must be a dict, got {_described(given)}.")
        if id2label is not None:
            _check(list(id2label.values()), num_labels, "`id2label`", checkpoint)
        else:
            _check(list(label2id), num_labels, "`label2id`", checkpoint)
        return complete_labels(overrides)
    names = checkpoint.config.get("label_names")
    if names is not None:
        _check(names, num_labels, "`label_names` of its config.json", checkpoint)
    elif num_labels == len(classes := imagenet_1k_classes()):
        names = classes
    return {} if names is None else complete_labels({"id2label": dict(enumerate(names))})


def _check(names: Any, num_labels: int, field: str, checkpoint: Checkpoint) -> None:
    expected = f"a name for each of the {num_labels} classes of {checkpoint.path}"
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        wrong = next((name for name in names if not isinstance(name, str)), names) if isinstance(names, list) else names
        raise ValueError(f"{field} must be strings, {expected}, got {_described(wrong)}.")
    if len(names) != num_labels:
        raise ValueError(f"{field} must be {expected}, got {len(names)} names.")


def _described(value: Any) -> str:
    return f"{type(value).__name__} {repr(value)[:60]}"
