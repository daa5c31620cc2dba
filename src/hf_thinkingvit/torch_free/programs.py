"""
Runtimes by name: what runs the programs of an exported folder. A new runtime is one class and one module beside this
one.

A program reads and writes NumPy arrays in memory of its caller, so that callers with other tensors (torch's, in
`inference/runtimes/`) share theirs without copies. It knows neither models nor exits.
"""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..models.configuration_checks import check_integer


# Names of the inputs of a decision's program: entries of the stage's answer, of what the decision before remembers, τ.
ANSWER_PREFIX, MEMORY_PREFIX, THRESHOLD = "answer.", "memory.", "threshold"

PRECISIONS = ("fp32", "bf16", "fp16", "int8")


@dataclass(frozen=True)
class Output:
    """
    An output of a program.

    Attributes:
        name (`str`): of the answer's, the verdict's, the state's or the memory's entry.
        shape (`list[int]`): of one image.
        dtype (`str`): of the exported program, as torch calls it.
        is_state (`bool`): whether it is for the next stage (an entry of the state, or of what an exit rule remembers).
    """

    name: str
    shape: list[int]
    dtype: str
    is_state: bool


@dataclass(frozen=True)
class ProgramFile:
    """
    What an exported folder says of a program: of a stage, or of the decision after it.

    Attributes:
        file (`str`): its name in the folder.
        outputs (`list[Output]`): of the program, in order.
        passed_on (`list[str]`): entries of the state, or of the memory, that go to the next stage as they came.
    """

    file: str
    outputs: list[Output]
    passed_on: list[str]

    @classmethod
    def from_manifest(cls, entry: Mapping[str, Any]) -> "ProgramFile":
        return cls(entry["file"], [Output(**output) for output in entry["outputs"]], entry["passed_on"])


class Program(Protocol):
    """
    Attributes:
        inputs (`list[str]`): the names of what it reads.
        outputs (`list[tuple[list[int], str]]`): of each output the shape of one image, and the dtype as torch calls it.
    """

    inputs: list[str]
    outputs: list[tuple[list[int], str]]

    def run(self, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> None:
        """
        Read the inputs, in order, and write the outputs, in order, whose first dimension is the image. Arrays must be
        contiguous, and writable; bfloat16, which NumPy lacks, is in arrays of int16.
        """
        ...


def numpy_dtype(name: str) -> np.dtype:
    """The dtype of the arrays for a dtype as torch calls it."""
    return np.dtype("int16" if name == "bfloat16" else name)


@dataclass(frozen=True)
class Runtime:
    """
    Attributes:
        package (`str`): that must be installed.
        extra (`str`): of this package, which installs it.
        file_format (`str`): of the programs, as in `export_model`.
        check_precision (`Callable`): `(precision, stored)`: `ValueError` for a precision that it cannot compute in, of
            a folder that was exported in the precision `stored`.
        load (`Callable`): `(file, outputs, precision, options)` to a [`Program`].
        options (`tuple[str, ...]`): that `load` takes.
    """

    package: str
    extra: str
    file_format: str
    check_precision: Callable[[str, str], None]
    load: Callable[[Path, list[Output], str, Mapping[str, Any]], Program]
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


def _load_openvino(file: Path, outputs: list[Output], precision: str, options: Mapping[str, Any]) -> Program:
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


def _load_onnxruntime(file: Path, outputs: list[Output], precision: str, options: Mapping[str, Any]) -> Program:
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
FORMATS = {runtime.file_format: name for name, runtime in RUNTIMES.items()}


def check_precision_name(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}.")


def choose_precision(manifest: Mapping[str, Any], precision: str | None, options: Mapping[str, Any]) -> str:
    """
    The precision in which to run an exported folder.

    Args:
        manifest (`Mapping`): of the folder.
        precision (`str`, *optional*): what the caller asks for; by default what the folder was exported in.
        options (`Mapping`): of the runtime, which are checked as well.

    Raises:
        ValueError: for a precision that the CPU or the runtime lacks, and options that it does not have.
        ImportError: if the runtime is not installed.
    """
    runtime = RUNTIMES[FORMATS[manifest["format"]]]
    runtime.check_installed()
    stored = manifest["precision"]
    precision = stored if precision is None else precision
    check_precision_name(precision)
    runtime.check_precision(precision, stored)
    runtime.check_options(options)
    return precision


def pixel_dtype(manifest: Mapping[str, Any]) -> str:
    """The dtype of the pixel values that the programs of an exported folder take."""
    return "float16" if (manifest["format"], manifest["precision"]) == ("onnx", "fp16") else "float32"


def check_pixel_values(
    pixel_values: Any, array_type: type, is_floating: Callable[[Any], bool], manifest: Mapping[str, Any]
) -> None:
    """`ValueError` unless `pixel_values` is an array of `array_type` with images that the programs take."""
    expected = (manifest["num_channels"], *manifest["image_size"])
    if not isinstance(pixel_values, array_type) or tuple(pixel_values.shape[1:]) != expected:
        got = tuple(pixel_values.shape) if isinstance(pixel_values, array_type) else type(pixel_values).__name__
        raise ValueError(
            f"`pixel_values` must be a `{array_type.__name__}` of the shape (batch_size, "
            f"{', '.join(map(str, expected))}), for which the programs were exported, got {got}. Resize images with "
            "the folder's image processor, or export the model with another `config.image_size`."
        )
    if len(pixel_values) == 0:
        raise ValueError("`pixel_values` must have at least one image: the exported programs take no empty batch.")
    if not is_floating(pixel_values):
        raise ValueError(
            f"`pixel_values` must be floating-point numbers, as the image processor returns them, got "
            f"{pixel_values.dtype}."
        )


# What the allocators of the runtimes say. Their exceptions have no class of their own for it.
_OUT_OF_MEMORY = ("bad_alloc", "bad allocation", "failed to allocate memory", "out of memory", "not enough memory")


@contextmanager
def memory_errors(error_class: type[Exception] = MemoryError):
    """Raises `error_class` where a runtime says that memory ran out."""
    try:
        yield
    except error_class:
        raise
    except Exception as error:
        if any(words in str(error).lower() for words in _OUT_OF_MEMORY):
            raise error_class(str(error)) from error
        raise
