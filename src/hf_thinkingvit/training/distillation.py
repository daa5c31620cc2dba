"""Learning from a teacher: DeiT's distillation (arXiv 2012.12877, section 4) for models with a distillation head."""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


def teacher_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, kind: Literal["hard", "soft"], temperature: float = 1.0
) -> torch.Tensor:
    """
    How far `logits` are from the teacher's answer, both `(batch_size, num_labels)`.

    `"hard"`: cross-entropy with the teacher's most probable class. `"soft"`: Kullback-Leibler divergence from the
    teacher's distribution, both softened by `temperature`, times its square so that gradients keep their size.
    """
    if kind == "hard":
        return F.cross_entropy(logits, teacher_logits.argmax(dim=-1))
    if kind != "soft":
        raise ValueError(f'`kind` must be "hard" or "soft", got {kind!r}.')
    log_probabilities = F.log_softmax(logits.float() / temperature, dim=-1)
    target = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(log_probabilities, target, reduction="batchmean", log_target=True) * temperature**2


class DistillationLoss(nn.Module):
    r"""
    The training loss of a distilled model with a teacher: the class head learns from the labels, the distillation head
    from the teacher. What else the model's own loss holds (A-ViT's ponder and prior losses) stays in it.

    Args:
        teacher (`PreTrainedModel`):
            Any Transformers image classifier with the student's labels. Put into evaluation mode and frozen.
        kind (`"hard"` or `"soft"`, *optional*, defaults to `"hard"`):
            See `teacher_loss`.
        weight (`float`, *optional*, defaults to 0.5):
            Share of the teacher in the task loss, from 0 to 1.
        temperature (`float`, *optional*, defaults to 3.0):
            Of soft distillation.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Share of the labels' part that is spread over all labels.

    Example:

    ```python
    >>> distillation = DistillationLoss(AutoModelForImageClassification.from_pretrained("microsoft/resnet-50"))
    >>> outputs = student(pixel_values, labels=labels)  # in training mode
    >>> distillation(outputs, pixel_values, labels).backward()
    ```"""

    def __init__(
        self,
        teacher: PreTrainedModel,
        kind: Literal["hard", "soft"] = "hard",
        weight: float = 0.5,
        temperature: float = 3.0,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        if kind not in ("hard", "soft"):
            raise ValueError(f'`kind` must be "hard" or "soft", got {kind!r}.')
        if not 0.0 <= weight <= 1.0:
            raise ValueError(f"`weight` must be between 0 and 1, got {weight!r}.")
        if not temperature > 0.0:
            raise ValueError(f"`temperature` must be above 0, got {temperature!r}.")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"`label_smoothing` must be between 0 and 1, got {label_smoothing!r}.")
        self.teacher = teacher.eval().requires_grad_(False)
        self.kind, self.weight, self.temperature = kind, weight, temperature
        self.label_smoothing = label_smoothing

    def train(self, mode: bool = True) -> "DistillationLoss":
        """The teacher stays in evaluation mode."""
        self.training = mode
        return self

    def forward(self, outputs: ModelOutput, pixel_values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        Args:
            outputs (`ModelOutput`): the student's, called with `labels` in training mode.
            pixel_values (`torch.Tensor`): the images, for the teacher.
            labels (`torch.LongTensor` of shape `(batch_size,)`): class indices.

        Raises:
            ValueError: if the student has no distillation head, or other labels than the teacher.
        """
        if outputs.get("distillation_logits") is None or outputs.get("task_loss") is None:
            raise ValueError("`outputs` must be of a distilled model, called with `labels` in training mode.")
        with torch.no_grad():
            teacher_logits = self.teacher(pixel_values).logits
        if teacher_logits.shape != outputs.distillation_logits.shape:
            raise ValueError(
                f"The teacher has {teacher_logits.shape[-1]} labels, the student "
                f"{outputs.distillation_logits.shape[-1]}: they must be the same."
            )
        from_labels = F.cross_entropy(outputs.cls_logits, labels, label_smoothing=self.label_smoothing)
        from_teacher = teacher_loss(outputs.distillation_logits, teacher_logits, self.kind, self.temperature)
        task_loss = (1.0 - self.weight) * from_labels + self.weight * from_teacher
        return outputs.loss - outputs.task_loss + task_loss
