"""Whether an answer is right, where a dataset's labels are not simply the model's classes."""

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedConfig

from ..models.config_checks import configured_problem_type


def check_single_label(config: PreTrainedConfig) -> None:
    """`ValueError` if the model does not choose one class, so that top-1 and top-5 would measure nothing."""
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
        config (`PreTrainedConfig`): the model's, with `label2id`.
        label_names (`list[str]`, *optional*): the dataset's. Without them its labels are the model's class indices; an
            image may then have several (ImageNet-ReaL), or none, and is left out.
        label_map (`dict` or `"index"`, *optional*): from the dataset's names (or indices) to the model's names (or
            indices), where they differ (ImageNet-A, -R, -Sketch). `"index"` says that both number the same classes.
            Names that are numbers, as ImageNet-V2's folders are, are class indices without being told.
        restrict (`bool`, *optional*): judge only among the classes that the dataset has, as is usual for ImageNet-A and
            -R. By default where the dataset has fewer classes than the model. Exits are not affected.
        name (`str`): of the dataset, for messages.

    Raises:
        ValueError: if a label of the dataset is no class of the model, or the model is not for single-label
            classification.
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
            classes = [self._class_of(index, label, config, label_map) for index, label in enumerate(label_names)]
            unknown = [label for label, found in zip(label_names, classes) if found is None]
            if unknown:
                raise ValueError(
                    f"{len(unknown)} labels of {name} are no classes of the model, such as {unknown[:3]} (the model "
                    f"has such as {list(config.label2id)[:3]}): give a `label_map` from the ones to the others, or "
                    '"index" if both number the same classes.'
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

    def _class_of(
        self, index: int, label: str, config: PreTrainedConfig, label_map: Mapping | str | None
    ) -> int | None:
        found = label
        if label_map == "index":
            found = index
        elif isinstance(label_map, Mapping):
            found = label_map.get(label, label_map.get(index))
        if isinstance(found, str):
            found = config.label2id.get(found, int(found) if found.isdecimal() else None)
        return found if found is not None and 0 <= found < self.num_classes else None

    def hits(self, logits: torch.Tensor, labels: torch.Tensor, top_k: int) -> torch.Tensor:
        """
        Args:
            logits (`torch.Tensor` of shape `(batch, num_labels)`): answers.
            labels (`torch.LongTensor` of shape `(batch,)`, or `(batch, most labels of an image)` filled with -1).
            top_k (`int`): how many of the answer's best classes count.

        Returns:
            `torch.BoolTensor` of shape `(batch,)`: whether one of them is right.

        Raises:
            ValueError: for a label that is no class.
        """
        labels = labels[:, None] if labels.dim() == 1 else labels
        limit = self.num_classes if self.table is None else len(self.table)
        if ((labels < -1) | (labels >= limit)).any():
            raise ValueError(f"{self.name} has labels outside 0 to {limit - 1}: {labels.unique().tolist()[:10]}.")
        targets = labels
        if self.table is not None:
            targets = torch.where(labels < 0, -1, self.table.to(labels.device)[labels.clamp(min=0)])
        if self.excluded is not None:
            logits = logits.masked_fill(self.excluded.to(logits.device), float("-inf"))
        best = logits.topk(min(top_k, self.num_classes), dim=-1).indices
        return (best[:, :, None] == targets[:, None, :]).any(dim=(1, 2))

    @staticmethod
    def counted(labels: torch.Tensor) -> torch.Tensor:
        """Which images have a label at all, bool `(batch,)`."""
        return (labels if labels.dim() == 1 else labels.amax(dim=1)) >= 0
