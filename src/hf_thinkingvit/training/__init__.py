"""Training objectives beyond those that the models compute themselves."""

from .distillation import DistillationLoss, teacher_loss


__all__ = ["DistillationLoss", "teacher_loss"]
