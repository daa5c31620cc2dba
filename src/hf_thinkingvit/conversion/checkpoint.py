"""Reading official checkpoints from files, folders or the Hub: tensors and plain data, nothing else."""

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..families.official import Checkpoint
from ..models.official_layout import CONFIG_FILE, WEIGHT_FILES
from ..public_names import is_missing_path
from .variant import VARIANT_FILE, read_variant


# What training scripts pickle beside tensors: their arguments, and best accuracies as NumPy scalars. Neither runs code.
# Versions of NumPy have the function that makes a scalar under two names.
_scalar = np.float64(0).__reduce__()[0]
PLAIN_OBJECTS = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
]


def read_checkpoint(source: str | os.PathLike, subfolder: str = "", **hub: Any) -> Checkpoint:
    """
    Read a checkpoint from a file, a folder, or a Hub id.

    Args:
        source (`str` or `os.PathLike`): which.
        subfolder (`str`, *optional*): of the folder or repository, where the files are.
        hub: arguments of `huggingface_hub.snapshot_download`: `revision`, `cache_dir`, `token` and so on.

    Raises:
        FileNotFoundError: if there is no such file, folder or repository, or no weights in it.
        ValueError: if a file is damaged, holds no state dict, or would need arbitrary objects to be unpickled.
    """
    path = Path(source)
    if is_missing_path(str(source)):
        raise FileNotFoundError(f"{source} is no file or folder here.")
    if not path.exists():
        path = _download(str(source), subfolder, hub)
    if path.is_dir():
        path = _weights_in(path / subfolder, f"{source}/{subfolder}" if subfolder else str(source))
    config_path = path.parent / CONFIG_FILE
    config = _read_json(config_path) if config_path.is_file() else {}
    variant_path = path.parent / VARIANT_FILE
    variant = read_variant(variant_path) if variant_path.is_file() else {}
    if path.suffix == ".safetensors":
        return Checkpoint(path, _read_safetensors(path), config, variant=variant)
    content = _unpickle(path)
    training_args = content.get("args")
    training_args = vars(training_args) if isinstance(training_args, argparse.Namespace) else {}
    return Checkpoint(path, _state_dict(content, path), config, training_args, variant)


def _weights_in(folder: Path, name: str) -> Path:
    """The weights in a folder that is called `name` in messages."""
    for pattern in WEIGHT_FILES:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise ValueError(
                f"There are several checkpoints in {name}: {', '.join(file.name for file in found)}. Give the file of "
                "the one to load, or a folder of that alone."
            )
        if found:
            return found[0]
    raise FileNotFoundError(f"There is no model in {name}: no weights in one of the files {', '.join(WEIGHT_FILES)}.")


def _download(repo_id: str, subfolder: str, hub: dict[str, Any]) -> Path:
    """The first of `WEIGHT_FILES` that a repository has, and what is beside it; the folder of the snapshot."""
    for pattern in WEIGHT_FILES:
        names = [CONFIG_FILE, VARIANT_FILE, pattern]
        patterns = [f"{subfolder}/{name}" for name in names] if subfolder else names
        try:
            snapshot = Path(snapshot_download(repo_id, allow_patterns=patterns, **hub))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise FileNotFoundError(
                f"{repo_id} is no file or folder here, and cannot be downloaded from the Hub: {error}"
            ) from error
        if any((snapshot / subfolder).glob(pattern)):
            break
        hub = {**hub, "revision": snapshot.name}  # the commit, of which the others must be as well
    return snapshot


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error


def _unpickle(path: Path) -> dict:
    try:
        with torch.serialization.safe_globals(PLAIN_OBJECTS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here: all mean that this file cannot be read safely
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise ValueError(
                f"{path} holds a `{foreign[1]}`. Only tensors, plain values, NumPy scalars and `argparse.Namespace` "
                "are unpickled, since anything else could run code: save the checkpoint again without it."
            ) from None
        raise ValueError(
            f"{path} is damaged or no PyTorch checkpoint: {type(error).__name__}: {str(error).splitlines()[:1]}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dict with a state dict in it, got {type(content).__name__}.")
    return content


def _state_dict(content: dict, path: Path) -> dict[str, torch.Tensor]:
    """
    The averaged weights if the file has them under timm's name, else the plain ones, else averaged ones under
    DynamicViT's name (whose evaluation prefers the plain ones), else `content`; without wrappers' prefixes.
    """
    candidates = [content.get(name) for name in ("state_dict_ema", "state_dict", "model", "model_ema")] + [content]
    for candidate in candidates:
        if isinstance(candidate, dict) and candidate and all(torch.is_tensor(value) for value in candidate.values()):
            return {name.removeprefix("module."): tensor for name, tensor in candidate.items()}
    raise ValueError(
        f"{path} holds no state dict: expected tensors under `state_dict_ema`, `state_dict`, `model`, `model_ema` or "
        f"at the top, got the keys {sorted(map(str, content))[:20]}."
    )
