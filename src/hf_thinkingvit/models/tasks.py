"""
What a model's answer is: how it is read from the backbone's state, judged, merged over stages, and learned.

A task is a mixin for a `PreTrainedModel`. `task_classification.py` is one; another (segmentation, say) is another file
like it, since the loop over stages only calls what is declared here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .exit_rules import ExitRule
from .staged_run import Answer, StagedRun


def weights_of_stages(
    weights: Sequence[float] | None, stages: Sequence[int], name: str = "stage_loss_weights"
) -> list[float]:
    """
    The weights, called `name`, of the losses of the `stages` (or sub-networks) that run, with the same sum as those of
    all, so that the size of the loss does not depend on how many run. Equal weights that sum to 1 where `weights` is
    `None`.

    Raises:
        ValueError: if several stages run and all of them have weight 0.
    """
    if weights is None:
        return [1.0 / len(stages)] * len(stages)
    if len(stages) == 1:
        return [sum(weights)]
    used = [weights[stage] for stage in stages]
    if not sum(used) > 0:
        raise ValueError(
            f"`{name}` ({list(weights)}) has weight 0 for all of {list(stages)}, which are those that run: there is "
            "nothing to train. Run others, or set other weights."
        )
    return [weight * sum(weights) / sum(used) for weight in used]


def loss_arguments(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Keyword arguments of `model.loss_function`: those of `forward`, and in training mode the label smoothing. In
    evaluation mode the loss measures the answers, without smoothing.
    """
    smoothing = model.config.label_smoothing if model.training else 0.0
    return {**kwargs, "label_smoothing": smoothing} if smoothing else kwargs


class Task:
    """
    The interface between a task and the loop over stages. An *answer* is a dict of tensors whose first dimension is the
    image: `"logits"` of any further shape, and whatever else the exit rule reads or the output shows.

    Attributes:
        reads_all_tokens (`bool`): whether `answer` reads all tokens of a stage, not just the leading (class) token.
            Stages compute the others only for the images that go on, where it does not.
        merges_answers (`bool`): whether an image's accepted answer is made of those of several stages, by
            `merge_answers`. By default it is the answer of the stage at which the image exits.
        output_class (`type[ModelOutput]`): of `forward`, with the fields `loss`, `logits`, `exit_stage`, `entropy` and
            `stage_logits`.
        reported_entropy (`Callable`, *optional*): `(logits, top_k) -> (images,)`, the entropy to report of an answer
            where the exit criterion's score is not an entropy; by default that of a classification.
    """

    output_class: type[ModelOutput]
    reads_all_tokens: bool = False
    merges_answers: bool = False
    reported_entropy: Callable[[torch.Tensor, int], torch.Tensor] | None = None

    def answer(self, stage_index: int, state: dict[str, torch.Tensor]) -> Answer:
        """The answers of a stage, from the state as `run_stage` left it."""
        raise NotImplementedError

    def exit_rule(self, threshold: float | Sequence[float] | None = None) -> ExitRule:
        """The rule that decides after each stage, with `threshold` instead of `config.threshold` where it is given."""
        return ExitRule.from_config(self.config, threshold, type(self).reported_entropy)

    def token_arguments(self, keep_rate: float | Sequence[float] | None = None) -> dict[str, Any]:
        """
        What a call tells every stage of what happens to tokens, with plain values; nothing where it asks for nothing.

        Raises:
            ValueError: for a `keep_rate` that does not fit, also where no stage that runs would read it.
        """
        if keep_rate is not None:
            raise ValueError("`keep_rate` is of models with `pruning_layers`, and this one has none.")
        return {}

    def merge_answers(self, accepted: Answer, answer: Answer) -> Answer:
        """
        What to accept of some images after a further stage, and what the exit rule judges. Called if `merges_answers`.

        Args:
            accepted (`dict[str, torch.Tensor]`): what the stages so far have come to, one row per image.
            answer (`dict[str, torch.Tensor]`): the further stage's answers to the same images, with the same entries.
        """
        raise NotImplementedError

    def check_labels(self, labels: torch.Tensor, batch_size: int) -> None:
        """`ValueError` for labels that do not fit the batch and the configuration."""
        raise NotImplementedError

    def answer_loss(self, labels: torch.Tensor, answer: Answer, **kwargs: Any) -> torch.Tensor:
        """The loss of one answer, a float32 scalar, by `loss_function`; kwargs are those of `forward`."""
        return self.loss_function(labels, answer["logits"], self.config, **loss_arguments(self, kwargs))

    def build_output(
        self, run: StagedRun, labels: torch.Tensor | None, output_stage_logits: bool | None, **kwargs: Any
    ) -> ModelOutput:
        """The output of a run, with the loss if there are `labels`. The arguments are those of `forward`."""
        with_stage_logits = self.training or output_stage_logits
        return self.output_class(
            loss=None if labels is None else self.run_loss(labels, run, **kwargs),
            logits=run.accepted["logits"],
            exit_stage=run.exit_stage,
            entropy=run.accepted["entropy"],
            stage_logits=tuple(step.answer["logits"] for step in run.steps) if with_stage_logits else None,
        )

    def run_loss(self, labels: torch.Tensor, run: StagedRun, **kwargs: Any) -> torch.Tensor:
        """
        The loss of a run over stages: in training mode the weighted sum of the stages' losses (ThinkingViT paper,
        training objective), in evaluation mode the loss of the accepted answers.
        """
        if not self.training:
            return self.answer_loss(labels, run.accepted, **kwargs)
        weights = weights_of_stages(self.config.stage_loss_weights, run.stages)
        losses = [self.answer_loss(labels, step.answer, **kwargs) for step in run.steps]
        return sum(weight * loss for weight, loss in zip(weights, losses))


__all__ = ["Task", "loss_arguments", "weights_of_stages"]
