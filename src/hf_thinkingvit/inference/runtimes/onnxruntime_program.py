"""Stages that ONNX Runtime runs, on the CPU unless its `providers` say otherwise."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from ...models.staged_run import State
from .programs import Output, memory_errors


class OnnxRuntimeProgram:
    """
    A program from a file, as [`StageProgram`]. Threads may share it.

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
        self._outputs = [(output.shape, getattr(torch, output.dtype)) for output in outputs]

    def __call__(self, state: State) -> list[torch.Tensor]:
        count = len(state[self.inputs[0]])
        with memory_errors():
            # Bound to torch's memory on both sides: nothing is copied.
            binding = self._session.io_binding()
            inputs = [state[name].contiguous() for name in self.inputs]
            outputs = [torch.empty((count, *shape), dtype=dtype) for shape, dtype in self._outputs]
            for name, tensor in zip(self.inputs, inputs):
                binding.bind_input(name, "cpu", 0, _numpy_dtype(tensor), list(tensor.shape), _address(tensor))
            for name, tensor in zip(self._names, outputs):
                binding.bind_output(name, "cpu", 0, _numpy_dtype(tensor), list(tensor.shape), _address(tensor))
            self._session.run_with_iobinding(binding)
        return outputs


_NOTHING = torch.zeros(1)


def _address(tensor: torch.Tensor) -> int:
    """Of the tensor's memory; any where it has no element, for which torch's is 0, which ONNX Runtime refuses."""
    return tensor.data_ptr() if tensor.numel() else _NOTHING.data_ptr()


def _numpy_dtype(tensor: torch.Tensor) -> np.dtype:
    return tensor[:0].numpy().dtype
