"""When is an answer good enough? Scores of a stage's logits, and the rule that compares them with τ.

A criterion is one function from logits to a score per image, and the side of τ on which the image exits. To add one,
add a line to `EXIT_CRITERIA`. Every score is computed in float32, whatever the dtype of the logits. Comparisons are
strict, and a NaN score never passes one: an image with a broken answer goes on to the last stage.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .configuration_checks import as_plain_numbers, check_integer, check_number, configured_problem_type


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


def mean_binary_entropy(logits: torch.Tensor) -> torch.Tensor:
    """
    Entropy of each label's own yes or no (the sigmoid of its logit), averaged over the labels, in nats: for multi-label
    classification, where the labels of an image do not exclude one another.

    Args:
        logits (`torch.Tensor` of shape `(..., num_labels)`, any floating dtype).

    Returns:
        `torch.Tensor` of shape `(...)`, float32, between 0 and ln(2).
    """
    # H(sigmoid(z)) is even in z, and with |z| both terms are positive, so that nothing cancels.
    magnitude = logits.float().abs()
    entropies = torch.nn.functional.softplus(-magnitude) + magnitude * torch.sigmoid(-magnitude)
    return entropies.mean(dim=-1)


@dataclass(frozen=True)
class ExitCriterion:
    """
    A score and its direction.

    Attributes:
        score (`Callable`): `(logits, top_k) -> scores` of shape `(...)`, float32. No score is below 0.
        exits_below (`bool`): `True` where a low score means certainty (entropies): exit iff score < τ.
            `False` where a high score does (probabilities): exit iff score > τ.
        maximum (`Callable`): `(num_labels, top_k) -> float`, the greatest score that there is.
        description (`str`): the score in words, for model cards; `{top_k}` stands for `entropy_top_k`.
        default_threshold (`float`, *optional*): τ where a configuration gives none. `None`: it must give one.
        is_entropy (`bool`): whether the score is itself the entropy to report; else the top-k entropy is reported.
        multi_label (`bool`): whether it judges each label by itself (sigmoid), instead of all as one choice (softmax).
    """

    score: Callable[[torch.Tensor, int], torch.Tensor]
    exits_below: bool
    maximum: Callable[[int, int], float]
    description: str
    default_threshold: float | None = None
    is_entropy: bool = False
    multi_label: bool = False


EXIT_CRITERIA: dict[str, ExitCriterion] = {
    "topk_entropy": ExitCriterion(
        topk_entropy,
        exits_below=True,
        maximum=lambda num_labels, top_k: math.log(max(min(top_k, num_labels), 2)),
        description="the entropy of the {top_k} largest probabilities (renormalised, in nats)",
        default_threshold=0.5,
        is_entropy=True,
    ),
    "entropy": ExitCriterion(
        lambda logits, top_k: entropy(logits),
        exits_below=True,
        maximum=lambda num_labels, top_k: math.log(max(num_labels, 2)),
        description="the entropy of all probabilities (in nats)",
        is_entropy=True,
    ),
    "max_probability": ExitCriterion(
        lambda logits, top_k: max_probability(logits),
        exits_below=False,
        maximum=lambda num_labels, top_k: 1.0,
        description="the largest probability",
    ),
    "margin": ExitCriterion(
        lambda logits, top_k: margin(logits),
        exits_below=False,
        maximum=lambda num_labels, top_k: 1.0,
        description="the difference of the two largest probabilities",
    ),
    "mean_binary_entropy": ExitCriterion(
        lambda logits, top_k: mean_binary_entropy(logits),
        exits_below=True,
        maximum=lambda num_labels, top_k: math.log(2),
        description="the mean over the labels of the entropy of each label's probability (in nats)",
        default_threshold=0.1,
        is_entropy=True,
        multi_label=True,
    ),
}


def suits_problem_type(exit_criterion: str, problem_type: str | None) -> bool:
    """Whether the criterion judges answers of that kind: a softmax, or each label by itself."""
    criterion = EXIT_CRITERIA.get(exit_criterion) if isinstance(exit_criterion, str) else None
    if criterion is None or problem_type not in ("single_label_classification", "multi_label_classification"):
        return True
    return criterion.multi_label == (problem_type == "multi_label_classification")


def same_threshold(before: str, after: str, threshold: float | Sequence[float] | None) -> bool:
    """Whether τ means the same to both criteria. To different ones only 0 does, and to entropies: nothing exits."""
    if before == after or threshold is None:
        return True
    criteria = [EXIT_CRITERIA.get(name) if isinstance(name, str) else None for name in (before, after)]
    entropies = all(criterion is not None and criterion.exits_below for criterion in criteria)
    return entropies and not any(threshold if isinstance(threshold, Sequence) else [threshold])


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


def resolve_thresholds(threshold: float | Sequence[float], num_exits: int) -> tuple[float, ...]:
    """
    One τ per exit, as Python numbers, from one number or from `num_exits` of them (every stage but the last is an
    exit): Python's or NumPy's numbers, lists, NumPy arrays or tensors.

    Raises:
        ValueError: if a τ is negative, NaN or no number, or if the list has the wrong length.
    """
    threshold = as_plain_numbers(threshold)
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
        """
        The rule that `config` describes; `threshold`, where given, overrides `config.threshold`.

        Raises:
            ValueError: for a τ that is no number, and for a criterion or τ that the problem type does not allow.
        """
        threshold = config.threshold if threshold is None else threshold
        if threshold is None:
            raise ValueError(_needs_threshold(config.exit_criterion))
        rule = cls(config.exit_criterion, resolve_thresholds(threshold, config.num_stages - 1), config.entropy_top_k)
        rule.check_problem_type(configured_problem_type(config))
        return rule

    def check_problem_type(self, problem_type: str | None) -> None:
        """`ValueError` if this rule would judge answers to such a problem by what they do not say."""
        criterion = EXIT_CRITERIA[self.criterion]
        if not suits_problem_type(self.criterion, problem_type):
            names = sorted(name for name in EXIT_CRITERIA if suits_problem_type(name, problem_type))
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
    ExitRule.from_config(config)
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
