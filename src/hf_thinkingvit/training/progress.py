"""Where a run stands, and whether a checkpoint belongs to it."""

import dataclasses

from .config import TrainingConfig


# What may differ between a run and its continuation without making it another run.
FREE_TO_CHANGE = {
    *("output_dir", "resume", "num_workers", "trackers", "log_steps", "save_steps", "keep_checkpoints", "cpu"),
    *("eval_epochs", "eval_batch_size", "max_steps", "gradient_accumulation_steps", "compile", "model_license"),
}


@dataclasses.dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    skipped_images: int = 0
    seconds: float = 0.0
    best_top1: float = -1.0


def changed_fields(saved: dict, config: TrainingConfig) -> list[str]:
    """Fields in which the configuration of a checkpoint makes it another run's: their values then and now."""
    now = config.to_dict()
    return [
        f"{name}: {saved[name]!r} then, {now[name]!r} now"
        for name in now
        if name not in FREE_TO_CHANGE and saved.get(name) != now[name]
    ]
