"""
Which stages a training step computes, and how much the loss of each counts: small classes, chosen by name with
`stage_sampling`. A new one is a subclass of `StageSampler` and an entry in `STAGE_SAMPLERS`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig

from .seeding import seeded


if TYPE_CHECKING:
    from .config import TrainingConfig


class StageSampler:
    """
    Chooses the stages of each step. Draws depend on the seed, the step and the micro-batch alone, so that all processes
    and resumed runs choose the same.

    Args:
        stage_weights (`Sequence[float]`): weight of each stage's loss in a step that trains all of them.
        config (`TrainingConfig`): of the run; samplers read their own fields from it.

    Raises:
        ValueError: if the model has too few stages.
    """

    def __init__(self, stage_weights: Sequence[float], config: "TrainingConfig"):
        self.check(len(stage_weights))
        self.stage_weights = torch.tensor(stage_weights, dtype=torch.float64)
        self.config = config

    @classmethod
    def check(cls, num_stages: int) -> None:
        """`ValueError` if a model with `num_stages` stages cannot be trained with this sampler."""

    @property
    def num_stages(self) -> int:
        return len(self.stage_weights)

    def stages(self, step: int, micro_batch: int) -> list[int]:
        """The stages, in increasing order, whose losses train the micro-batch `micro_batch` of step `step`."""
        raise NotImplementedError

    def weights(self, step: int, micro_batch: int) -> list[float]:
        """
        The weight of each stage's loss, 0 for stages that are not trained. They sum to as much as `stage_weights`, so
        that the learning rate has the same effect with every sampler.

        Raises:
            ValueError: if all stages of this step have weight 0.
        """
        stages = self.stages(step, micro_batch)
        trained = torch.zeros_like(self.stage_weights)
        trained[stages] = 1.0
        weights = self.stage_weights * trained
        if not weights.sum() > 0:
            raise ValueError(
                f"The weight of the losses ({self.stage_weights.tolist()}) is 0 for all of the stages {stages} that "
                f"`stage_sampling` {self.config.stage_sampling} trains in step {step}: set a weight above 0."
            )
        return (weights * self.stage_weights.sum() / weights.sum()).tolist()


class AllStages(StageSampler):
    """Every stage in every step (ThinkingViT, arXiv 2507.10800; MatFormer, arXiv 2310.07707)."""

    def stages(self, step: int, micro_batch: int) -> list[int]:
        return list(range(self.num_stages))

    def weights(self, step: int, micro_batch: int) -> list[float]:
        return self.stage_weights.tolist()


class Sandwich(StageSampler):
    """
    The first and the last stage, and `sandwich_samples` random ones between them, drawn anew in each step: the
    sandwich rule of universally slimmable networks (arXiv 1903.05134).
    """

    @classmethod
    def check(cls, num_stages: int) -> None:
        if num_stages < 3:
            raise ValueError(
                f"`stage_sampling` sandwich needs a stage between the first and the last; this model has {num_stages}."
            )

    def stages(self, step: int, micro_batch: int) -> list[int]:
        with seeded(self.config.seed, step):
            between = 1 + torch.randperm(self.num_stages - 2)[: self.config.sandwich_samples]
        return [0, *sorted(between.tolist()), self.num_stages - 1]


class OnePerStep(StageSampler):
    """One random stage in each step, drawn with the stages' weights: HydraViT (arXiv 2409.17978)."""

    def stages(self, step: int, micro_batch: int) -> list[int]:
        return [self._draw(self.config.seed, step)]

    def _draw(self, *place: int) -> int:
        with seeded(*place):
            return int(torch.multinomial(self.stage_weights, 1))


class OnePerMicroBatch(OnePerStep):
    """
    One random stage in each micro-batch, so that a step adds up the gradients of several: SortedNet (arXiv 2309.00255).
    """

    def stages(self, step: int, micro_batch: int) -> list[int]:
        return [self._draw(self.config.seed, step, micro_batch)]


STAGE_SAMPLERS: dict[str, type[StageSampler]] = {
    "all": AllStages,
    "sandwich": Sandwich,
    "one": OnePerStep,
    "accumulate": OnePerMicroBatch,
}


def stage_sampler_class(name: str) -> type[StageSampler]:
    """The sampler called `name`; `ValueError` if there is none."""
    if name not in STAGE_SAMPLERS:
        raise ValueError(f"`stage_sampling` must be one of {list(STAGE_SAMPLERS)}, got {name!r}.")
    return STAGE_SAMPLERS[name]


def build_stage_sampler(config: "TrainingConfig", model_config: PreTrainedConfig) -> StageSampler:
    """The sampler of a run, for a model that thinks in stages."""
    num_stages, weights = model_config.num_stages, model_config.stage_loss_weights
    if not weights or num_stages == 1:  # the weight of a single stage would only scale the learning rate
        weights = [1.0 / num_stages] * num_stages
    return stage_sampler_class(config.stage_sampling)(weights, config)
