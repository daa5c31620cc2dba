"""
When is an answer good enough? An exit rule compares the scores of an exit criterion (`exit_criteria.py`) with τ.

Comparisons are strict unless the configuration says otherwise (`exit_at_threshold`), and a NaN score never passes one:
an image with a broken answer goes on to the last stage.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .configuration_checks import check_integer, check_loss_weights, configured_problem_type
from .exit_criteria import EXIT_CRITERIA, suits_problem_type
from .exit_scores import mean_binary_entropy, topk_entropy
from .staged_arguments import resolve_thresholds
from .staged_run import Answer, Memory


def default_exit_fields(
    problem_type: str | None, exit_criterion: str | None, threshold: float | Sequence[float] | None, num_exits: int
) -> tuple[str, float | Sequence[float]]:
    """
    `exit_criterion` and `threshold` of a configuration, with defaults where they are `None`.

    Without a criterion: `"mean_binary_entropy"` for multi-label classification, `"topk_entropy"` otherwise. τ is on its
    criterion's scale, so its default is the criterion's; for regression it is 0, since nothing tells certainty there.

    Raises:
        ValueError: for a criterion without a default τ, given without `threshold`.
    """
    if exit_criterion is None:
        exit_criterion = "mean_binary_entropy" if problem_type == "multi_label_classification" else "topk_entropy"
    if threshold is None and isinstance(exit_criterion, str) and exit_criterion in EXIT_CRITERIA:
        threshold = EXIT_CRITERIA[exit_criterion].default_threshold
        if problem_type == "regression" or (threshold is None and not num_exits):
            threshold = 0.0
        elif threshold is None:
            raise ValueError(_needs_threshold(exit_criterion))
    return exit_criterion, threshold


def _needs_threshold(exit_criterion: str) -> str:
    return (
        f"`exit_criterion` = {exit_criterion!r} needs a `threshold` on its own scale: give both `exit_criterion` and "
        "`threshold`."
    )


def answer_entropy(logits: torch.Tensor, config) -> torch.Tensor:
    """The entropy to report of a model that has no exit criterion: that of its problem type's default criterion."""
    criterion, _ = default_exit_fields(configured_problem_type(config), None, 0.0, 0)
    return EXIT_CRITERIA[criterion].score(logits, 10)


class Verdict(NamedTuple):
    """
    What a rule says of a stage's answers.

    Attributes:
        score (`torch.Tensor` of shape `(images,)`): of the criterion, float32.
        exits (`torch.BoolTensor` of shape `(images,)`): which images exit.
        entropy (`torch.Tensor` of shape `(images,)`): to report, float32.
        memory (`dict[str, torch.Tensor]`): for the next stage.
    """

    score: torch.Tensor
    exits: torch.Tensor
    entropy: torch.Tensor
    memory: Memory


