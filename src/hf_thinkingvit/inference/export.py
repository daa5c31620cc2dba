"""
Export of models that think in stages for runtimes without Python, as `torch.export` programs and as ONNX files.

There are two forms. *One program per stage*, for any batch size: the caller passes the images that go on from one
program to the next. *One program of all stages*, for one image: a conditional after each stage skips the later ones if
the image exits. In both, τ is an input of the program, not a constant. So is the number that a rule compares with that
draws one for each image (PonderNet's sampling), uniform in [0, 1): programs draw nothing themselves.
"""

import copy
import json
import os
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_onnx_available

from ..models.configuration_checks import as_pair
from ..models.configuration_staged import thinks_in_stages
from ..models.staged_loop import MEMORY_PREFIX, answer_stage, first_state, step_stage
from ..models.staged_run import Answer, State


NOISE = MEMORY_PREFIX + "noise"  # the entry of the first state that a rule draws


class _StageProgram(nn.Module):
    """One stage, including the step that leads to it: recycling, or the embeddings for the first stage."""

    def __init__(self, model: PreTrainedModel, stage_index: int):
        super().__init__()
        self.model, self.stage_index = model, stage_index
        self.rule, self.stages = model.exit_rule(), range(model.config.num_stages)

    def forward(self, state: State, threshold: torch.Tensor) -> dict[str, torch.Tensor | State]:
        rule = replace(self.rule, thresholds=tuple(threshold.unbind()))
        step = step_stage(self.model, rule, self.stages, self.stage_index, state)
        # Programs are specialised on strides. Callers pass selected rows, which are contiguous, and the branches of a
        # conditional must agree.
        answer = {name: tensor.contiguous() for name, tensor in step.answer.items()}
        is_last = self.stage_index == self.stages[-1]
        state = {} if is_last else {name: tensor.contiguous() for name, tensor in step.state.items()}
        return {**answer, "exits": step.exits, "state": state}


class StageSteps(nn.Module):
    """
    One stage without the exit rule, for runtimes that the package's own loop drives: its answers and its state, without
    those entries of the state that it only passes on (`passed_on`), which need not go through a program.
    """

    def __init__(self, model: PreTrainedModel, stage_index: int, passed_on: tuple[str, ...] = ()):
        super().__init__()
        self.model, self.stage_index, self.passed_on = model, stage_index, passed_on
        self.stages = range(model.config.num_stages)

    def forward(self, state: State) -> dict[str, Answer | State]:
        answer, state = answer_stage(self.model, self.stages, self.stage_index, state)
        # The entropy over pixels is a task's own measure of its logits, which it takes in float32.
        # Entries that the state has as well are computed anew: OpenVINO takes no output twice, and no copy for another.
        answer = {
            name: tensor + 0 if name in state else tensor.contiguous()
            for name, tensor in answer.items()
            if name != "entropy"
        }
        if self.stage_index == self.stages[-1]:
            return {"answer": answer, "state": {}}
        kept = {name: tensor.contiguous() for name, tensor in state.items() if name not in self.passed_on}
        return {"answer": answer, "state": kept}


