"""When is an answer good enough? Scores of a stage's logits, and the rule that compares them with τ.

A criterion is one function from logits to a score per image, and the side of τ on which the image exits. To add one,
add a line to `EXIT_CRITERIA`. Every score is computed in float32, whatever the dtype of the logits. Comparisons are
strict, and a NaN score never passes one: an image with a broken answer goes on to the last stage.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .config_checks import check_integer, check_number


def _entropy(probabilities: torch.Tensor) -> torch.Tensor:
    # clamp: rounding can push a certain answer's entropy below 0, and then τ = 0 would let it exit. NaN stays NaN.
    # The same numbers as `torch.special.entr`, which torch 2.11 cannot export to ONNX inside a conditional.
    return (-torch.xlogy(probabilities, probabilities)).sum(dim=-1).clamp(min=0.0)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """
    Shannon entropy of the softmax over all classes, in nats: the formula in the ThinkingViT paper (arXiv 2507.10800).

    Args:
        logits (`torch.Tensor` of shape `(..., num_classes)`, any floating dtype).

    Returns:
        `torch.Tensor` of shape `(...)`, float32, between 0 and ln(num_classes).
    """
    return _entropy(logits.float().softmax(dim=-1))


def topk_entropy(logits: torch.Tensor, top_k: int = 10) -> torch.Tensor:
    """
    Entropy of the `top_k` largest probabilities, renormalised to sum to 1, in nats: what the official code computes,
    and the scale of the published thresholds.

    Args:
        logits (`torch.Tensor` of shape `(..., num_classes)`, any floating dtype).
        top_k (`int`): how many classes to keep; all of them where there are fewer.

    Returns:
        `torch.Tensor` of shape `(...)`, float32, between 0 and ln(top_k).
    """
    # In this order, so that equal logits give the official entropies to the last bit: τ may lie on one of them.
    largest = logits.float().softmax(dim=-1).topk(min(top_k, logits.shape[-1]), dim=-1).values
    return _entropy(largest / largest.sum(dim=-1, keepdim=True))


def max_probability(logits: torch.Tensor) -> torch.Tensor:
    """Largest softmax probability per image: shape `(...)`, float32, between 0 and 1."""
    return logits.float().softmax(dim=-1).amax(dim=-1)


def margin(logits: torch.Tensor) -> torch.Tensor:
    """Largest minus second largest softmax probability: shape `(...)`, float32, between 0 and 1 (1 for one class)."""
    if logits.shape[-1] < 2:
        return max_probability(logits)
    largest = logits.float().softmax(dim=-1).topk(2, dim=-1).values
    return largest[..., 0] - largest[..., 1]


@dataclass(frozen=True)
class ExitCriterion:
    """
    A score and its direction.

    Attributes:
        score (`Callable`): `(logits, top_k) -> scores` of shape `(...)`, float32.
        exits_below (`bool`): `True` where a low score means certainty (entropies): exit iff score < τ.
            `False` where a high score does (probabilities): exit iff score > τ.
        is_entropy (`bool`): whether the score is itself the entropy to report; else the top-k entropy is reported.
    """

    score: Callable[[torch.Tensor, int], torch.Tensor]
    exits_below: bool
    is_entropy: bool = False


EXIT_CRITERIA: dict[str, ExitCriterion] = {
    "topk_entropy": ExitCriterion(topk_entropy, exits_below=True, is_entropy=True),
    "entropy": ExitCriterion(lambda logits, top_k: entropy(logits), exits_below=True, is_entropy=True),
    "max_probability": ExitCriterion(lambda logits, top_k: max_probability(logits), exits_below=False),
    "margin": ExitCriterion(lambda logits, top_k: margin(logits), exits_below=False),
}


def resolve_thresholds(threshold: float | Sequence[float], num_exits: int) -> tuple[float, ...]:
    """
    One τ per exit, from one number or from a list of `num_exits` (every stage but the last is an exit).

    Raises:
        ValueError: if a τ is negative, NaN or no number, or if the list has the wrong length.
    """
    if isinstance(threshold, torch.Tensor):
        threshold = threshold.tolist()
    if isinstance(threshold, Sequence) and not isinstance(threshold, str):
        if len(threshold) != num_exits:
            raise ValueError(
                f"`threshold` must be one number or a list of {num_exits}, one per exit (every stage but the last), "
                f"got {len(threshold)} values: {list(threshold)}."
            )
        thresholds = tuple(threshold)
    else:
        check_number("threshold", threshold)
        thresholds = (threshold,) * num_exits
    for value in thresholds:
        check_number("threshold", value)
    return thresholds


@dataclass(frozen=True)
class ExitRule:
    """A criterion with its thresholds, ready to judge each stage's logits. Built by `ExitRule.from_config`."""

    criterion: str
    thresholds: tuple[float, ...]
    entropy_top_k: int

    @classmethod
    def from_config(cls, config, threshold: float | Sequence[float] | None = None) -> "ExitRule":
        """The rule that `config` describes; `threshold`, where given, overrides `config.threshold`."""
        threshold = config.threshold if threshold is None else threshold
        thresholds = resolve_thresholds(threshold, config.num_stages - 1)
        return cls(config.exit_criterion, thresholds, config.entropy_top_k)

    def judge(self, stage_index: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            stage_index (`int`): the stage that answered, counted from 0.
            logits (`torch.Tensor` of shape `(images, num_classes)`): its answers.

        Returns:
            The entropy to report, float32, and which images exit here, bool, both of shape `(images,)`. The last stage
            has no τ: everything exits there.
        """
        criterion = EXIT_CRITERIA[self.criterion]
        score = criterion.score(logits, self.entropy_top_k)
        entropies = score if criterion.is_entropy else topk_entropy(logits, self.entropy_top_k)
        return entropies, self.exits(stage_index, score)

    def exits(self, stage_index: int, score: torch.Tensor) -> torch.Tensor:
        """Which images exit at a stage, bool, from the criterion's scores of its answers, float32, of any shape."""
        if stage_index >= len(self.thresholds):
            return torch.ones_like(score, dtype=torch.bool)
        threshold = self.thresholds[stage_index]
        return score < threshold if EXIT_CRITERIA[self.criterion].exits_below else score > threshold


def check_exit_fields(config) -> None:
    """Refuse exit settings that cannot work: `threshold`, `exit_criterion`, `entropy_top_k`, `stage_loss_weights`."""
    if not isinstance(config.exit_criterion, str) or config.exit_criterion not in EXIT_CRITERIA:
        raise ValueError(f"`exit_criterion` must be one of {sorted(EXIT_CRITERIA)}, got {config.exit_criterion!r}.")
    check_integer("entropy_top_k", config.entropy_top_k, minimum=2)  # the entropy of one class is always 0
    resolve_thresholds(config.threshold, config.num_stages - 1)
    weights = config.stage_loss_weights
    if weights is not None:
        if not isinstance(weights, Sequence) or isinstance(weights, str) or len(weights) != config.num_stages:
            raise ValueError(
                f"`stage_loss_weights` must be a list of {config.num_stages} numbers, one per stage, got {weights!r}."
            )
        for weight in weights:
            check_number("stage_loss_weights", weight)
        if not 0 < sum(weights) < math.inf:
            raise ValueError(f"`stage_loss_weights` must be finite with a sum above 0, got {weights!r}.")
