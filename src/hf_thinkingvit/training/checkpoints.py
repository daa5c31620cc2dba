"""
Checkpoints that a killed run can trust: written beside, checked, and moved into place in one step.

A checkpoint is a folder `step-00001234`, complete as soon as it has that name. `manifest.json` in it lists each file's
size and SHA-256, so that what a disk lost afterwards is seen as well.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import nn


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
EMA = "ema.safetensors"
_COMPLETE = re.compile(r"step-(\d{8,})")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _read(file)


def _read(file) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Have the disk hold what was written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; `None` if it is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
        if _digest(path) != entry["sha256"]:
            return f"{name} has changed"
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, the newest first."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and _COMPLETE.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_COMPLETE.fullmatch(path.name)[1]), reverse=True)


def replace_folder(temporary: Path, final: Path) -> None:
    """Move a folder to where another may be, so that at any moment one of them is complete."""
    for path in (*_files(temporary), temporary):
        _sync(path)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


class Checkpoints:
    """
    The checkpoints of a run. Every process calls every method.

    Args:
        folder (`Path`): where they lie; on several machines, a folder that all of them share.
        accelerator (`Accelerator`): which has prepared model and optimizer.
        ema (`nn.Module`, *optional*): weights that it does not know of.
        keep (`int`): newest ones to keep.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, ema: nn.Module | None, keep: int):
        self.folder, self.accelerator, self.ema, self.keep = folder, accelerator, ema, keep
        self.last_good: Path | None = None

    def save(self, step: int, progress: dict) -> Path:
        """Write everything that the run needs to go on from optimizer step `step`."""
        final, temporary = self.folder / f"step-{step:08d}", self.folder / f".step-{step:08d}.partial"
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if main:
            if self.ema is not None:
                save_file({k: v.contiguous() for k, v in self.ema.state_dict().items()}, temporary / EMA)
            (temporary / PROGRESS).write_text(json.dumps(progress, indent=1), encoding="utf-8")
            manifest = {
                str(path.relative_to(temporary)): {"size": path.stat().st_size, "sha256": _digest(path)}
                for path in _files(temporary)
            }
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            _sync(temporary / MANIFEST)
            replace_folder(temporary, final)
            for old in list_checkpoints(self.folder)[self.keep :]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.last_good = final
        return final

    def find(self, resume: str) -> Path | None:
        """
        The checkpoint to resume from: for `"auto"` the newest undamaged one, or `None` where there is none yet.

        Raises:
            ValueError: if a checkpoint that was asked for is damaged or missing, or all of several are damaged.
        """
        found: list = [None, None]  # checkpoint, error
        if self.accelerator.is_main_process:
            try:
                found[0] = self._find(resume)
            except ValueError as error:
                found[1] = str(error)
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        if found[1]:
            raise ValueError(found[1])
        return None if found[0] is None else Path(found[0])

    def _find(self, resume: str) -> str | None:
        candidates = list_checkpoints(self.folder) if resume == "auto" else [Path(resume)]
        for path in candidates:
            damage = find_damage(path)
            if damage is None:
                return str(path)
            logger.warning("the checkpoint %s is damaged: %s", path, damage)
        if not candidates:
            return None
        raise ValueError(
            f"All checkpoints to resume from are damaged: {', '.join(map(str, candidates))}. Move them away to start "
            "anew."
        )

    def load(self, path: Path) -> dict:
        """Restore model, optimizer, scaler and moving average; the progress that was saved with them."""
        self.accelerator.load_state(str(path))
        if self.ema is not None:
            self.ema.load_state_dict(load_file(path / EMA))
        self.last_good = path
        return json.loads((path / PROGRESS).read_text(encoding="utf-8"))
