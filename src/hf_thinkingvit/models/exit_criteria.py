"""
What an image's certainty is measured by: exit criteria, by name.

A criterion is a line in `EXIT_CRITERIA`: in the simplest case a function of a stage's logits. It may also read other
entries of the answer (a learned halting score) and carry a memory from one stage to the next (the previous answer, a
counter): whatever runs stages hands the memory on, with one row for each image that goes on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .exit_memory import act, confident_twice, patience, pondernet, q_exit, similarity
from .exit_scores import entropy, margin, max_probability, mean_binary_entropy, mean_grid_entropy, topk_entropy
from .staged_run import Answer, Memory


@dataclass(frozen=True)
class ExitCriterion:
    """
    A score and its direction.

    Attributes:
        score (`Callable`): `(logits, top_k) -> scores` `(images,)`, float32, of the answer's entry `"logits"`. No score
            is below 0.
        exits_below (`bool`): `True` where a low score means certainty (entropies): exit iff score < τ.
            `False` where a high score does (probabilities): exit iff score > τ.
        maximum (`Callable`): `(num_labels, top_k) -> float`, the greatest score that there is; infinity where scores
            have no bound.
        description (`str`): the score in words, for model cards; `{top_k}` stands for `entropy_top_k`.
        default_threshold (`float`, *optional*): τ for configurations without `threshold`. `None`: they must set it.
        is_entropy (`bool`): whether the score is itself the entropy to report.
        multi_label (`bool`): whether it judges each label by itself (sigmoid), instead of all as one choice (softmax).
        is_dense (`bool`): whether it judges answers with a class for each place of the image (segmentation).
        score_with_memory (`Callable`, *optional*): used instead of `score`:
            `(answer, memory, top_k) -> (scores, memory)`, where `answer` has every entry that the model answers with,
            and `memory` is what the call for the stage before returned, of the same images (`{}` at the first stage).
            Its tensors have one row per image. Scores must not depend on τ: then one pass serves every τ.
        halting (`str`, *optional*): the kind of learned halting score that it reads, as in `config.halting`.
        draws (`bool`): whether the score depends on a number that is drawn at random for each image, uniform in [0, 1),
            the entry `"noise"` of the memory that the first stage starts with.
    """

    score: Callable[[torch.Tensor, int], torch.Tensor] | None
    exits_below: bool
    maximum: Callable[[int, int], float]
    description: str
    default_threshold: float | None = None
    is_entropy: bool = False
    multi_label: bool = False
    is_dense: bool = False
    score_with_memory: Callable[[Answer, Memory, int], tuple[torch.Tensor, Memory]] | None = None
    halting: str | None = None
    draws: bool = False

    def __call__(self, answer: Answer, memory: Memory, top_k: int) -> tuple[torch.Tensor, Memory]:
        """Scores `(images,)`, float32, and the memory for the next stage."""
        if self.score_with_memory is not None:
            return self.score_with_memory(answer, memory, top_k)
        return self.score(answer["logits"], top_k), {}


def _measured_entropy(answer: Answer, memory: Memory, top_k: int) -> tuple[torch.Tensor, Memory]:
    """The entropy that the task has measured itself, knowing how its logits become pixels."""
    if "entropy" not in answer:
        raise ValueError(
            "`mean_pixel_entropy` reads the entry `entropy`, which the answers of a segmentation model have, got the "
            f"entries {sorted(answer)}: choose another `exit_criterion`, with its `threshold`."
        )
    return answer["entropy"], memory


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
    "mean_pixel_entropy": ExitCriterion(
        None,
        exits_below=True,
        maximum=lambda num_labels, top_k: math.log(max(num_labels, 2)),
        description="the entropy of all probabilities, averaged over pixels (in nats)",
        default_threshold=0.5,
        is_entropy=True,
        is_dense=True,
        score_with_memory=_measured_entropy,
    ),
    "mean_grid_entropy": ExitCriterion(
        lambda logits, top_k: mean_grid_entropy(logits),
        exits_below=True,
        maximum=lambda num_labels, top_k: math.log(max(num_labels, 2)),
        description="the entropy of all probabilities, averaged over patches (in nats)",
        is_entropy=True,
        is_dense=True,
    ),
    "normalised_entropy": ExitCriterion(
        lambda logits, top_k: entropy(logits) / math.log(max(logits.shape[-1], 2)),
        exits_below=True,
        maximum=lambda num_labels, top_k: 1.0,
        description="the entropy of all probabilities as a fraction of its maximum, the logarithm of their number",
    ),
    "similarity": ExitCriterion(
        None,
        exits_below=True,
        maximum=lambda num_labels, top_k: math.inf,
        description="the mean squared difference of the logits from those of the stage before",
        score_with_memory=similarity,
    ),
    "patience": ExitCriterion(
        None,
        exits_below=False,
        maximum=lambda num_labels, top_k: math.inf,
        description="the number of stages in a row with the same prediction",
        score_with_memory=patience,
    ),
    "confident_twice": ExitCriterion(
        None,
        exits_below=False,
        maximum=lambda num_labels, top_k: 1.0,
        description="the largest probability, the smaller one of the last two stages,",
        score_with_memory=confident_twice,
    ),
    "act": ExitCriterion(
        None,
        exits_below=False,
        maximum=lambda num_labels, top_k: 1.0,
        description="the sum of the learned halting scores so far, at most 1,",
        score_with_memory=act,
        halting="act",
    ),
    "pondernet": ExitCriterion(
        None,
        exits_below=False,
        maximum=lambda num_labels, top_k: 2.0,
        description="the learned probability of having halted, plus a number between 0 and 1 drawn at random (so that "
        "answers to the same image may differ),",
        score_with_memory=pondernet,
        halting="pondernet",
        draws=True,
    ),
    "q_exit": ExitCriterion(
        None,
        exits_below=False,
        maximum=lambda num_labels, top_k: 1.0,
        description="the learned probability of having halted so far,",
        score_with_memory=q_exit,
        halting="pondernet",
    ),
}


def suits_problem_type(exit_criterion: str, problem_type: str | None) -> bool:
    """Whether the criterion is defined for answers to such a problem: a softmax, or a sigmoid for each label."""
    criterion = EXIT_CRITERIA.get(exit_criterion) if isinstance(exit_criterion, str) else None
    if criterion is None or problem_type not in ("single_label_classification", "multi_label_classification"):
        return True
    return criterion.multi_label == (problem_type == "multi_label_classification")


def same_threshold(before: str, after: str, threshold: float | Sequence[float] | None) -> bool:
    """Whether τ means the same to both criteria: if they are the same, or are two entropies and τ is 0."""
    if before == after or threshold is None:
        return True
    criteria = [EXIT_CRITERIA.get(name) if isinstance(name, str) else None for name in (before, after)]
    entropies = all(criterion is not None and criterion.exits_below for criterion in criteria)
    return entropies and not any(threshold if isinstance(threshold, Sequence) else [threshold])


__all__ = ["EXIT_CRITERIA", "ExitCriterion", "same_threshold", "suits_problem_type"]
