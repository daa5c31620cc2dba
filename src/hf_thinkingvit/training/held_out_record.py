"""The record of which images a fine-tuning run holds out, by which a run that goes on notices other ones."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data import ImageSplit
from ..files import replace_file
from ..public_names import public_name
from .config import TrainingConfig
from .splits import HOLD_OUT_SEED, TrainingData


SPLITS = "splits.json"


def write_record(config: TrainingConfig, data: TrainingData, calibration_images: ImageSplit, output_dir: Path) -> None:
    """Write which images are held out, to `splits.json`."""
    parts = {"selects": data.evaluation, "calibrates": calibration_images}
    replace_file(output_dir / SPLITS, json.dumps(_record(config, data.selected_on, parts), indent=1))


def check_record(config: TrainingConfig, data: TrainingData, calibration_images: ImageSplit, output_dir: Path) -> None:
    """`ValueError` if a run that goes on would hold out other images than it did before: it was trained on them."""
    file = output_dir / SPLITS
    if config.resume is None or not file.is_file():
        return
    recorded = json.loads(file.read_text(encoding="utf-8"))
    now = _record(config, data.selected_on, {"selects": data.evaluation, "calibrates": calibration_images})
    if any(set(recorded.get(role, ())) != set(now[role]) for role in ("selects", "calibrates")):
        raise ValueError(
            f"The images have changed since this run began: others would be held out than {file} records, on some of "
            "which the model was trained. Restore the images, or begin a new run in another folder."
        )


def _record(config: TrainingConfig, selected_on: str, parts: Mapping[str, ImageSplit]) -> dict[str, Any]:
    """Which images were held out: their paths in a folder, or else digests of their files."""
    folder = Path(config.dataset)
    return {
        "dataset": public_name(config.dataset),
        "held_out_seed": HOLD_OUT_SEED,
        "selected_on": selected_on,
        **{role: [_identity(row[part.image_column], folder) for row in part.rows] for role, part in parts.items()},
    }


def _identity(image: Mapping[str, Any], folder: Path) -> str:
    path = image.get("path")
    if path and folder.is_dir() and Path(path).is_absolute() and Path(path).is_relative_to(folder.resolve()):
        return Path(path).relative_to(folder.resolve()).as_posix()
    content = image["bytes"] if image.get("bytes") is not None else Path(path).read_bytes()
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