@dataclass(frozen=True)
class ExitRule:
    """
    A criterion with its thresholds, ready to judge each stage's answers. Built by `ExitRule.from_config`.

    Args:
        criterion (`str`): in `EXIT_CRITERIA`.
        thresholds (`tuple[float, ...]`): τ of each stage but the last.
        entropy_top_k (`int`): classes that the top-k entropy counts.
        reported_entropy (`Callable`, *optional*): `(logits, top_k) -> (images,)`, the entropy to report where the
            criterion's score is not an entropy; by default `topk_entropy`, and `mean_binary_entropy` for criteria that
            judge each label by itself.
        exit_at_threshold (`bool`): whether a score equal to τ exits as well.

    Not for subclassing: sweep and exports compare scores with τ as this class does. Another way to decide is another
    criterion.
    """

    criterion: str
    thresholds: tuple[float, ...]
    entropy_top_k: int
    reported_entropy: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    exit_at_threshold: bool = False

    @classmethod
    def from_config(
        cls,
        config,
        threshold: float | Sequence[float] | None = None,
        reported_entropy: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
    ) -> "ExitRule":
        """
        The rule that `config` describes; `threshold`, where given, overrides `config.threshold`.

        Raises:
            ValueError: if τ is not a number, or the problem type does not allow the criterion or τ.
        """
        threshold = config.threshold if threshold is None else threshold
        if threshold is None:
            raise ValueError(_needs_threshold(config.exit_criterion))
        rule = cls(
            config.exit_criterion,
            resolve_thresholds(threshold, config.num_stages - 1),
            config.entropy_top_k,
            reported_entropy,
            getattr(config, "exit_at_threshold", False),  # missing in remote code of earlier versions
        )
        rule.check_problem_type(configured_problem_type(config))
        return rule

    def check_problem_type(self, problem_type: str | None) -> None:
        """`ValueError` if the criterion is not defined for answers to such a problem."""
        criterion = EXIT_CRITERIA[self.criterion]
        if not suits_problem_type(self.criterion, problem_type):
            names = sorted(
                name
                for name, other in EXIT_CRITERIA.items()
                if other.is_dense == criterion.is_dense and suits_problem_type(name, problem_type)
            )
            usual = next(name for name in names if EXIT_CRITERIA[name].default_threshold is not None)
            judged = "each label by itself" if criterion.multi_label else "a softmax"
            raise ValueError(
                f"`exit_criterion` = {self.criterion!r} judges {judged}, not the answer of {problem_type}: set "
                f"`exit_criterion` to one of {names}, with its `threshold`. A saved model takes both on loading: "
                f"`from_pretrained(..., exit_criterion={usual!r}, threshold={EXIT_CRITERIA[usual].default_threshold})`."
            )
        # One output has no entropy, and the softmax of several means nothing: every image would exit at once.
        if problem_type == "regression" and self.thresholds and (any(self.thresholds) or not criterion.exits_below):
            raise ValueError(
                f"Regression has no criterion of certainty for early exits, got `exit_criterion` = {self.criterion!r} "
                f"with `threshold` = {list(self.thresholds)}: set `threshold` to 0"
                + ("" if criterion.exits_below else " and `exit_criterion` to 'topk_entropy'")
                + ", at which no image exits early, and choose the compute of a call by its argument `max_stages`. A "
                "saved model takes it on loading: `from_pretrained(..., threshold=0)`."
            )
        if problem_type == "regression" and self.thresholds and self.exit_at_threshold:
            raise ValueError(
                "`exit_at_threshold` lets every image of a regression exit at once, since a score of 0 equals "
                "`threshold` = 0: set it to False."
            )

    @property
    def draws(self) -> bool:
        """Whether exits are random: see `ExitCriterion.draws`."""
        return EXIT_CRITERIA[self.criterion].draws

    def first_memory(self, count: int, generator: torch.Generator | None = None) -> Memory:
        """
        What is remembered of images before their first stage: `{"noise": (count,)}`, float32, where the criterion
        draws a number for each image; nothing otherwise. The numbers are drawn one after the other, so that a stream of
        images gets the same ones however it is divided.

        Args:
            count (`int`): how many images.
            generator (`torch.Generator`, *optional*): to draw from; torch's global one of the CPU by default.

        Raises:
            ValueError: for a `generator` of a criterion that draws nothing.
        """
        if self.draws:
            device = "cpu" if generator is None else generator.device
            return {"noise": torch.rand(count, generator=generator, device=device)}
        if generator is not None:
            raise ValueError(
                "`generator` is for an `exit_criterion` that draws random numbers ('pondernet'), not "
                f"{self.criterion!r}."
            )
        return {}

    def judge(self, stage_index: int, answer: Answer, memory: Memory | None = None) -> Verdict:
        """
        Args:
            stage_index (`int`): the stage that answered, counted from 0.
            answer (`dict[str, torch.Tensor]`): its answers, with every entry that the criterion reads.
            memory (`dict[str, torch.Tensor]`, *optional*): of the verdict on the same images at the stage before.

        Returns:
            [`Verdict`]. The last stage has no τ: everything exits there.
        """
        criterion = EXIT_CRITERIA[self.criterion]
        score, memory = criterion(answer, memory or {}, self.entropy_top_k)
        entropies = score if criterion.is_entropy else self._entropy(answer["logits"])
        if score.dim() != 1 or entropies.dim() != 1:
            raise ValueError(
                f"`exit_criterion` = {self.criterion!r} must give one score and one entropy per image, but for answers "
                f"of the shape {tuple(answer['logits'].shape)} they have the shapes {tuple(score.shape)} and "
                f"{tuple(entropies.shape)}: it is not made for this task."
            )
        if not criterion.is_entropy:
            # A broken answer may have a score nonetheless, such as a learned one or a count: it passes no τ either.
            score = score.masked_fill(entropies.isnan(), torch.nan)
        return Verdict(score, self.exits(stage_index, score), entropies, memory)

    def _entropy(self, logits: torch.Tensor) -> torch.Tensor:
        if self.reported_entropy is not None:
            return self.reported_entropy(logits, self.entropy_top_k)
        if EXIT_CRITERIA[self.criterion].multi_label:
            return mean_binary_entropy(logits)
        return topk_entropy(logits, self.entropy_top_k)

    def exits(self, stage_index: int, score: torch.Tensor) -> torch.Tensor:
        """Which images exit at a stage, bool, from the criterion's scores of its answers, float32, of any shape."""
        if stage_index >= len(self.thresholds):
            return torch.ones_like(score, dtype=torch.bool)
        threshold = self.thresholds[stage_index]
        if EXIT_CRITERIA[self.criterion].exits_below:
            return score <= threshold if self.exit_at_threshold else score < threshold
        return score >= threshold if self.exit_at_threshold else score > threshold


def check_exit_fields(config) -> None:
    """
    `ValueError` for invalid `threshold`, `exit_criterion`, `exit_at_threshold`, `entropy_top_k` or
    `stage_loss_weights`.
    """
    if not isinstance(config.exit_criterion, str) or config.exit_criterion not in EXIT_CRITERIA:
        raise ValueError(f"`exit_criterion` must be one of {sorted(EXIT_CRITERIA)}, got {config.exit_criterion!r}.")
    if not isinstance(config.exit_at_threshold, bool):
        raise ValueError(f"`exit_at_threshold` must be true or false, got {config.exit_at_threshold!r}.")
    halting = EXIT_CRITERIA[config.exit_criterion].halting
    if halting is not None and getattr(config, "halting", None) != halting:
        raise ValueError(
            f"`exit_criterion` = {config.exit_criterion!r} reads learned halting scores, which only an "
            f"`EarlyExitViTConfig` with `halting` = {halting!r} has: choose another criterion, with its `threshold`."
        )
    check_integer("entropy_top_k", config.entropy_top_k, minimum=2)  # the entropy of one class is always 0
    ExitRule.from_config(config)
    check_loss_weights("stage_loss_weights", config.stage_loss_weights, config.num_stages, "one per stage")
