"""
Checkpoints that survive a kill at any moment: written to a temporary folder, then renamed.

A checkpoint is a folder `step-00001234`; under that name it is complete. Its `manifest.json` lists the size and SHA-256
of each file, so that later damage is detected as well. `evaluated.json` is added once the model of that step has been
evaluated.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import nn

from ..files import replace_file, sha256, sync


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
EVALUATED = "evaluated.json"
EMA = "ema.safetensors"
_COMPLETE = re.compile(r"step-(\d{8,})")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def find_damage(folder: Path) -> str | None:
    """A description of the first damage found in a checkpoint; `None` if there is none."""
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
        if sha256(path) != entry["sha256"]:
            return f"{name} has changed"
    return None


def _step(path: Path) -> int:
    return int(_COMPLETE.fullmatch(path.name)[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, newest first."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and _COMPLETE.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def checkpoints_of(resume: str, own: Path) -> list[Path]:
    """
    The checkpoints that a run may resume from, newest first.

    Args:
        resume (`str`): `"auto"`, or the folder of a checkpoint, of a run, or of a run's checkpoints.
        own (`Path`): the folder of the run's own checkpoints.
    """
    path = Path(resume)
    if resume == "auto":
        return list_checkpoints(own)
    if path.is_dir() and (_COMPLETE.fullmatch(path.name) or (path / MANIFEST).exists()):
        return [path]
    return list_checkpoints(path) or list_checkpoints(path / own.name)


@contextmanager
def replacing_folder(final: Path) -> Iterator[Path]:
    """
    Yields an empty temporary folder, which replaces `final` when the context ends without an error. After an error,
    such as a full disk, the temporary folder is deleted, `final` is unchanged, and an `OSError` is raised.

    No portable call exchanges two folders, so `final` is renamed for a moment. If the run is killed in it,
    `recover_folder` moves the folder back.
    """
    temporary, old = _partial(final), _set_aside(final)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*_files(temporary), temporary):
            sync(path)
    except Exception as error:  # any, because torch reports a full disk as a plain "iostream error"
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(temporary.parent).free
        raise OSError(
            f"{final} could not be written ({error}; {free} bytes are free there). It is as it was."
        ) from error
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    temporary.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _set_aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def recover_folder(final: Path) -> None:
    """Move the old folder back if the process was killed while `replacing_folder` replaced it."""
    final = Path(os.path.abspath(final))  # "." has no name
    if not final.name:
        return
    old = _set_aside(final)
    if old.is_dir() and not final.exists():
        logger.warning("%s was being replaced when its run was killed: the one before is back in its place", final)
        old.rename(final)
        sync(final.parent)


def recover_checkpoints(folder: Path) -> None:
    for old in folder.glob(".step-*.old"):
        recover_folder(folder / old.name.removeprefix(".").removesuffix(".old"))


class Checkpoints:
    """
    The checkpoints of a run. Every process calls every method.

    Args:
        folder (`Path`): where they are saved; for several machines, on a shared file system.
        accelerator (`Accelerator`): has prepared model and optimizer.
        ema (`nn.Module`, *optional*): the moving average of the weights, which the accelerator does not save.
        keep (`int`): number of checkpoints to keep; older ones are deleted.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, ema: nn.Module | None, keep: int):
        self.folder, self.accelerator, self.ema, self.keep = folder, accelerator, ema, keep
        self.last_good: Path | None = None

    def save(self, step: int, progress: dict) -> Path:
        """
        Save all that the run needs to resume after optimizer step `step`. After an error, such as a full disk, the
        checkpoints are the same as before.
        """
        final, main = self.folder / f"step-{step:08d}", self.accelerator.is_main_process
        with replacing_folder(final) if main else nullcontext(_partial(final)) as temporary:
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(temporary))
            self.accelerator.wait_for_everyone()
            if main:
                if self.ema is not None:
                    save_file({k: v.contiguous() for k, v in self.ema.state_dict().items()}, temporary / EMA)
                (temporary / PROGRESS).write_text(json.dumps(progress, indent=1), encoding="utf-8")
                manifest = {
                    str(path.relative_to(temporary)): {"size": path.stat().st_size, "sha256": sha256(path)}
                    for path in _files(temporary)
                }
                (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
                sync(temporary / MANIFEST)
        if main:
            # Checkpoints of later steps can only be there if this run resumed from an earlier one: they do not count.
            until_now = [path for path in list_checkpoints(self.folder) if _step(path) <= step]
            for old in (*until_now[self.keep :], *self.folder.glob(".step-*.partial")):
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.last_good = final
        return final

    def holds_last_good(self) -> bool:
        """False if the run resumed from a checkpoint in the folder of another run."""
        return self.last_good is None or self.last_good.parent.resolve() == self.folder.resolve()

    def add_evaluation(self, progress: dict) -> None:
        """Add to the newest checkpoint the progress after the evaluation of its model."""
        if self.accelerator.is_main_process:
            replace_file(self.last_good / EVALUATED, json.dumps(progress, indent=1))
        self.accelerator.wait_for_everyone()

    def find(self, resume: str) -> Path | None:
        """
        The checkpoint to resume from.

        Args:
            resume (`str`):
                `"auto"` for the newest undamaged checkpoint of this run, or `None` if it has no checkpoints yet; the
                folder of a checkpoint; or the folder of a run or of its checkpoints, for the newest undamaged one.

        Raises:
            ValueError: if there is no such checkpoint, or all of them are damaged.
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
        candidates = checkpoints_of(resume, self.folder)
        if not candidates and resume == "auto":
            return None
        if not candidates:
            raise ValueError(f"`resume`: there is no checkpoint {resume}{self._what_there_is(Path(resume))}.")
        damages = {}
        for candidate in candidates:
            damages[candidate] = find_damage(candidate)
            if damages[candidate] is None:
                return str(candidate)
            logger.warning("the checkpoint %s is damaged: %s", candidate, damages[candidate])
        raise ValueError(
            f"All checkpoints to resume from are damaged: {'; '.join(f'{p}: {d}' for p, d in damages.items())}. Move "
            "them away to start anew."
        )

    def _what_there_is(self, path: Path) -> str:
        folders = dict.fromkeys((path.parent, path.parent / self.folder.name, self.folder))
        there = [str(found) for folder in folders for found in list_checkpoints(folder)]
        return f"; there are {', '.join(there)}" if there else f", nor any in {self.folder}"

    def read(self, path: Path) -> dict:
        """The `progress` that was given to `save`, or to `add_evaluation`, for this checkpoint."""
        try:
            return json.loads((path / EVALUATED).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not evaluated yet, or the file is damaged: the run evaluates again
            return json.loads((path / PROGRESS).read_text(encoding="utf-8"))

    def load(self, path: Path) -> None:
        """Load model, optimizer, gradient scaler and moving average."""
        self.accelerator.load_state(str(path))
        if self.ema is not None:
            self.ema.load_state_dict(load_file(path / EMA))
        self.last_good = path
