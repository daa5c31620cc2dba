"""Matches the labels of a dataset to the classes of a model, to decide whether answers are right."""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from ..models.configuration_checks import configured_problem_type


def check_single_label(config: PreTrainedConfig) -> None:
    """`ValueError` unless the model is for single-label classification, which top-1 and top-5 accuracy assume."""
    problem_type = configured_problem_type(config)
    if problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f"Top-1 accuracy and cross-entropy are of single-label classification, but this model's `problem_type` is "
            f"{problem_type!r}: compute its loss and its metrics from `logits` or `stage_logits` of its outputs."
        )


class LabelMap:
    """
    The model's class, or classes, for each label of a dataset.

    Args:
        config (`PreTrainedConfig`): the model's, with `id2label`. `label2id` may be missing or incomplete; it may have
            further names of classes, but must not contradict `id2label`.
        label_names (`list[str]`, *optional*): the dataset's. Without them its labels are the model's class indices; an
            image may then have several (ImageNet-ReaL), or none, which leaves it out. Names must equal the model's:
            "tabby" does not match "tabby, tabby cat". If several labels or classes share a name, they are matched by
            index, or in order if both sides have equally many.
        label_map (`dict` or `"index"`, *optional*): maps the dataset's names (or indices) to the model's names (or
            indices), if they differ (ImageNet-A, -R, -Sketch). `"index"` means that both number the same classes.
            Names that are numbers, such as ImageNet-V2's folders, are read as class indices without a map.
        restrict (`bool`, *optional*): consider only the classes that the dataset has, as is usual for ImageNet-A and
            -R. By default if the dataset has fewer classes than the model. Exits are not affected.
        name (`str`): the dataset's, for messages.

    Raises:
        ValueError: if a label of the dataset matches no class of the model, or several; if the model is not for
            single-label classification.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        label_names: Sequence[str] | None = None,
        label_map: Mapping | str | None = None,
        restrict: bool | None = None,
        name: str = "the dataset",
    ):
        check_single_label(config)
        self.num_classes, self.name = config.num_labels, name
        self.table: torch.Tensor | None = None
        if label_names is not None:
            classes = self._classes(list(label_names), label_map, _classes_by_name(config))
            unknown = [label for label, found in zip(label_names, classes) if found is None]
            if unknown:
                raise ValueError(
                    f"{len(unknown)} labels of {name} match no class of the model, such as {unknown[:3]} (the model "
                    f"has classes such as {[config.id2label[index] for index in range(min(3, self.num_classes))]}): "
                    'give a `label_map` (--label-map) from labels to classes, or "index" if both are numbered alike.'
                )
            self.table = torch.tensor(classes)
        elif isinstance(label_map, Mapping):
            raise ValueError(f"`label_map` needs labels with names; those of {name} have none.")
        used = self.num_classes if self.table is None else len(self.table.unique())
        restrict = used < self.num_classes if restrict is None else restrict
        self.excluded: torch.Tensor | None = None
        if restrict and self.table is not None:
            self.excluded = torch.ones(self.num_classes, dtype=torch.bool)
            self.excluded[self.table] = False

    def _classes(
        self, label_names: list[str], label_map: Mapping | str | None, by_name: dict[str, list[int]]
    ) -> list[int | None]:
        """The class of each label of the dataset; `None` for labels that match no class."""
        if label_map == "index":
            return [index if index < self.num_classes else None for index in range(len(label_names))]
        if isinstance(label_map, Mapping):
            return [self._mapped(index, label_names, label_map, by_name) for index in range(len(label_names))]
        if label_map is not None:
            raise ValueError(f'`label_map` must be a dict or "index", got {label_map!r}.')
        places = defaultdict(list)
        for index, label in enumerate(label_names):
            places[label].append(index)
        classes: list[int | None] = [None] * len(label_names)
        for label, indices in places.items():
            candidates = by_name.get(label) or self._numbered(label)
            same_places = set(indices) & set(candidates)
            if len(same_places) == len(indices):
                candidates = indices
            elif candidates and (len(candidates) != len(indices) or same_places):
                raise ValueError(
                    f"{label!r} is the name of the labels {indices} of {self.name} and of the model's classes "
                    f"{candidates}: which is which cannot be told. Give a `label_map` (--label-map) from their indices "
                    'to the model\'s, or "index" if both number the same classes.'
                )
            for index, found in zip(indices, candidates):
                classes[index] = found
        return classes

    def _mapped(
        self, index: int, label_names: list[str], label_map: Mapping, by_name: dict[str, list[int]]
    ) -> int | None:
        """The class to which `label_map` maps one label, by its index (in JSON a string) or its name."""
        label = label_names[index]
        found = label_map.get(index, None if str(index) in label_names else label_map.get(str(index)))
        if found is None and label in label_map:
            if label_names.count(label) > 1:
                raise ValueError(
                    f"`label_map` maps {label!r}, which is the name of several labels of {self.name}: map each of them "
                    "by its index."
                )
            found = label_map[label]
        if isinstance(found, str):
            candidates = by_name.get(found) or self._numbered(found)
            if len(candidates) > 1:
                raise ValueError(
                    f"`label_map` maps {label!r} to {found!r}, which is the name of the model's classes {candidates}: "
                    "map it to the index of one."
                )
            found = candidates[0] if candidates else None
        return found if found is not None and 0 <= found < self.num_classes else None

    def _numbered(self, label: str) -> list[int]:
        """The class index that a name spells as a number, such as those of ImageNet-V2's folders; else empty."""
        return [int(label)] if label.isdecimal() and int(label) < self.num_classes else []

    def hits(self, logits: torch.Tensor, labels: torch.Tensor, top_k: int) -> torch.Tensor:
        """
        Args:
            logits (`torch.Tensor` of shape `(batch, num_labels)`): answers.
            labels (`torch.LongTensor` of shape `(batch,)`, or `(batch, max labels per image)` padded with -1).
            top_k (`int`): number of best classes that count.

        Returns:
            `torch.BoolTensor` of shape `(batch,)`: whether one of them is right. `False` if any logit is not finite,
            because the ranking is then meaningless.

        Raises:
            ValueError: if a label is outside of the dataset's classes.
        """
        labels = labels[:, None] if labels.dim() == 1 else labels
        limit = self.num_classes if self.table is None else len(self.table)
        if ((labels < -1) | (labels >= limit)).any():
            raise ValueError(f"{self.name} has labels outside 0 to {limit - 1}: {labels.unique().tolist()[:10]}.")
        targets = labels
        if self.table is not None:
            targets = torch.where(labels < 0, -1, self.table.to(labels.device)[labels.clamp(min=0)])
        finite = logits.isfinite().all(dim=-1)
        if self.excluded is not None:
            logits = logits.masked_fill(self.excluded.to(logits.device), float("-inf"))
        best = logits.topk(min(top_k, self.num_classes), dim=-1).indices
        return (best[:, :, None] == targets[:, None, :]).any(dim=(1, 2)) & finite

    @staticmethod
    def counted(labels: torch.Tensor) -> torch.Tensor:
        """Which images have at least one label, bool `(batch,)`."""
        return (labels if labels.dim() == 1 else labels.amax(dim=1)) >= 0


