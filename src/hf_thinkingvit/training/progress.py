"""Where a run stands, and whether a checkpoint belongs to it."""

import dataclasses
import json
from collections.abc import Mapping

from .config import TrainingConfig
from .continuation import OLDER_RUNS


# Fields that may differ from those of the checkpoint that a run resumes from.
FREE_TO_CHANGE = {
    *("output_dir", "resume", "num_workers", "trackers", "log_steps", "save_steps", "keep_checkpoints", "cpu"),
    *("eval_epochs", "eval_batch_size", "max_steps", "gradient_accumulation_steps", "compile", "model_license"),
    *("eval_start", "test_split"),
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
    classifier: str | None = None  # what it started from, in words, if from a probe
    loss_sums: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # over micro-batches since the last evaluation
    loss_counts: dict[str, int] = dataclasses.field(default_factory=dict)

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

    def add_losses(self, means: Mapping[str, float], counts: Mapping[str, int]) -> None:
        """Record the mean of each loss over as many micro-batches."""
        for name, mean in means.items():
            self.loss_sums[name] = self.loss_sums.get(name, 0.0) + mean * counts[name]
            self.loss_counts[name] = self.loss_counts.get(name, 0) + counts[name]

    def take_mean_losses(self) -> dict[str, float]:
        """The mean of each loss since the last call."""
        means = {name: value / self.loss_counts[name] for name, value in self.loss_sums.items()}
        self.loss_sums, self.loss_counts = {}, {}
        return means

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