class _AdaptiveProgram(nn.Module):
    """All stages for one image, each but the first behind a conditional."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.stages = nn.ModuleList([_StageProgram(model, index) for index in range(model.config.num_stages)])

    def forward(
        self, pixel_values: torch.Tensor, threshold: torch.Tensor, noise: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        names: list[str] = []
        drawn = {} if noise is None else {NOISE: noise}
        *answer, exit_stage = self._run(0, {"pixel_values": pixel_values, **drawn}, threshold, names)
        answer = dict(zip(names, answer))
        entropy = answer.pop("entropy")
        return {**answer, "exit_stage": exit_stage, "entropy": entropy}

    def _run(self, index: int, state: State, threshold: torch.Tensor, names: list[str]) -> tuple[torch.Tensor, ...]:
        """Returns the entries of the accepted answer and the exit stage; writes the names of the entries to `names`."""
        outputs = self.stages[index](state, threshold)
        exits, state = outputs.pop("exits"), outputs.pop("state")
        if not names:
            names.extend(outputs)
        if index == len(self.stages) - 1:
            # Copies: an answer may pass on what the state held, which is an input of the conditional.
            entries = (tensor.clone() for tensor in outputs.values())
            return *entries, torch.full_like(outputs["entropy"], index, dtype=torch.long)
        state_names, num_entries = list(state), len(outputs)
        entropy_at = list(outputs).index("entropy")

        def accept(threshold, *tensors):
            # Copies, because a branch of `torch.cond` may not return its operands.
            entries = tuple(tensor.clone() for tensor in tensors[:num_entries])
            return *entries, torch.full_like(entries[entropy_at], index, dtype=torch.long)

        def go_on(threshold, *tensors):
            return self._run(index + 1, dict(zip(state_names, tensors[num_entries:])), threshold, list(names))

        # Copies, because operands of `torch.cond` may not share memory, as views of the embeddings do.
        operands = (threshold, *outputs.values(), *(tensor.clone() for tensor in state.values()))
        return torch.cond(exits[0], accept, go_on, operands)


def export_stages(model: PreTrainedModel) -> list[torch.export.ExportedProgram]:
    r"""
    Export each stage as a separate program, for images of `config.image_size` in batches of any size.

    Args:
        model (`PreTrainedModel`): a classifier that thinks in stages; it is not changed.

    Returns:
        One `torch.export.ExportedProgram` per stage. It takes `(state, threshold)`: for the first stage
        `{"pixel_values": (batch, channels, height, width)}` (with `exit_criterion` "pondernet" also
        `"_memory.noise": (batch,)`, float32 numbers in [0, 1) that the caller draws), for a later stage the rows of the
        previous stage's `state` that go on; and τ as float32 `(number of stages - 1,)`. It returns a dict of `logits`
        `(batch, num_labels)`, `entropy` `(batch,)`, `exits` `(batch,)`, bool, and `state` (tensors whose first
        dimension is the image; empty after the last stage, where every image exits).

    Raises:
        ValueError: if the model does not think in stages.
    """
    return [program for program, _ in _stage_programs(model)]


def export_adaptive(model: PreTrainedModel) -> torch.export.ExportedProgram:
    r"""
    Export all stages as one program for one image of `config.image_size`, with a `torch.cond` after each but the last.

    Returns:
        A `torch.export.ExportedProgram`. It takes `pixel_values` `(1, channels, height, width)` and τ as float32
        `(number of stages - 1,)` (with `exit_criterion` "pondernet" also `noise`, float32 `(1,)`), and returns a dict
        of `logits` `(1, num_labels)`, `exit_stage` `(1,)`, int64, and `entropy` `(1,)`.

    Raises:
        ValueError: if the model does not think in stages.
    """
    check_stages(model)
    state = first_state(model.exit_rule(), example_pixel_values(model, 1))
    drawn = (state[NOISE],) if NOISE in state else ()
    return export_program(_AdaptiveProgram(model), (state["pixel_values"], _default_threshold(model), *drawn), None)


@dataclass(frozen=True)
class OnnxFiles:
    """
    The files that `export_onnx` wrote.

    Attributes:
        stages: one file per stage, for batches of any size.
        adaptive: the file of all stages, for one image.
    """

    stages: list[Path]
    adaptive: Path


def export_onnx(model: PreTrainedModel, output_dir: str | os.PathLike, dtype: torch.dtype = torch.float32) -> OnnxFiles:
    r"""
    Write the model as ONNX: `stage_0.onnx`, `stage_1.onnx` and so on (see `export_stages`), and `adaptive.onnx` with an
    `If` after each stage but the last (see `export_adaptive`).

    Each entry of the state is a separate tensor: the output `stage_0.NAME` of stage 0, with only the rows of the images
    that go on, is the input of the same name of stage 1. Every file requires the input `threshold`, float32
    `(number of stages - 1,)`. It has no default, because OpenVINO drops inputs with a default and would always use that
    τ. The τ of `model.config` is in the files' metadata (`threshold`, a JSON list), beside `id2label`, `exit_criterion`
    and, of a model with pruning layers, `pruning_keep_rate`, which is fixed in the files. With `exit_criterion`
    "pondernet", `stage_0.onnx` and `adaptive.onnx` also require `noise`, float32 `(batch,)`: a number for each image,
    uniform in [0, 1).

    Args:
        model (`PreTrainedModel`):
            A classifier that thinks in stages, in any dtype; it is not changed, and other threads may use it meanwhile.
        output_dir (`str` or `os.PathLike`): the folder, created if it does not exist.
        dtype (`torch.dtype`): float32 or float16, for the files' weights and `pixel_values`, whatever the model's.

    Raises:
        ImportError: without the packages of the extra `onnx`.
        ValueError: if the model does not think in stages, or holds what cannot be copied; if `dtype` is neither float32
            nor float16.
    """
    check_onnx_is_there()
    output_dir = Path(output_dir)
    check_stages(model)
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"`dtype` must be torch.float32 or torch.float16, which onnxruntime computes in, got {dtype}.")
    model = copy_for_export(model, "eager", dtype)
    drawn = ["noise"] if model.exit_rule().draws else []
    programs, before = {}, ["pixel_values", *drawn]
    for index, (program, outputs) in enumerate(_stage_programs(model)):
        after = [f"stage_{index}.{name}" for name in outputs.pop("state")]
        programs[f"stage_{index}.onnx"] = (program, [*before, "threshold"], [*outputs, *after])
        before = after
    entries = [name for name in outputs if name not in ("entropy", "exits")]
    programs["adaptive.onnx"] = (
        export_adaptive(model),
        ["pixel_values", "threshold", *drawn],
        [*entries, "exit_stage", "entropy"],
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, (program, inputs, outputs) in programs.items():
        own_weights = name != "adaptive.onnx"  # where all stages slice the same weights
        write_onnx(program, model, inputs, outputs, output_dir / name, own_weights)
    stages = [output_dir / f"stage_{index}.onnx" for index in range(model.config.num_stages)]
    return OnnxFiles(stages, output_dir / "adaptive.onnx")


def check_onnx_is_there() -> None:
    if not (is_onnx_available() and find_spec("onnxscript")):
        raise ImportError('Writing ONNX needs onnx and onnxscript: pip install "hf-thinkingvit[onnx]".')


def check_stages(model: PreTrainedModel) -> None:
    if not thinks_in_stages(model):
        raise ValueError(f"{type(model).__name__} does not think in stages: there are none to export.")


def copy_for_export(
    model: PreTrainedModel, attention: str, dtype: torch.dtype, device: torch.device | None = None
) -> PreTrainedModel:
    """
    A copy of the model in evaluation mode, so that threads that use the model meanwhile see nothing of its export. It
    shares the weights that have this dtype and device already, and has no gradients.

    Args:
        model (`PreTrainedModel`): it is not changed.
        attention (`str`): the implementation of attention: `"eager"` for ONNX, which has its operations in every dtype,
            `"sdpa"` for OpenVINO, which has it as one operation.
        dtype (`torch.dtype`): of floating-point weights and buffers.
        device (`torch.device`, *optional*): by default the model's.

    Raises:
        ValueError: if the model holds what cannot be copied.
    """
    device = device or model.device
    memo: dict[int, torch.Tensor] = {}  # what `deepcopy` takes instead of copying
    for tensor in (*model.parameters(), *model.buffers()):
        moved = tensor.detach().to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
    try:
        copied = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:  # of pickle, and of tensors that are results of operations
        raise ValueError(
            f"The model is exported from a copy, which cannot be made of this one ({error}): remove the hooks and "
            "attributes that were added to it, or export the model as `from_pretrained` loads it."
        ) from error
    copied.set_attn_implementation(attention)
    return copied.eval()


def example_pixel_values(model: PreTrainedModel, batch_size: int) -> torch.Tensor:
    size = as_pair(model.config.image_size)
    return torch.zeros(batch_size, model.config.num_channels, *size, dtype=model.dtype, device=model.device)


def _default_threshold(model: PreTrainedModel) -> torch.Tensor:
    return torch.tensor(model.exit_rule().thresholds, dtype=torch.float32, device=model.device)


def _stage_programs(model: PreTrainedModel) -> list[tuple[torch.export.ExportedProgram, dict]]:
    """The program of each stage, and its outputs for a batch of two images."""
    check_stages(model)
    # Two images, because `torch.export` takes a dimension of size 1 for a constant.
    state = first_state(model.exit_rule(), example_pixel_values(model, 2))
    threshold, programs = _default_threshold(model), []
    for index in range(model.config.num_stages):
        batch = {name: {0: torch.export.Dim("batch")} for name in state}
        program = export_program(_StageProgram(model, index), (state, threshold), (batch, None))
        with torch.no_grad():
            outputs = program.module()(state, threshold)
        programs.append((program, outputs))
        state = outputs["state"]
    return programs


def export_program(module: nn.Module, arguments: tuple, dynamic_shapes: tuple | None) -> torch.export.ExportedProgram:
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            return torch.export.export(module, arguments, dynamic_shapes=dynamic_shapes, strict=True)
    finally:
        for submodule, training in modes:
            submodule.training = training


def write_onnx(
    program: torch.export.ExportedProgram,
    model: PreTrainedModel,
    inputs: list[str],
    outputs: list[str],
    path: Path,
    own_weights: bool,
) -> None:
    """With `own_weights`, the file stores only the weight slices that it uses; otherwise it slices whole weights."""
    import onnx_ir
    from onnxscript import optimizer

    exported = torch.onnx.export(program, input_names=inputs, output_names=outputs, dynamo=True, verbose=False)
    onnx_model, config = exported.model, model.config
    graph = onnx_model.graph
    if own_weights:
        optimizer.optimize_ir(onnx_model, input_size_limit=sys.maxsize, output_size_limit=sys.maxsize)
    for node in graph.all_nodes():
        node.metadata_props.clear()  # stack traces of the exporter, which contain local paths
    for value in (*graph.inputs, *graph.outputs):
        value.shape = onnx_ir.Shape([size if isinstance(size, int) else "batch" for size in value.shape])
    onnx_model.metadata_props.update(
        model_type=config.model_type,
        exit_criterion=config.exit_criterion,
        threshold=json.dumps(model.exit_rule().thresholds),
        id2label=json.dumps(config.id2label, ensure_ascii=False),
    )
    if getattr(config, "pruning_layers", None):
        onnx_model.metadata_props["pruning_keep_rate"] = json.dumps(config.pruning_keep_rate)
    temporary = path.with_suffix(".partial")
    exported.save(temporary)
    temporary.replace(path)
