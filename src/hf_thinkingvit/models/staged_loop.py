"""
Run a stage, decide, go on: the one loop of every model that thinks in stages.

A staged model provides four steps on a *state*, a dict of tensors whose first dimension is the image:

* `begin(pixel_values)`: the state with which the first stage starts; refuses images that the stages cannot take;
* `run_stage(stage_index, state)`: the state as the stage leaves it;
* `answer(stage_index, state)`: what the stage answers, a dict of tensors whose first dimension is the image;
* `recycle(stage_index, state)`: for the images that go on, the state with which stage `stage_index + 1` starts.

`step_stage` runs one stage of them and asks an exit rule; `run_stages` runs one stage after another for a batch. Other
schedules (a queue per stage in the engine, a program per stage in an export) call `step_stage` themselves. Nothing here
knows layers, heads, labels, losses or output types.
"""

import torch
from transformers import PreTrainedModel

from .exit_rules import ExitRule
from .module_recording import wants_recordings
from .staged_compilation import CompiledStagesMixin, compilable_step
from .staged_run import Answer, StagedRun, StageStep, State, select_rows
from .tasks import Task


# Entries of a state that are the loop's own pass from stage to stage beside those of the model: what the exit rule
# remembers, and what has been accepted so far by a task that merges answers.
MEMORY_PREFIX, ACCEPTED_PREFIX = "_memory.", "_accepted."


def answer_stage(
    model: "StagedModelMixin",
    stages: range,
    stage_index: int,
    state: State,
    interpolate_pos_encoding: bool | None = None,
    **kwargs,
) -> tuple[Answer, State]:
    """
    Enter a stage (`begin` or `recycle`), run it and read its answers, which nothing has judged yet. The arguments are
    those of `step_stage`, with a state that holds the model's own entries alone. Returns the answers, and the state as
    the stage leaves it.
    """
    if stage_index == stages[0]:
        state = model.begin(
            state["pixel_values"], interpolate_pos_encoding=interpolate_pos_encoding, stages=stages, **kwargs
        )
    else:
        state = model.recycle(stage_index - 1, state, **kwargs)
    state = model.run_stage(stage_index, state, is_last=stage_index == stages[-1], **kwargs)
    if reserved := [name for name in state if name.startswith((MEMORY_PREFIX, ACCEPTED_PREFIX))]:
        raise ValueError(f"A state may not have entries called {reserved}: these names are the loop's own.")
    return model.answer(stage_index, state), state


def step_stage(
    model: "StagedModelMixin",
    rule: ExitRule,
    stages: range,
    stage_index: int,
    state: State,
    interpolate_pos_encoding: bool | None = None,
    **kwargs,
) -> StageStep:
    """
    Enter a stage (`begin` or `recycle`), run it, read its answers and judge them.

    Args:
        model (`StagedModelMixin`): provides the steps.
        rule (`ExitRule`): decides.
        stages (`range`): the stages that run for this input.
        stage_index (`int`): one of them.
        state (`dict[str, torch.Tensor]`): for the first of `stages` that of `first_state`, for the others the state of
            the [`StageStep`] before, of the images that go on.
        interpolate_pos_encoding (`bool`, *optional*), kwargs: arguments of the model's `forward`.
    """
    memory, accepted = _take(state, MEMORY_PREFIX), _take(state, ACCEPTED_PREFIX)
    if memory or accepted:
        state = {name: state[name] for name in state if not name.startswith((MEMORY_PREFIX, ACCEPTED_PREFIX))}
    is_last = stage_index == stages[-1]
    answer, state = answer_stage(model, stages, stage_index, state, interpolate_pos_encoding, **kwargs)
    if accepted:
        answer = model.merge_answers(accepted, answer)
    verdict = rule.judge(stage_index, answer, memory)
    if verdict.memory:
        state = {**state, **{MEMORY_PREFIX + name: tensor for name, tensor in verdict.memory.items()}}
    if model.merges_answers and not is_last:
        state = {**state, **{ACCEPTED_PREFIX + name: tensor for name, tensor in answer.items()}}
    exits = torch.ones_like(verdict.exits) if is_last else verdict.exits
    return StageStep({**answer, "entropy": verdict.entropy}, verdict.score, exits, state)


def first_state(rule: ExitRule, pixel_values: torch.Tensor | None, generator: torch.Generator | None = None) -> State:
    """
    The state with which images enter the first stage: their pixels, and what the rule remembers at first, which it may
    draw from `generator` (see `ExitRule.first_memory`).
    """
    is_batch = isinstance(pixel_values, torch.Tensor) and pixel_values.dim() > 0  # `begin` refuses others
    memory = rule.first_memory(len(pixel_values) if is_batch else 0, generator)
    places = {MEMORY_PREFIX + name: tensor.to(pixel_values.device) for name, tensor in memory.items() if is_batch}
    return {"pixel_values": pixel_values, **places}