def _classes_by_name(config: PreTrainedConfig) -> dict[str, list[int]]:
    """For each name, the classes that have it."""
    id2label = {} if config.id2label is None else {int(index): label for index, label in config.id2label.items()}
    if not id2label or sorted(id2label) != list(range(len(id2label))):
        raise ValueError(
            "The model's `id2label` must name its classes from 0 on, got "
            f"{'nothing' if not id2label else f'names for {sorted(id2label)[:10]}'}."
        )
    by_name = defaultdict(list)
    for index in range(len(id2label)):
        by_name[id2label[index]].append(index)
    for label, index in (config.label2id or {}).items():
        if label not in by_name and 0 <= int(index) < len(id2label):
            by_name[label].append(int(index))
        elif int(index) not in by_name[label]:
            raise ValueError(
                f"The model's `label2id` says that {label!r} is class {index}, but `id2label` says "
                f"{by_name[label] or 'nothing of it'}: mend its configuration."
            )
    return dict(by_name)


def label_map_argument(text: str) -> dict[str, str | int] | str:
    """
    Parse `--label-map`, as a `type` for argparse: "index", or the content of a JSON file that maps the dataset's
    label names (or indices) to the model's.

    Raises:
        argparse.ArgumentTypeError: if it is neither.
    """
    if text == "index":
        return text
    try:
        content = json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f'{text!r} is neither "index" nor a JSON file that can be read: {error}'
        ) from error
    if not isinstance(content, dict) or not all(type(value) in (str, int) for value in content.values()):
        raise argparse.ArgumentTypeError(
            f"{text} must hold a JSON object from label names (or indices) to the model's names (or indices)."
        )
    return content
