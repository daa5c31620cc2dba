"""Where a run stands, and whether a checkpoint belongs to it."""

import dataclasses
import json

from .config import TrainingConfig
from .continuation import OLDER_RUNS


# Fields that may differ from those of the checkpoint that a run resumes from.
FREE_TO_CHANGE = {
    *("output_dir", "resume", "num_workers", "trackers", "log_steps", "save_steps", "keep_checkpoints", "cpu"),
    *("eval_epochs", "eval_batch_size", "max_steps", "gradient_accumulation_steps", "compile", "model_license"),
    "test_split",
}


@dataclasses.dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    skipped: list[int | str] = dataclasses.field(default_factory=list)  # images that cannot be decoded, each once
    seconds: float = 0.0
    best_score: float = -1.0  # the task's decisive measure
    best_step: int | None = None

    @classmethod
    def from_dict(cls, saved: dict) -> "Progress":
        """From a checkpoint, of earlier versions too."""
        names = {field.name for field in dataclasses.fields(cls)}  # earlier ones counted an image in every epoch
        renamed = {"best_score" if name == "best_top1" else name: value for name, value in saved.items()}
        return cls(**{name: value for name, value in renamed.items() if name in names})

    @property
    def skipped_images(self) -> int:
        """How many training images could not be decoded so far."""
        return len(self.skipped)

    def finish_step(self, steps_per_epoch: int) -> None:
        """Count a step, and the epoch if it was the last of one."""
        self.step += 1
        self.step_in_epoch += 1
        if self.step_in_epoch == steps_per_epoch:
            self.start_next_epoch()

    def start_next_epoch(self) -> None:
        self.epoch += 1
        self.step_in_epoch = 0


def changed_fields(saved: dict, config: TrainingConfig) -> list[str]:
    """
    The fields that a run must not change when it resumes and that differ, with their values in the checkpoint and now.

    Args:
        saved (`dict`): the checkpoint's configuration, from JSON. Fields that it lacks, because it is of an older
            version, count as their default or as in `OLDER_RUNS`.
        config (`TrainingConfig`): of the resumed run.
    """
    then = TrainingConfig().to_dict() | OLDER_RUNS | saved
    now = json.loads(json.dumps(config.to_dict()))  # tuples become lists, as in `saved`
    changed = []
    for name in now:
        if name == "model":
            fields = sorted(then[name].keys() | now[name].keys())
            pairs = [(f"model.{field}", then[name].get(field), now[name].get(field)) for field in fields]
        else:
            pairs = [(name, then[name], now[name])]
        if name not in FREE_TO_CHANGE:
            changed += [f"{field}: {old!r} then, {new!r} now" for field, old, new in pairs if old != new]
    return changed
