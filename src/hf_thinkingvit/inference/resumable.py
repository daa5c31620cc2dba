"""One output file for many images, written by several processes, which a later run can complete after an abort."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from .runtimes import ExportedModel


SUFFIXES = (".jsonl", ".parquet")


def printable(text: str) -> str:
    r"""Replace bytes that are not UTF-8 by `\xff`: file names may contain them, JSON and Parquet files may not."""
    return re.sub("[\ud800-\udfff]", lambda found: _escaped(ord(found[0])), text)


def _escaped(surrogate: int) -> str:
    # Python decodes the byte b of a file name as U+DC00 + b; other lone surrogates come from Windows.
    return f"\\x{surrogate - 0xDC00:02x}" if 0xDC80 <= surrogate <= 0xDCFF else f"\\u{surrogate:04x}"


def model_fingerprint(model: PreTrainedModel | ExportedModel, processor: BaseImageProcessor | None = None) -> str:
    """
    Hash (16 hexadecimal digits) of everything that answers depend on: weights or exported programs with their
    precision, configuration, image processor.
    """
    digest = hashlib.sha256()
    for part in (model.config, *([] if processor is None else [processor])):
        fields = json.loads(part.to_json_string())
        for name in ("_name_or_path", "transformers_version"):  # where and by which version it was saved
            fields.pop(name, None)
        digest.update(json.dumps(fields, sort_keys=True).encode())
    if isinstance(model, ExportedModel):
        programs = {"precision": model.precision, **model.manifest["sha256"]}
        digest.update(json.dumps(programs, sort_keys=True).encode())
        return digest.hexdigest()[:16]
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def fingerprint(texts: Iterable[str]) -> str:
    """Hash (16 hexadecimal digits) of a sequence of texts."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(f"{len(encoded)}:".encode() + encoded)
    return digest.hexdigest()[:16]


