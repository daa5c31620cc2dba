"""What passes between a model that thinks in stages, its exit rule and its task: states, answers, and runs."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch


# Tensors whose first dimension is the image: what a stage works on, what it answers, what an exit rule remembers.
State = dict[str, torch.Tensor]
Answer = dict[str, torch.Tensor]
Memory = dict[str, torch.Tensor]


class StageStep(NamedTuple):
    """
    One stage, judged.

    Attributes:
        answer (`dict[str, torch.Tensor]`): what the model answered, and the `entropy` of that.
        score (`torch.Tensor` of shape `(images,)`): of the exit criterion, float32.
        exits (`torch.BoolTensor` of shape `(images,)`): which images exit; all of them at the last stage that runs.
        state (`dict[str, torch.Tensor]`): for the next stage, with what the exit rule remembers.
    """

    answer: Answer
    score: torch.Tensor
    exits: torch.Tensor
    state: State


@dataclass
class StagedRun:
    """
    What `run_stages` returns.

    Attributes:
        accepted (`dict[str, torch.Tensor]`): each image's accepted answer, and the `entropy` of that.
        exit_stage (`torch.LongTensor` of shape `(batch_size,)`): the accepted stage, counted from 0.
        steps (`list[StageStep]`): of each stage that ran, for the images that ran it, without states.
        first_stage (`int`): the stage of `steps[0]`.
    """

    accepted: Answer
    exit_stage: torch.Tensor
    first_stage: int
    steps: list[StageStep] = field(default_factory=list)

    @property
    def stages(self) -> range:
        """The stages that ran."""
        return range(self.first_stage, self.first_stage + len(self.steps))


def select_rows(state: State, rows: torch.Tensor) -> State:
    """The state of the images `rows` (int64 indices), as a smaller batch."""
    return {name: tensor.index_select(0, rows) for name, tensor in state.items()}


__all__ = ["Answer", "Memory", "StagedRun", "StageStep", "State", "select_rows"]
