"""What a run that continues another takes over from it."""

import dataclasses
import json
from pathlib import Path

from .checkpoints import PROGRESS, list_checkpoints
from .config import TrainingConfig


# Filled in from the starting point when a run begins.
FILLED_IN = ("image_mean", "image_std", "crop_pct")


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
        if "validation_fraction" not in saved:
            taken["validation_fraction"] = 0.0
        return dataclasses.replace(config, **taken)
    return config


def _checkpoints(config: TrainingConfig) -> list[Path]:
    if config.resume is None:
        return []
    if config.resume == "auto":
        return list_checkpoints(Path(config.output_dir) / "checkpoints")
    return [Path(config.resume)]
