"""Programs that ONNX Runtime runs, on the CPU unless its `providers` say otherwise."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from .programs import Output


class OnnxRuntimeProgram:
    """
    A program from a file, as [`Program`]. Threads may share it.

    Args:
        file (`Path`): the program's `.onnx`.
        outputs (`list[Output]`): what it returns.
        threads (`int`, *optional*): CPU threads; ONNX Runtime's own choice by default, one per physical core.
        providers (`Sequence`, *optional*):
            Execution providers as `onnxruntime.InferenceSession` takes them; by default the CPU's. The state passes
            through host memory whatever they are.
        config (`Mapping[str, str]`, *optional*): entries of the session's configuration.
    """

    def __init__(
        self,
        file: Path,
        outputs: list[Output],
        threads: int | None = None,
        providers: Sequence[Any] | None = None,
        config: Mapping[str, str] | None = None,
    ):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; its optimiser warns of what is no fault
        if threads is not None:
            options.intra_op_num_threads = threads
        for name, value in (config or {}).items():
            options.add_session_config_entry(name, value)
        providers = list(providers) if providers else ["CPUExecutionProvider"]
        available = onnxruntime.get_available_providers()
        for provider in providers:
            name = provider if isinstance(provider, str) else provider[0]
            if name not in available:  # it would be left out with a warning, and the CPU take its place
                raise ValueError(f"This ONNX Runtime has no provider {name!r}, only {', '.join(available)}.")
        self._session = onnxruntime.InferenceSession(file, options, providers=providers)
        self.inputs = [value.name for value in self._session.get_inputs()]
        self._names = [value.name for value in self._session.get_outputs()]
        self.outputs = [(output.shape, output.dtype) for output in outputs]

    def run(self, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> None:
        """As in [`Program`]: bound to the memory of the arrays, so that nothing is copied."""
        binding = self._session.io_binding()
        for name, array in zip(self.inputs, inputs, strict=True):
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, _address(array))
        for name, array in zip(self._names, outputs, strict=True):
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, _address(array))
        self._session.run_with_iobinding(binding)


_NOTHING = np.zeros(1)


def _address(array: np.ndarray) -> int:
    """Of the array's memory; any where it has no element, which may be at 0, which ONNX Runtime refuses."""
    return (array if array.size else _NOTHING).__array_interface__["data"][0]
