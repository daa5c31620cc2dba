"""
Programs that OpenVINO runs on the CPU.

The state between stages has the precision that OpenVINO computes in. That is not only a saving of copies: an output in
float32 would make OpenVINO keep everything that is added up to it, the residual stream of all layers, in float32 as
well, with a conversion on both sides of every matrix product.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino.preprocess import PrePostProcessor

from .programs import Output


PRECISION_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
CAPABILITIES = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16", "int8": "INT8"}

_TYPES = {
    "float32": openvino.Type.f32,
    "float16": openvino.Type.f16,
    "bfloat16": openvino.Type.bf16,
    "int64": openvino.Type.i64,
    "int32": openvino.Type.i32,
    "bool": openvino.Type.boolean,
}


def in_own_thread(function: Callable[[], Any]) -> Any:
    """
    What `function` returns, called in a thread that ends with it. On CPUs with AMX, OpenVINO gives the thread that
    loads its CPU plugin an alternate stack for signals, and frees that with the plugin, from whatever thread: the next
    signal to the first thread, such as that a worker of a `DataLoader` has ended, then kills the process (2026.4).
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def capabilities() -> list[str]:
    """What this CPU computes in, as OpenVINO names it."""
    return in_own_thread(lambda: openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def check_precision(precision: str, stored: str) -> None:
    """`ValueError` for a precision that this CPU lacks, or that programs stored in another one cannot run in."""
    found = capabilities()
    if CAPABILITIES[precision] not in found:
        raise ValueError(
            f"This CPU does not compute in {precision} (OpenVINO would use float32 without a word): choose another "
            f"`precision`, of {', '.join(repr(name) for name, word in CAPABILITIES.items() if word in found)}."
        )
    if (precision == "int8") != (stored == "int8"):
        raise ValueError(
            f"The folder was exported in {stored}, so it cannot run in {precision}: int8 programs are made by "
            '`export_model(..., precision="int8", calibration=images)`, and the others by an export without it.'
        )


def compute_dtype(precision: str) -> str:
    """In which dtype OpenVINO computes what is not int8, and thus the state."""
    if precision == "int8":  # OpenVINO chooses by itself
        return "bfloat16" if "BF16" in capabilities() else "float32"
    return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision]


class OpenVINOProgram:
    """
    A program from a file, as [`Program`]. Threads may share it.

    Args:
        file (`Path`): the program's `.xml`.
        outputs (`list[Output]`): what it returns.
        precision (`str`): to compute in.
        threads (`int`, *optional*): CPU threads; all cores by default.
        config (`Mapping`, *optional*): further properties of `compile_model`.
    """

    def __init__(
        self,
        file: Path,
        outputs: list[Output],
        precision: str,
        threads: int | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        core = openvino.Core()
        # Mapped weights would break when the folder is written anew.
        core.set_property({"ENABLE_MMAP": False})
        dtype = compute_dtype(precision)
        model, self.outputs = core.read_model(file), []
        interface = PrePostProcessor(model)
        for port in model.inputs:
            if port.any_name != "pixel_values" and port.element_type == openvino.Type.f32:
                interface.input(port.any_name).tensor().set_element_type(_TYPES[dtype])
        for number, output in enumerate(outputs):
            own = dtype if output.is_state and output.dtype == "float32" else output.dtype
            interface.output(number).tensor().set_element_type(_TYPES[own])
            self.outputs.append((output.shape, own))
        properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if precision in PRECISION_HINTS:
            properties["INFERENCE_PRECISION_HINT"] = PRECISION_HINTS[precision]
        if threads is not None:
            properties["INFERENCE_NUM_THREADS"] = threads
        model = interface.build()
        self._compiled = in_own_thread(lambda: core.compile_model(model, "CPU", {**properties, **(config or {})}))
        self.inputs = [port.any_name for port in self._compiled.inputs]
        self._input_types = [port.element_type for port in self._compiled.inputs]
        self._output_types = [_TYPES[name] for _, name in self.outputs]
        self._requests = threading.local()

    def run(self, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> None:
        """As in [`Program`]: OpenVINO's tensors share the memory of the arrays, so that nothing is copied."""
        request = self._request()
        for number, (array, kind) in enumerate(zip(inputs, self._input_types, strict=True)):
            request.set_input_tensor(number, _shared(array, kind))
        for number, (array, kind) in enumerate(zip(outputs, self._output_types, strict=True)):
            request.set_output_tensor(number, _shared(array, kind))
        request.infer()

    def _request(self) -> openvino.InferRequest:
        if not hasattr(self._requests, "own"):
            self._requests.own = self._compiled.create_infer_request()
        return self._requests.own


def _shared(array: np.ndarray, kind: openvino.Type) -> openvino.Tensor:
    """The array's memory, as a tensor of OpenVINO."""
    if kind == openvino.Type.bf16:  # which NumPy lacks
        return openvino.Tensor(array, openvino.Shape(array.shape), kind)
    return openvino.Tensor(array, shared_memory=True)
