"""
`export.json` of an exported folder: what the programs return, what wrote them, the checksums of their files and of
itself, and the fields of the configuration that are fixed in the programs: `fixed` in the stages, `judged` in the
decisions after them.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from ..files import replace_file, sha256
from ..version import __version__


MANIFEST = "export.json"
FORMAT_VERSION = 3
ANEW = "copy the folder anew, or export the model anew."


def is_exported(folder: str | Path) -> bool:
    """Whether this is a folder that `export_model` wrote."""
    return (Path(folder) / MANIFEST).is_file()


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write `export.json` with the checksums of the programs' files, and of itself."""
    sums = {path.name: sha256(path) for path in program_files(folder, manifest)}
    manifest = {"format_version": FORMAT_VERSION, **manifest, "sha256": sums}
    replace_file(folder / MANIFEST, json.dumps({**manifest, "checksum": checksum(manifest)}, indent=2) + "\n")


def program_entries(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What the manifest says of each program."""
    return [*manifest["stages"], *manifest["judges"]]


def program_files(folder: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """The files of the programs, with the weights that lie beside an OpenVINO program."""
    paths = [folder / entry["file"] for entry in program_entries(manifest)]
    return [file for path in paths for file in ([path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path])]


def read_manifest(folder: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: if the folder is no export, is of another version, or lacks files or has others than it says.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} is no exported folder, or its export was cut off: it has no {MANIFEST}.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{str(folder)!r} has version {version} of the format of exported folders, this package "
            f"({__version__}) reads version {FORMAT_VERSION}: export the model anew with it."
        )
    if manifest.pop("checksum", None) != checksum(manifest):
        raise ValueError(
            f"{str(path)!r} is not as it was exported, it is damaged or edited: {ANEW} τ, exit criterion and labels "
            f"are in {CONFIG_NAME}, where they may be changed."
        )
    names = [file.name for file in program_files(Path(), manifest)]
    elsewhere = any(Path(entry["file"]).name != entry["file"] for entry in program_entries(manifest))
    if elsewhere or set(names) != set(manifest["sha256"]):
        raise ValueError(f"{str(path)!r} names other files than those of the folder: {ANEW}")
    for name in (*names, CONFIG_NAME, *([IMAGE_PROCESSOR_NAME] if manifest["has_processor"] else [])):
        if not (folder / name).is_file():
            raise ValueError(f"{str(folder)!r} lacks {name}: copy the whole folder, or export the model anew.")
    for name in names:
        if sha256(folder / name) != manifest["sha256"][name]:
            raise ValueError(
                f"{name} in {str(folder)!r} is not the file that was exported, it is damaged or replaced: {ANEW}"
            )
    return manifest


def read_fields(folder: Path) -> dict[str, Any]:
    """What `config.json` of a folder says. `ValueError` if it is damaged."""
    path = folder / CONFIG_NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path) from error
    return fields


def check_has_threshold(fields: Mapping[str, Any], folder: Path) -> None:
    """`ValueError` for a `config.json` without τ, in whose place the default of the class would be taken."""
    if fields.get("threshold") is None:
        raise ValueError(f"config.json in {str(folder)!r} has no `threshold`: set it, on the criterion's scale.")


def damaged(path: Path) -> ValueError:
    return ValueError(f"{str(path)!r} is damaged: {ANEW}")


def check_unchanged(found: Mapping[str, Any], fixed: Mapping[str, Any], remedy: str) -> None:
    """`ValueError`, which ends with `remedy`, if fields have other values than those that are fixed in programs."""
    changed = [name for name in fixed if found.get(name) != fixed[name]]
    if changed:
        raise ValueError(
            "The configuration differs from the exported programs: "
            + "; ".join(
                f"`{name}` is {found.get(name)!r} there and {fixed[name]!r} in the programs" for name in changed
            )
            + f". {remedy}"
        )


def checksum(manifest: Mapping[str, Any]) -> str:
    """Of what `export.json` says, and by the programs' checksums there of the programs: SHA-256, in hexadecimal."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
