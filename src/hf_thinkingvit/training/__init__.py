"""
Training runs on Accelerate, and distillation losses that also work in a training loop of your own.

`train`, `finetune` and `parse_config` need the extra `hf-thinkingvit[train]` (timm among others).
"""

from .. import needs_torch  # noqa: F401
from .distillation import DistillationLoss, Teacher, teacher_loss


__all__ = [
    "DistillationLoss",
    "FineTuned",
    "Teacher",
    "TrainingConfig",
    "TrainingRun",
    "finetune",
    "parse_config",
    "teacher_loss",
    "train",
]

_LAZY = {
    "TrainingConfig": "config",
    "parse_config": "config_parsing",
    "FineTuned": "finetuning",
    "finetune": "finetuning",
    "TrainingRun": "loop",
    "train": "loop",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name in ("timm", "torchvision", "yaml", "tqdm"):
            raise ImportError(f'Training needs {error.name}: pip install "hf-thinkingvit[train]".') from error
        raise
