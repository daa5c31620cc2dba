"""Tells checkpoints in their authors' layout from saved models of Transformers, by names of files and of tensors."""

import json
import os
import pickle
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path


CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".tar", ".pt")
# What a folder is searched for, in this order; of what is on the Hub, the first that is there is downloaded.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "*.pth.tar", "*.pth")
# The weights of the patch embedding in every family of this package, which other libraries call otherwise.
_OWN_PATCHES = re.compile(r"^(\w+\.)?embeddings\.patch_embeddings\.(weight|bias)\b")


def is_official_config(path: str | os.PathLike) -> bool:
    """Whether a `config.json` has no `model_type`, which every configuration of Transformers has."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(config, dict) and "model_type" not in config


def is_official_folder(folder: Path) -> bool:
    """Whether a folder has a `config.json` that is not of Transformers; without one, if it has weights, no adapters."""
    if (folder / CONFIG_FILE).is_file():
        return is_official_config(folder / CONFIG_FILE)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return ADAPTER_FILE not in names and any(fnmatch(name, pattern) for name in names for pattern in WEIGHT_FILES)


def weight_files(variant: str | None = None) -> list[str]:
    """The files of weights that Transformers looks for, in its order; split weights have an index."""
    files = (f"{name}{index}" for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json"))
    return [
        ".".join((stem, *([variant] if variant else []), suffix))
        for stem, _, suffix in (f.rpartition(".") for f in files)
    ]


def has_own_names(path: str | os.PathLike) -> bool:
    """Whether a file of weights, or the index of several, has those of a model of this package."""
    return any(_OWN_PATCHES.search(name) for name in _tensor_names(Path(path)))


def _tensor_names(path: Path) -> Iterable[str]:
    """The names at the top of a file; none of one that cannot be read."""
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8")).get("weight_map", {})
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                return json.loads(file.read(int.from_bytes(file.read(8), "little")))
        import torch  # not above, since commands look at folders before they import torch, which takes seconds

        content = torch.load(path, map_location="meta", weights_only=True)
    except (ValueError, RuntimeError, EOFError, OverflowError, MemoryError, pickle.UnpicklingError):
        return []
    return [str(name) for name in content] if isinstance(content, dict) else []


__all__ = [
    "ADAPTER_FILE",
    "CONFIG_FILE",
    "WEIGHT_FILES",
    "WEIGHT_SUFFIXES",
    "has_own_names",
    "is_official_config",
    "is_official_folder",
    "weight_files",
]
