"""What a model costs and how well it does."""

from .accuracy import evaluate_accuracy
from .macs import published_stage_macs, stage_macs


__all__ = ["evaluate_accuracy", "published_stage_macs", "stage_macs"]
