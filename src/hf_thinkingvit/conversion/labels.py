"""Names of a converted model's classes: from its files, or ImageNet-1K's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models.class_labels import complete_labels
from .checkpoint import Checkpoint


def imagenet_1k_classes() -> list[str]:
    """The 1000 names of ImageNet-1K in the order of the official checkpoints, as `ILSVRC/imagenet-1k` spells them."""
    return Path(__file__).with_name("imagenet_1k_classes.txt").read_text(encoding="utf-8").splitlines()


def label_fields(checkpoint: Checkpoint, num_labels: int, overrides: Mapping[str, Any]) -> dict[str, dict]:
    """
    `id2label` and `label2id`: from `overrides`, else from the files, else ImageNet-1K's where there are 1000 classes.

    Args:
        checkpoint (`Checkpoint`): whose `config.json` may name the classes.
        num_labels (`int`): of the classifier.
        overrides: fields of the configuration that the caller states; they win.

    Raises:
        ValueError: if the overrides contradict each other.
    """
    if overrides.get("id2label") is not None or overrides.get("label2id") is not None:
        return complete_labels(overrides)
    names = checkpoint.config.get("label_names")
    if names is None and num_labels == len(classes := imagenet_1k_classes()):
        names = classes
    return {} if names is None else complete_labels({"id2label": dict(enumerate(names))})
