"""Programs of a runtime over torch's tensors, which share their memory with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ...models.staged_run import State
from ...torch_free.programs import Output, Program, Runtime, memory_errors


class StageProgram(Protocol):
    """
    Attributes:
        inputs (`list[str]`): the entries of the state that it reads.
    """

    inputs: list[str]

    def __call__(self, state: State) -> list[torch.Tensor]:
        """The outputs for a batch on the CPU, in the order in which they were exported, each in its own memory."""
        ...


class TorchProgram:
    """A [`Program`] as a [`StageProgram`]. Threads may share it."""

    def __init__(self, program: Program):
        self._program, self.inputs = program, program.inputs
        self._outputs = [(shape, getattr(torch, dtype)) for shape, dtype in program.outputs]

    def __call__(self, state: State) -> list[torch.Tensor]:
        count = len(state[self.inputs[0]])
        with memory_errors(torch.OutOfMemoryError):  # which the engine answers by halving
            inputs = [state[name].contiguous() for name in self.inputs]
            outputs = [torch.empty((count, *shape), dtype=dtype) for shape, dtype in self._outputs]
            self._program.run([_array(tensor) for tensor in inputs], [_array(tensor) for tensor in outputs])
        return outputs


def load_program(
    runtime: Runtime, file: Path, outputs: list[Output], precision: str = "fp32", options: Mapping[str, Any] = {}
) -> StageProgram:
    """A program from a file, in a runtime."""
    return TorchProgram(runtime.load(file, outputs, precision, options))


def _array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory, as a program takes it."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
