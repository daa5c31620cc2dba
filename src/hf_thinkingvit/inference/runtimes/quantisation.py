"""
Post-training quantisation of exported stages to int8, by the library of each runtime: NNCF for OpenVINO, and ONNX
Runtime's own.

Each stage is calibrated on the states that the stages before it, in float32, make of the calibration images. All images
pass through all stages, because the few that would exit late say less about the range of activations than all do.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from ...models.staged_run import State
from ...torch_free.programs import Output, ProgramFile
from .torch_program import StageProgram


CALIBRATION_BATCH = 8


def check_calibration(calibration: torch.Tensor | None, format: str, expected: tuple[int, ...]) -> None:
    """`ValueError` or `ImportError` unless stages can be quantised with these images."""
    if format == "openvino" and find_spec("nncf") is None:
        raise ImportError('int8 for OpenVINO needs nncf: pip install "hf-thinkingvit[openvino]".')
    fits = isinstance(calibration, torch.Tensor) and tuple(calibration.shape[1:]) == expected and len(calibration) > 0
    if not fits or not calibration.is_floating_point():
        got = tuple(calibration.shape) if isinstance(calibration, torch.Tensor) else type(calibration).__name__
        raise ValueError(
            f"`precision` = 'int8' needs `calibration`, preprocessed images as a float tensor (images, "
            f"{', '.join(map(str, expected))}), got {got}: a few hundred of the images that the model is for."
        )


def quantise_stages(folder: Path, format: str, stages: list[ProgramFile], calibration: torch.Tensor, load) -> None:
    """
    Replace the programs in `folder` by int8 ones. Programs must be in float32.

    Args:
        load (`Callable`): from a file and its outputs to a [`StageProgram`] in float32.
    """
    states: list[State] = [{"pixel_values": part} for part in calibration.float().split(CALIBRATION_BATCH)]
    for stage in stages:
        path = folder / stage.file
        program: StageProgram = load(path, stage.outputs)
        feeds = [{name: state[name].numpy() for name in program.inputs} for state in states]
        states = [_after(stage, program, state) for state in states]
        del program
        {"openvino": _with_nncf, "onnx": _with_onnxruntime}[format](path, feeds)


def _after(stage: ProgramFile, program: StageProgram, state: State) -> State:
    outputs: list[tuple[Output, torch.Tensor]] = list(zip(stage.outputs, program(state), strict=True))
    passed_on = {name: state[name] for name in stage.passed_on}
    return {**passed_on, **{output.name: tensor for output, tensor in outputs if output.is_state}}


def _with_nncf(path: Path, feeds: list[dict]) -> None:
    import nncf
    import openvino

    from ...torch_free.openvino_program import in_own_thread

    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # the file is written anew
    model = core.read_model(path)
    settings = {"model_type": nncf.ModelType.TRANSFORMER, "subset_size": len(feeds)}
    quantised = in_own_thread(lambda: nncf.quantize(model, nncf.Dataset(feeds), **settings))
    openvino.save_model(quantised, path, compress_to_fp16=False)


class _Feeds:
    """The feeds as ONNX Runtime's calibration reads them."""

    def __init__(self, feeds: list[dict]):
        self._feeds: Iterator[dict] = iter(feeds)

    def get_next(self) -> dict | None:
        return next(self._feeds, None)


def _with_onnxruntime(path: Path, feeds: list[dict]) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    quantised = path.with_suffix(".quantised")
    quantize_static(
        path,
        quantised,
        _Feeds(feeds),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        # Products with weights only: attention is a small part of the time, and its probabilities fit int8 badly.
        extra_options={"MatMulConstBOnly": True},
    )
    quantised.replace(path)
