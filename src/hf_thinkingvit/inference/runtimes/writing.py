"""Writes the programs of an exported folder: of each stage, and of the decision after it."""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ...models.staged_loop import answer_stage
from ...models.staged_run import State
from ...torch_free.programs import Output, ProgramFile
from ..export import StageSteps, example_pixel_values, export_program, write_onnx
from ..judges import StageJudge


SUFFIXES = {"openvino": ".xml", "onnx": ".onnx"}


@torch.no_grad()
def write_programs(
    model: PreTrainedModel, output_dir: Path, format: str, with_decisions: bool
) -> tuple[list[ProgramFile], list[ProgramFile]]:
    """The programs of the stages, and those of the decisions after them."""
    stages, judges, indices = [], [], range(model.config.num_stages)
    # Two images, because `torch.export` takes a dimension of size 1 for a constant.
    state: State = {"pixel_values": example_pixel_values(model, 2)}
    remembered = model.exit_rule().first_memory(2)
    for index in indices:
        _, after = answer_stage(model, indices, index, state)
        is_last = index == indices[-1]
        passed_on = tuple(name for name in after if not is_last and after[name] is state.get(name))
        program = _export(StageSteps(model, index, passed_on), state)
        answer, kept = program.module()(state).values()
        outputs = [*_outputs(answer, is_state=False), *_outputs(kept, is_state=True)]
        names = [f"{'state' if output.is_state else 'answer'}.{output.name}" for output in outputs]
        stages.append(ProgramFile(f"stage_{index}{SUFFIXES[format]}", outputs, list(passed_on)))
        _write(program, model, state, names, output_dir / stages[-1].file, format)
        state = {**{name: state[name] for name in passed_on}, **kept}
        if with_decisions:
            judge = StageJudge(model, index, answer, remembered)
            inputs = judge.inputs(answer, remembered)
            program = _export(judge, inputs)
            verdict, memory = program.module()(inputs).values()
            outputs = [*_outputs(verdict, is_state=False), *_outputs(memory, is_state=True)]
            names = [f"output.{output.name}" for output in outputs]  # ONNX has no two values of a name
            judges.append(ProgramFile(f"judge_{index}{SUFFIXES[format]}", outputs, list(judge.passed_on)))
            _write(program, model, inputs, names, output_dir / judges[-1].file, format)
            remembered = {**{name: remembered[name] for name in judge.passed_on}, **memory}
    return stages, judges


def _export(module: nn.Module, inputs: State) -> torch.export.ExportedProgram:
    """For batches of any size."""
    batch = {name: {0: torch.export.Dim("batch")} for name in inputs}
    return export_program(module, (inputs,), (batch,))


def _outputs(entries: State, is_state: bool) -> list[Output]:
    return [
        Output(name, list(tensor.shape[1:]), str(tensor.dtype).removeprefix("torch."), is_state)
        for name, tensor in entries.items()
    ]


def _write(
    program: torch.export.ExportedProgram,
    model: PreTrainedModel,
    inputs: State,
    outputs: list[str],
    path: Path,
    format: str,
) -> None:
    if format == "openvino":
        write_openvino(program, inputs, path)
    else:
        write_onnx(program, model, list(inputs), outputs, path, own_weights=True)


def write_openvino(program: torch.export.ExportedProgram, state: State, path: Path) -> None:
    import openvino

    converted = openvino.convert_model(program)
    # OpenVINO leaves out inputs that nothing reads.
    read = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in _user_inputs(program)]
    used = [name for name, node in zip(state, read, strict=True) if node.users]
    names = list(state) if len(converted.inputs) == len(state) else used
    for port, name in zip(converted.inputs, names, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        port.get_node().set_partial_shape(openvino.PartialShape([-1, *state[name].shape[1:]]))
    converted.validate_nodes_and_infer_types()
    openvino.save_model(converted, path, compress_to_fp16=False)


def _user_inputs(program: torch.export.ExportedProgram) -> set[str]:
    return set(program.graph_signature.user_inputs)
