"""The settings that a resumed run takes over from its checkpoint."""

import dataclasses
import json
from pathlib import Path

from .checkpoints import PROGRESS, checkpoints_of
from .config import TrainingConfig


# Fields that a run fills in from its starting point if they are not given.
FILLED_IN = ("image_mean", "image_std", "crop_pct", "interpolation")
# For fields that older versions did not have: the value that describes what those versions did, if not the default.
OLDER_RUNS = {"validation_fraction": 0.0, "interpolation": "bicubic"}


def as_begun(config: TrainingConfig) -> TrainingConfig:
    """
    `config` with the values that the resumed run has filled in for fields that are not given, and for runs of older
    versions with `OLDER_RUNS`. Unreadable checkpoints are skipped here; `Checkpoints.find` reports them.
    """
    own = Path(config.output_dir) / "checkpoints"
    for folder in [] if config.resume is None else checkpoints_of(config.resume, own):
        try:
            saved = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))["config"]
        except (OSError, ValueError, KeyError):
            continue
        taken = {name: saved.get(name) for name in FILLED_IN if getattr(config, name) is None}
        older = {name: value for name, value in OLDER_RUNS.items() if name not in saved}
        # If the user has set a field of `FILLED_IN`, the value stays, and `changed_fields` reports the difference.
        taken |= {name: value for name, value in older.items() if name not in FILLED_IN or name in taken}
        return dataclasses.replace(config, **taken)
    return config
