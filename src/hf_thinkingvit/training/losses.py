"""The training loss of a run: the sum of the objectives that apply to its model."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..models.configuration_staged import thinks_in_stages
from .answer_losses import TrainingBatch
from .distillation import Teacher
from .objectives import choose_objectives
from .stage_samplers import stage_sampler_class


if TYPE_CHECKING:
    from .config import TrainingConfig


class TrainingLoss:
    """
    The loss of a configured run; `objectives.py` says what it consists of.

    Args:
        config (`TrainingConfig`): of the run.
        model_config (`PreTrainedConfig`): of the model.
        teacher (`Teacher` or `PreTrainedModel`, *optional*): an image classifier with the same labels; a bare model
            gets the student's pixels as they are.

    Raises:
        ValueError: where the configuration asks for what this model cannot do.
    """

    def __init__(
        self,
        config: "TrainingConfig",
        model_config: PreTrainedConfig,
        teacher: Teacher | PreTrainedModel | None = None,
    ):
        if isinstance(teacher, PreTrainedModel):
            teacher = Teacher(teacher, id2label=model_config.id2label, label_map=config.label_map)
        num_stages = model_config.num_stages if thinks_in_stages(model_config) else 1
        check_stages(config, len(getattr(model_config, "sub_networks", None) or ()) or num_stages)
        self.objectives = [
            objective(config, model_config, teacher) for objective in choose_objectives(model_config, teacher)
        ]

    @property
    def leaves_parameters_out(self) -> bool:
        """Whether some parameters have no gradient in some steps: see `Objective`."""
        return any(objective.leaves_parameters_out for objective in self.objectives)

    def model_arguments(self, step: int, micro_batch: int) -> dict[str, Any]:
        """Arguments of the model's `forward`, beside pixel values and labels, for one micro-batch of a step."""
        arguments: dict[str, Any] = {}
        for objective in self.objectives:
            arguments |= objective.model_arguments(step, micro_batch)
        return arguments

    def __call__(
        self,
        outputs: ModelOutput,
        pixel_values: torch.Tensor,
        targets: torch.Tensor,
        step: int,
        micro_batch: int = 0,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        The loss, a scalar, and its parts by name, detached. See `TrainingBatch` for the arguments.
        """
        batch = TrainingBatch(outputs, pixel_values, targets, step, micro_batch)
        terms, parts = [], {}
        for objective in self.objectives:
            term, named = objective(batch)
            terms.append(term)
            parts |= named
        return sum(terms[1:], start=terms[0]), parts


def check_stages(config: "TrainingConfig", num_stages: int) -> None:
    """`ValueError` for settings that need more stages than the model has; 1 for a model without stages."""
    stage_sampler_class(config.stage_sampling).check(num_stages)
    if config.inplace_distillation and num_stages < 2:
        raise ValueError("`inplace_distillation` needs a model with at least two stages.")
