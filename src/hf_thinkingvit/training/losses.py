"""What a batch's loss is made of, for every family: labels, stages, a teacher, and the last stage as one."""

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..evaluation.labels import check_single_label
from .config import TrainingConfig
from .distillation import DistillationLoss, Teacher, teacher_loss
from .seeding import seeded


class TrainingLoss:
    """
    The loss of a configured run.

    Of a model that thinks in stages: the weighted sum of the stages' losses (arXiv 2507.10800, section 3). Of any other
    model: its answer's loss, and what its own loss has beside the task loss (A-ViT's ponder and prior losses).

    Args:
        config (`TrainingConfig`): of the run.
        model_config (`PreTrainedConfig`): of the model.
        teacher (`Teacher` or `PreTrainedModel`, *optional*): an image classifier with the same labels; a bare model
            gets the student's pixels as they are.

    Raises:
        ValueError: where the configuration asks for what this model cannot do.
    """

    def __init__(
        self,
        config: TrainingConfig,
        model_config: PreTrainedConfig,
        teacher: Teacher | PreTrainedModel | None = None,
    ):
        if isinstance(teacher, PreTrainedModel):
            teacher = Teacher(teacher, id2label=model_config.id2label, label_map=config.label_map)
        self.config, self.teacher = config, teacher
        self.num_stages = getattr(model_config, "num_stages", 1)
        # Arguments of the model's `forward` for the outputs that the loss is computed from, with or without labels.
        arguments = {"stage_loss_weights": "output_stage_logits", "ponder_loss_weight": "output_halting_losses"}
        self.outputs_needed = {argument: True for field, argument in arguments.items() if hasattr(model_config, field)}
        check_single_label(model_config)
        weights = getattr(model_config, "stage_loss_weights", None) or [1.0 / self.num_stages] * self.num_stages
        self.stage_weights = torch.tensor(weights, dtype=torch.float64)
        if config.stage_sampling == "sandwich" and self.num_stages < 3:
            raise ValueError(
                f"`stage_sampling` sandwich needs a stage between the first and the last; this model has "
                f"{self.num_stages}."
            )
        if config.inplace_distillation and self.num_stages < 2:
            raise ValueError("`inplace_distillation` needs a model with at least two stages.")
        self.distilled = None
        if getattr(model_config, "distilled", False) and teacher is not None:
            self.distilled = DistillationLoss(
                teacher,
                kind=config.distillation,
                weight=config.distillation_weight,
                temperature=config.distillation_temperature,
                label_smoothing=config.label_smoothing,
            )

    def weights_of_step(self, step: int) -> list[float]:
        """Weight of each stage's loss in an optimizer step; the same on every process."""
        weights = self.stage_weights
        if self.config.stage_sampling == "all":
            return weights.tolist()
        with seeded(self.config.seed, step):
            between = 1 + torch.randperm(self.num_stages - 2)[: self.config.sandwich_samples]
        chosen = torch.zeros_like(weights)
        chosen[[0, -1, *between.tolist()]] = 1.0
        # As much loss in all as when every stage counts, so that the learning rate means the same.
        return (weights * chosen * weights.sum() / (weights * chosen).sum()).tolist()

    def __call__(
        self, outputs: ModelOutput, pixel_values: torch.Tensor, targets: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            outputs (`ModelOutput`): the model's in training mode, called with `labels` where they are class indices.
            pixel_values (`torch.Tensor`): the images, for the teacher.
            targets (`torch.Tensor`): class indices `(batch_size,)`, or probabilities `(batch_size, num_labels)`.
            step (`int`): the optimizer step, from which sampled stages follow.

        Returns:
            The loss, and its parts by name, detached.
        """
        if self.distilled is not None:
            loss = self.distilled(outputs, pixel_values, targets)
            return loss, self._parts(outputs, [loss])
        teacher_logits = None
        if self.teacher is not None:
            teacher_logits = self.teacher(pixel_values)
        answers = outputs.get("stage_logits") or self._heads(outputs)
        losses = [
            self._answer_loss(logits, targets, teacher_logits, None if logits is answers[-1] else answers[-1])
            for logits in answers
        ]
        weights = self.weights_of_step(step) if self.num_stages > 1 else [1.0 / len(losses)] * len(losses)
        loss = sum(weight * part for weight, part in zip(weights, losses) if weight)
        if outputs.get("task_loss") is not None:
            loss = loss + (outputs.loss - outputs.task_loss)
        return loss, self._parts(outputs, losses)

    @staticmethod
    def _heads(outputs: ModelOutput) -> tuple[torch.Tensor, ...]:
        """Without a teacher, both heads of a distilled model learn from the labels."""
        if outputs.get("distillation_logits") is not None:
            return outputs.cls_logits, outputs.distillation_logits
        return (outputs.logits,)

    def _answer_loss(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        teacher_logits: torch.Tensor | None,
        last_logits: torch.Tensor | None,
    ) -> torch.Tensor:
        config = self.config
        # Mixup has smoothed its targets itself.
        smoothing = 0.0 if targets.is_floating_point() else config.label_smoothing
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        if teacher_logits is not None:
            share, temperature = config.distillation_weight, config.distillation_temperature
            from_teacher = teacher_loss(logits.float(), teacher_logits, config.distillation, temperature)
            loss = (1.0 - share) * loss + share * from_teacher
        if config.inplace_distillation and self.num_stages > 1 and last_logits is not None:
            share = config.inplace_distillation
            from_last = teacher_loss(logits.float(), last_logits.detach(), "soft", config.distillation_temperature)
            loss = (1.0 - share) * loss + share * from_last
        return loss

    def _parts(self, outputs: ModelOutput, losses: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = {}
        if self.num_stages > 1:
            parts = {f"stage_{index}_loss": loss.detach() for index, loss in enumerate(losses)}
        for name in ("ponder_loss", "prior_loss"):
            if outputs.get(name) is not None:
                parts[name] = outputs[name].detach()
        return parts
