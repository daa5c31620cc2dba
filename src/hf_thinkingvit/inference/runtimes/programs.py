"""
Runtimes by name: what runs the program of one stage. A new runtime is one class here and one module beside this one.

A program is called with the state of a batch, a dict of tensors on the CPU, and returns its outputs in order, each in
memory of its own. It knows neither models nor exits.
"""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

from ...models.configuration_checks import check_integer
from ...models.staged_run import State


PRECISIONS = ("fp32", "bf16", "fp16", "int8")


@dataclass(frozen=True)
class Output:
    """
    An output of a program.

    Attributes:
        name (`str`): of the answer's or the state's entry.
        shape (`list[int]`): of one image.
        dtype (`str`): of the exported program, as torch calls it.
        is_state (`bool`): whether it is an entry of the state, for the next stage, or of the answer.
    """

    name: str
    shape: list[int]
    dtype: str
    is_state: bool


@dataclass(frozen=True)
class StageFile:
    """
    What an exported folder says of a stage.

    Attributes:
        file (`str`): its program.
        outputs (`list[Output]`): of the program, in order.
        passed_on (`list[str]`): entries of the state that go to the next stage as they came.
    """

    file: str
    outputs: list[Output]
    passed_on: list[str]


class StageProgram(Protocol):
    """
    Attributes:
        inputs (`list[str]`): the entries of the state that it reads.
    """

    inputs: list[str]

    def __call__(self, state: State) -> list[torch.Tensor]:
        """The outputs for a batch, in the order in which they were exported."""
        ...


@dataclass(frozen=True)
class Runtime:
    """
    Attributes:
        package (`str`): that must be installed.
        extra (`str`): of this package, which installs it.
        file_format (`str`): of the programs, as in `export_model`.
        check_precision (`Callable`): `(precision, stored)`: `ValueError` for a precision that it cannot compute in, of
            a folder that was exported in the precision `stored`.
        load (`Callable`): `(file, outputs, precision, options)` to a [`StageProgram`].
        options (`tuple[str, ...]`): that `load` takes.
    """

    package: str
    extra: str
    file_format: str
    check_precision: Callable[[str, str], None]
    load: Callable[[Path, list[Output], str, dict[str, Any]], StageProgram]
    options: tuple[str, ...]

    def check_installed(self) -> None:
        if find_spec(self.package) is None:
            raise ImportError(
                f'The runtime {self.package!r} is not installed: pip install "hf-thinkingvit[{self.extra}]", or '
                f"pip install {self.package}."
            )

    def check_options(self, options: Mapping[str, Any]) -> None:
        """`ValueError` for options that this runtime does not have."""
        unknown = sorted(options.keys() - set(self.options))
        if unknown:
            raise ValueError(f"{self.package} has the options {', '.join(self.options)}, got {', '.join(unknown)}.")
        if options.get("threads") is not None:
            check_integer("threads", options["threads"], minimum=1)


def _openvino_precision(precision: str, stored: str) -> None:
    from .openvino_program import check_precision

    check_precision(precision, stored)


def _load_openvino(file: Path, outputs: list[Output], precision: str, options: dict[str, Any]) -> StageProgram:
    from .openvino_program import OpenVINOProgram

    return OpenVINOProgram(file, outputs, precision, **options)


def _onnxruntime_precision(precision: str, stored: str) -> None:
    if precision == "bf16":
        raise ValueError(
            "onnxruntime does not compute in bf16 on a CPU: choose another `precision`, or the runtime 'openvino'."
        )
    if precision != stored:
        raise ValueError(
            f"An ONNX file has the precision that it was exported in, which is {stored!r}, got `precision` = "
            f"{precision!r}: export the model with it, or leave it out."
        )


def _load_onnxruntime(file: Path, outputs: list[Output], precision: str, options: dict[str, Any]) -> StageProgram:
    from .onnxruntime_program import OnnxRuntimeProgram

    return OnnxRuntimeProgram(file, outputs, **options)


RUNTIMES: dict[str, Runtime] = {
    "openvino": Runtime("openvino", "openvino", "openvino", _openvino_precision, _load_openvino, ("threads", "config")),
    "onnxruntime": Runtime(
        *("onnxruntime", "onnx", "onnx"),
        _onnxruntime_precision,
        _load_onnxruntime,
        ("threads", "providers", "config"),
    ),
}


def check_precision_name(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}.")


# What the allocators of the runtimes say. Their exceptions have no class of their own for it.
_OUT_OF_MEMORY = ("bad_alloc", "bad allocation", "failed to allocate memory", "out of memory", "not enough memory")


@contextmanager
def memory_errors():
    """Raises `torch.OutOfMemoryError` where a runtime says that memory ran out, which the engine answers by halving."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if any(words in str(error).lower() for words in _OUT_OF_MEMORY):
            raise torch.OutOfMemoryError(str(error)) from error
        raise
