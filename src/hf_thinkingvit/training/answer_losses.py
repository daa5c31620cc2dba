"""
The loss of each answer of a classifier, that is of the logits of one stage or of one head: cross-entropy with the
labels, blended with what a teacher or the last stage says. All of them take and return one entry per answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate.utils import reduce
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from ..evaluation.labels import check_single_label
from ..models.task_segmentation import semantic_segmentation_loss
from .distillation import Teacher, teacher_loss
from .tasks import training_task


if TYPE_CHECKING:
    from .config import TrainingConfig


@dataclass(frozen=True)
class TrainingBatch:
    """
    What losses are computed from: a micro-batch, and the model's outputs for it.

    Args:
        outputs (`ModelOutput`): the model's in training mode, called with `labels` where they are class indices.
        pixel_values (`torch.Tensor` of shape `(batch_size, channels, height, width)`): the images, for teachers.
        targets (`torch.Tensor`): class indices `(batch_size,)`, of masks `(batch_size, height, width)`, or
            probabilities `(batch_size, num_labels)`.
        step (`int`): the optimizer step.
        micro_batch (`int`): its index among those of the step.
    """

    outputs: ModelOutput
    pixel_values: torch.Tensor
    targets: torch.Tensor
    step: int
    micro_batch: int


class LabelLoss:
    """
    Cross-entropy with the labels, smoothed by `label_smoothing`, or with probabilities as mixup (arXiv 1710.09412) and
    CutMix (arXiv 1905.04899) make them, whose smoothing is in them already.

    Raises:
        ValueError: if the model is not for single-label classification.
    """

    def __init__(self, config: "TrainingConfig", model_config: PreTrainedConfig):
        check_single_label(model_config)
        self.label_smoothing = config.label_smoothing

    def __call__(self, answers: Sequence[torch.Tensor], batch: TrainingBatch) -> list[torch.Tensor]:
        smoothing = 0.0 if batch.targets.is_floating_point() else self.label_smoothing
        return [F.cross_entropy(logits.float(), batch.targets, label_smoothing=smoothing) for logits in answers]


class MaskLoss:
    """
    Cross-entropy of the logits, resized to pixels, with the labels of the pixels, smoothed by `label_smoothing`: the
    mean over the pixels that count in the micro-batches of all processes, so that it does not depend on how the images
    are shared out. Micro-batches that are accumulated weigh the same, whatever counts in them.
    """

    def __init__(self, config: "TrainingConfig", model_config: PreTrainedConfig):
        self.model_config, self.label_smoothing = model_config, config.label_smoothing

    def __call__(self, answers: Sequence[torch.Tensor], batch: TrainingBatch) -> list[torch.Tensor]:
        counted = (batch.targets != self.model_config.semantic_loss_ignore_index).sum().float()
        # DDP averages gradients over processes, each of which has the mean over its own pixels.
        share = counted / reduce(counted, reduction="mean").clamp(min=1)
        return [
            share
            * semantic_segmentation_loss(batch.targets, logits, self.model_config, label_smoothing=self.label_smoothing)
            for logits in answers
        ]


class TeacherDistillation:
    """Blends each answer's loss with the distance from a teacher's logits (arXiv 1503.02531; hard: 2012.12877)."""

    def __init__(self, config: "TrainingConfig", teacher: Teacher):
        self.teacher, self.kind = teacher, config.distillation
        self.share, self.temperature = config.distillation_weight, config.distillation_temperature

    def __call__(
        self, losses: Sequence[torch.Tensor], answers: Sequence[torch.Tensor], batch: TrainingBatch
    ) -> list[torch.Tensor]:
        target = self.teacher(batch.pixel_values)
        return [
            blend(loss, teacher_loss(logits.float(), target, self.kind, self.temperature), self.share)
            for loss, logits in zip(losses, answers)
        ]


class InPlaceDistillation:
    """
    Blends each loss but the last with the divergence from the last answer, which learns nothing from it: in-place
    distillation (arXiv 1903.05134).
    """

    def __init__(self, config: "TrainingConfig"):
        self.share, self.temperature = config.inplace_distillation, config.distillation_temperature

    def __call__(
        self, losses: Sequence[torch.Tensor], answers: Sequence[torch.Tensor], batch: TrainingBatch
    ) -> list[torch.Tensor]:
        target = answers[-1].detach()
        earlier = [
            blend(loss, teacher_loss(_rows(logits), _rows(target), "soft", self.temperature), self.share)
            for loss, logits in zip(losses[:-1], answers[:-1])
        ]
        return [*earlier, losses[-1]]


class AnswerLosses:
    """The losses above that a run has configured, one after the other."""

    def __init__(self, config: "TrainingConfig", model_config: PreTrainedConfig, teacher: Teacher | None):
        self.from_labels = training_task(config.task).label_loss(config, model_config)
        self.distillations: list = []
        if config.distillation == "hidden_states":  # that is of the sub-networks' objective
            raise ValueError('`distillation` "hidden_states" is of an elastic ViT: set "hard" or "soft".')
        if (
            teacher is not None
            and config.distillation == "tokens"
            and not getattr(model_config, "pruning_layers", None)
        ):
            raise ValueError('`distillation` "tokens" is of models with `pruning_layers`: set "hard" or "soft".')
        if teacher is not None and config.distillation != "tokens":  # that is of the pruning objective
            self.distillations.append(TeacherDistillation(config, teacher))
        if config.inplace_distillation:
            self.distillations.append(InPlaceDistillation(config))

    def __call__(self, answers: Sequence[torch.Tensor], batch: TrainingBatch) -> list[torch.Tensor]:
        losses = self.from_labels(answers, batch)
        for distillation in self.distillations:
            losses = distillation(losses, answers, batch)
        return losses


def _rows(logits: torch.Tensor) -> torch.Tensor:
    """Logits `(batch_size, num_labels, ...)`, for instance of patches, as `(rows, num_labels)`, float32."""
    return logits.movedim(1, -1).flatten(0, -2).float()


def blend(loss: torch.Tensor, other: torch.Tensor, share: float) -> torch.Tensor:
    """The mean of both losses with weight `share` on `other`."""
    return (1.0 - share) * loss + share * other