def _take(state: State, prefix: str) -> State:
    """The entries of a state whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}


def _put(accepted: Answer, answer: Answer, chosen: torch.Tensor) -> Answer:
    """
    The answers of a batch with some rows replaced: `chosen` is a mask (bool) of the rows of `answer` to take, or the
    place in the batch of each row of `answer` (int64).
    """
    # Entries that only some stages answer with are for the output to read from the steps of the run.
    answer = {name: rows for name, rows in answer.items() if name in accepted}
    if chosen.dtype != torch.bool:
        return {name: accepted[name].index_copy(0, chosen, rows) for name, rows in answer.items()}
    return {
        name: torch.where(chosen.view(-1, *[1] * (rows.dim() - 1)), rows, accepted[name])
        for name, rows in answer.items()
    }


def run_stages(
    model: "StagedModelMixin",
    rule: ExitRule,
    stages: range,
    pixel_values: torch.Tensor,
    run_all: bool = False,
    generator: torch.Generator | None = None,
    **kwargs,
) -> StagedRun:
    """
    Run one stage after another. In evaluation mode an image's accepted answer is that of its exit, and later stages
    compute only the images that go on. In training mode every stage runs for every image, and the last is accepted.

    Args:
        model, rule, stages, kwargs: as in `step_stage`.
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): images.
        run_all (`bool`): run every stage for every image in evaluation mode as well.
        generator (`torch.Generator`, *optional*): of a rule that draws numbers; torch's global one by default.
    """
    run_all = run_all or model.training
    state = first_state(rule, pixel_values, generator)
    run = rows = undecided = None  # rows: places in the batch of the images still running; None for all of them
    for stage_index in stages:
        step = step_stage(model, rule, stages, stage_index, state, **kwargs)
        answer, state = step.answer, step.state
        if run is None:
            exit_stage = torch.full(step.exits.shape, stage_index, dtype=torch.long, device=step.exits.device)
            run = StagedRun(answer, exit_stage, stage_index)
            undecided = torch.ones_like(step.exits)
        elif run_all:
            run.accepted = _put(run.accepted, answer, undecided)
            run.exit_stage = torch.where(undecided, stage_index, run.exit_stage)
        elif rows is None:
            run.accepted, run.exit_stage = answer, torch.full_like(run.exit_stage, stage_index)
        else:
            run.accepted = _put(run.accepted, answer, rows)
            run.exit_stage = run.exit_stage.index_fill(0, rows, stage_index)
        run.steps.append(step._replace(state={}))
        if stage_index == stages[-1]:
            break
        if run_all:
            if not model.training:
                undecided = undecided & ~step.exits
            continue
        going_on = (~step.exits).nonzero().squeeze(1)  # the one host synchronisation per exit
        if going_on.numel() == 0:
            break
        if going_on.numel() < step.exits.shape[0]:
            state = select_rows(state, going_on)
            rows = going_on if rows is None else rows[going_on]
    return run


def run_backbone(
    backbone: PreTrainedModel,
    pixel_values: torch.Tensor,
    stages: range,
    interpolate_pos_encoding: bool | None = None,
    **kwargs,
) -> State:
    """Run `stages` of a model without a task for every image: the state as the last of them leaves it."""
    state = backbone.begin(pixel_values, interpolate_pos_encoding, stages)
    for stage_index in stages:
        if stage_index > stages.start:
            state = backbone.recycle(stage_index - 1, state, **kwargs)
        state = backbone.run_stage(stage_index, state, **kwargs)
    return state


class StagedModelMixin(CompiledStagesMixin, Task):
    """
    The steps of a model that thinks in stages: three of its backbone (`base_model`), and a task's `answer`. The first
    three are `compilable_step`s, which `compile_stages` compiles.
    """

    @compilable_step
    def begin(self, pixel_values, interpolate_pos_encoding=None, stages: range | None = None, **kwargs) -> State:
        """The state with which the first of the `stages` that are to run (all by default) starts."""
        return self.base_model.begin(pixel_values, interpolate_pos_encoding, stages)

    @compilable_step
    def run_stage(self, stage_index: int, state: State, is_last: bool = False, **kwargs) -> State:
        """The state as the stage leaves it; `is_last` if no other stage follows."""
        # In training every image goes on, so computing the last layer in two parts gains nothing. Recorded outputs are
        # of all tokens.
        all_tokens = self.reads_all_tokens or (self.training and not is_last) or wants_recordings(self.config, kwargs)
        return self.base_model.run_stage(stage_index, state, all_tokens=all_tokens, **kwargs)

    @compilable_step
    def recycle(self, stage_index: int, state: State, **kwargs) -> State:
        """The state with which stage `stage_index + 1` starts."""
        return self.base_model.recycle(stage_index, state, **kwargs)


__all__ = [
    "StagedModelMixin",
    "answer_stage",
    "first_state",
    "run_backbone",
    "run_stages",
    "step_stage",
]