class ResumableOutput:
    r"""
    A JSONL or Parquet file with one line per image, in input order.

    Until it is complete, each process appends lines to its own hidden file beside it (a *part*), and `NAME.run.json`
    stores the facts of the run (the *header*). A later run, with any number of processes, continues from all parts if
    its facts are the same, and is refused otherwise. Images that could not be read are tried again. The output file
    itself appears only when it is complete. It has a line for every image; that of one that could not be read has an
    `error` instead of an answer.

    With `identities`, a run with the same facts also updates a complete output: images that are new or have changed are
    answered, the lines of the others stay, and those of images that are gone are dropped. In the same way, images may
    have come, gone or changed since a run that was interrupted.

    Args:
        path (path): ends in `.jsonl` or `.parquet`.
        facts (`dict`): everything that the answers depend on (model, τ, source), serializable as JSON.
        names (`Sequence[str]`): one per image, in order; bytes that are not UTF-8 are escaped.
        state (`PartialState`): Accelerate's. Every process creates the output, with the same other arguments.
        identities (`Sequence[str]`, *optional*): one per image, which changes when the image does, such as size and
            modification time of a file.

    Attributes:
        places (`list[int]`): indices of the images that this process has to answer.
        done (`int`): number of images that earlier runs answered; images that they could not read do not count.
        is_update (`bool`): whether the output was complete before.

    Raises:
        FileExistsError: if the output is complete already and there are no `identities`, or it or the parts were made
            with other facts or have no header; the message says which, and which files to remove to start anew.
        ValueError: if `path` has another suffix.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        facts: Mapping[str, Any],
        names: Sequence[str],
        state: PartialState,
        identities: Sequence[str] | None = None,
    ):
        self.path, self.names, self.state = Path(path), [printable(name) for name in names], state
        if self.path.suffix not in SUFFIXES:
            raise ValueError(f"The output must end in {' or '.join(SUFFIXES)}, got {self.path.name!r}.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.header = self.path.with_name(f"{self.path.name}.run.json")
        self.files = self.path.with_name(f".{self.path.name}.files.json")  # identities of a complete output's images
        self.identities = None if identities is None else dict(zip(self.names, identities))
        self.is_update = self.path.exists()
        if self.identities is None:
            self._refuse_complete()
        facts = json.loads(json.dumps({**facts, **self._images()}))
        if self.is_update:
            self._refuse_other_output(facts)
        self._refuse_other(facts)
        self.same_images = self._read_header().items() >= self._images().items()
        self.earlier = self._unchanged_lines() if self.is_update else {}
        lines = {**self.earlier, **self._read_lines()}
        if names and not lines and (self.is_update or self._has_lines()):
            there = [self.path] if self.is_update else self._parts()
            raise FileExistsError(
                f"{'The complete output' if self.is_update else 'An unfinished run to'} {self.path} is of other images "
                "than these (by names, sizes and times). Choose another output, or start anew by removing "
                f"{', '.join(map(str, there))}."
            )
        answered = {place for place, line in lines.items() if "error" not in line}
        # All processes must have read the parts before any of them writes.
        state.wait_for_everyone()
        if state.is_main_process:
            # Replaces a header that an earlier run may have left without parts.
            self._replace(self.header, _as_json(facts, indent=1))
        # The header must exist before any part: a later run would read the part with an older header, or without one.
        state.wait_for_everyone()
        self.done = len(answered)
        self.places = [place for place in range(len(names)) if place not in answered][
            state.process_index :: state.num_processes
        ]
        part = self._part(state.process_index)
        if part.exists():
            whole, _, _ = part.read_bytes().rpartition(b"\n")
            os.truncate(part, len(whole) + 1 if whole else 0)  # drop an incomplete last line
        self._file = part.open("ab")

    def write(self, place: int, **line: Any) -> None:
        """Append the line of image `place`. One with only `error` says why the image has no answer."""
        name = self.names[place]
        identity = {} if self.identities is None else {"identity": self.identities[name]}
        self._file.write(_as_json({"place": place, "name": name, **identity, **line}))
        self._file.flush()

    def finish(self) -> tuple[int, int] | None:
        """
        Wait for all processes, then write the output in the main process.

        Returns:
            In the main process, how many images were answered and how many could not be read; `None` in the others.

        Raises:
            RuntimeError: if images have no line, for instance because a process died; another run continues from here.
        """
        self._file.close()
        self.state.wait_for_everyone()
        if not self.state.is_main_process:
            return None
        lines = {**self.earlier, **self._read_lines()}
        missing = len(self.names) - len(lines)
        if missing:
            raise RuntimeError(f"{missing} of {len(self.names)} images have no answer yet: start again to go on.")
        ordered = [lines[place] for place in range(len(self.names))]
        rows = [{name: line[name] for name in line if name not in ("place", "identity")} for line in ordered]
        if self.path.suffix == ".parquet":
            import datasets  # here, because it imports pandas, which everybody who imports this package would wait for

            columns = dict.fromkeys(name for row in [*rows, {"error": None}] for name in row)
            table = datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})
            temporary = self.path.with_name(f".{self.path.name}.partial")
            table.cast_column("error", datasets.Value("string")).to_parquet(temporary)
            temporary.replace(self.path)
        else:
            self._replace(self.path, b"".join(map(_as_json, rows)))
        if self.identities is not None:  # after the output: a row without an identity is answered again
            self._replace(self.files, _as_json(self.identities))
        self._remove_parts()
        unreadable = sum("error" in row for row in rows)
        return len(rows) - unreadable, unreadable

    def _images(self) -> dict[str, Any]:
        """The facts that tell which images there are."""
        facts = {"images": len(self.names), "names": fingerprint(self.names)}
        if self.identities is not None:
            facts["contents"] = fingerprint(self.identities.values())
        return facts

    def _unchanged_lines(self) -> dict[int, dict[str, Any]]:
        """The lines of the complete output for images that are there, and the same, by place."""
        if self.path.suffix == ".parquet":
            from pyarrow.parquet import read_table

            rows = read_table(self.path).to_pylist()
            rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
        else:
            rows = [json.loads(text) for text in self.path.read_bytes().split(b"\n")[:-1]]
        try:
            identities = json.loads(self.files.read_bytes())
        except (OSError, ValueError):  # killed before it was written: all is answered again
            identities = {}
        places = {name: place for place, name in enumerate(self.names)}
        same = {name for name, identity in self.identities.items() if identities.get(name) == identity}
        return {places[row["name"]]: {"place": places[row["name"]], **row} for row in rows if row["name"] in same}

    def _part(self, process: int) -> Path:
        return self.path.with_name(f".{self.path.name}.{process}.part")

    def _parts(self) -> list[Path]:
        """The parts of all processes of all runs."""
        pattern = re.compile(rf"\.{re.escape(self.path.name)}\.\d+\.part")
        return sorted(path for path in self.path.parent.iterdir() if pattern.fullmatch(path.name))

    def _remove_parts(self) -> None:
        for part in self._parts():
            part.unlink()

    def _read_lines(self) -> dict[int, dict[str, Any]]:
        """
        The lines of all parts, by place. Incomplete and damaged lines are ignored, and those of images that have
        changed. A line with `error` counts only if no other line answers the image.
        """
        lines: dict[int, dict[str, Any]] = {}
        places = {name: place for place, name in enumerate(self.names)}
        for part in self._parts():
            for text in part.read_bytes().split(b"\n")[:-1]:  # not `splitlines`: names may contain other separators
                try:
                    line = json.loads(text)
                    earlier_version = "identity" not in line and self.same_images
                    if self.identities is None or earlier_version:
                        place = line["place"]
                        fits = place >= 0 and line["name"] == self.names[place]
                    else:  # images before it may have come or gone
                        place = places[line["name"]]
                        fits = line["identity"] == self.identities[line["name"]]
                except (ValueError, LookupError, TypeError):
                    continue
                if fits and "error" in lines.get(place, {"error": "none yet"}):
                    lines[place] = {**line, "place": place}
        return lines

    def _has_lines(self) -> bool:
        """Whether an earlier run has got as far as the end of a line."""
        return any(b"\n" in part.read_bytes() for part in self._parts())

    def _refuse_complete(self) -> None:
        if not self.path.exists():
            return
        if self.state.is_main_process:
            self._remove_parts()  # left by a run that was killed after it had written the output
        raise FileExistsError(f"{self.path} is there already, and complete. Choose another output.")

    def _refuse_other_output(self, facts: dict[str, Any]) -> None:
        """Refuse to update a complete output that was made with other facts than which images there are."""
        anew = f"Choose another output, or start anew by removing {self.path}."
        ignored = self._images()
        self._refuse_changes(
            f"The complete output {self.path}",
            {name: facts[name] for name in facts if name not in ignored},
            anew,
            ignored,
        )

    def _refuse_other(self, facts: dict[str, Any]) -> None:
        """Refuse to continue parts that were made with other facts."""
        parts = [str(part) for part in self._parts() if part.stat().st_size]
        if parts:
            anew = f"Choose another output, or start anew by removing {', '.join(parts)}."
            ignored = () if self.identities is None else self._images()
            facts = {name: value for name, value in facts.items() if name not in ignored}
            self._refuse_changes(f"An unfinished run to {self.path}", facts, anew, ignored)

    def _refuse_changes(self, what: str, facts: dict[str, Any], anew: str, ignored: Iterable[str] = ()) -> None:
        earlier = self._read_header()
        if not earlier:
            raise FileExistsError(
                f"{what} cannot be continued: {self.header}, which stores the facts of the run, is missing or damaged. "
                f"{anew}"
            )
        earlier = {name: value for name, value in earlier.items() if name not in ignored}
        changes = [
            f"{name} was {earlier.get(name)!r} and is {facts.get(name)!r}"
            for name in {**earlier, **facts}
            # Compared as text as well, since NaN != NaN; not only as text, since 1 == 1.0.
            if earlier.get(name) != facts.get(name)
            and json.dumps(earlier.get(name), sort_keys=True) != json.dumps(facts.get(name), sort_keys=True)
        ]
        if changes:
            raise FileExistsError(f"{what} has other facts: {'; '.join(changes)}. {anew}")

    def _read_header(self) -> dict[str, Any]:
        """The facts of the earlier run; empty if they are missing or damaged."""
        try:
            header = json.loads(self.header.read_bytes())
        except (OSError, ValueError):
            return {}
        return header if isinstance(header, dict) else {}

    @staticmethod
    def _replace(path: Path, content: bytes) -> None:
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_bytes(content)
        temporary.replace(path)


def _as_json(value: Any, **options: Any) -> bytes:
    # Lone surrogates, which UTF-8 cannot encode, become JSON escapes.
    return json.dumps(value, ensure_ascii=False, **options).encode("utf-8", "backslashreplace") + b"\n"
