"""What a run that continues another takes over from it."""

import dataclasses
import json
from pathlib import Path

from .checkpoints import PROGRESS, checkpoints_of
from .config import TrainingConfig


# Filled in from the starting point when a run begins.
FILLED_IN = ("image_mean", "image_std", "crop_pct", "interpolation")
# What runs of versions before a field did, where that is not its default.
OLDER_RUNS = {"validation_fraction": 0.0, "interpolation": "bicubic"}


def as_begun(config: TrainingConfig) -> TrainingConfig:
    """
    `config` with what the run that it resumes has filled in for fields that are not given. A run of a version that held
    no images out, or that always interpolated alike, goes on so. Checkpoints that cannot be read are left to
    `Checkpoints.find` to report.
    """
    own = Path(config.output_dir) / "checkpoints"
    for folder in [] if config.resume is None else checkpoints_of(config.resume, own):
        try:
            saved = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))["config"]
        except (OSError, ValueError, KeyError):
            continue
        taken = {name: saved.get(name) for name in FILLED_IN if getattr(config, name) is None}
        older = {name: value for name, value in OLDER_RUNS.items() if name not in saved}
        # A field that is filled in is known to be configured where it has a value: left to `changed_fields` to report.
        taken |= {name: value for name, value in older.items() if name not in FILLED_IN or name in taken}
        return dataclasses.replace(config, **taken)
    return config
