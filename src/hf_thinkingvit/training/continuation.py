"""What a run that continues another takes over from it."""

import dataclasses
import json
from pathlib import Path

from .checkpoints import PROGRESS, list_checkpoints
from .config import TrainingConfig


# Filled in from the starting point when a run begins.
FILLED_IN = ("image_mean", "image_std", "crop_pct")
# What runs of versions before a field did, where that is not its default.
OLDER_RUNS = {"validation_fraction": 0.0}


def as_begun(config: TrainingConfig) -> TrainingConfig:
    """
    `config` with what the run that it resumes has filled in for fields that are not given. A run of a version that held
    no images out goes on without. Checkpoints that cannot be read are left to `Checkpoints.find` to report.
    """
    for folder in _checkpoints(config):
        try:
            saved = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))["config"]
        except (OSError, ValueError, KeyError):
            continue
        taken = {name: saved.get(name) for name in FILLED_IN if getattr(config, name) is None}
        taken |= {name: value for name, value in OLDER_RUNS.items() if name not in saved}
        return dataclasses.replace(config, **taken)
    return config


def _checkpoints(config: TrainingConfig) -> list[Path]:
    if config.resume is None:
        return []
    folder = Path(config.output_dir if config.resume == "auto" else config.resume)
    return [*list_checkpoints(folder / "checkpoints"), folder]
