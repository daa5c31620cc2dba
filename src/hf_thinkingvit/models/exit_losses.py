"""
Training losses of exits by layer, beyond a weighted sum: of learned halting scores, and of self-distillation.

All are per image and differentiable. `scores` are halting scores h_l `(images, stages)` in [0, 1]; that of the last
stage counts as 1, because the last stage always halts.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from .staged_run import StageStep
from .task_classification import IGNORE_INDEX, share_of_batch


def halting_distribution(scores: torch.Tensor) -> torch.Tensor:
    """
    PonderNet's probability of halting at each stage, p_l = h_l · Π_{k<l} (1 - h_k) (arXiv 2107.05407, section 2.2).

    Args:
        scores (`torch.Tensor` of shape `(images, stages)`): halting scores; the last one is taken for 1.

    Returns:
        `torch.Tensor` of the same shape, whose rows sum to 1.
    """
    scores = torch.cat([scores[:, :-1], torch.ones_like(scores[:, :1])], dim=1)
    goes_on = torch.cat([torch.ones_like(scores[:, :1]), (1 - scores[:, :-1]).cumprod(dim=1)], dim=1)
    return scores * goes_on


def act_weights(scores: torch.Tensor, thresholds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    ACT's weights of the stages up to the one at which an image halts: its halting scores, and there the remainder
    (arXiv 1603.08983, section 2).

    Args:
        scores (`torch.Tensor` of shape `(images, stages)`): halting scores.
        thresholds (`torch.Tensor` of shape `(stages - 1,)`): an image halts at the first stage up to which its scores
            sum to more than this (1 - ε), at the latest at the last.

    Returns:
        The weights `(images, stages)`, whose rows sum to 1, and the stage of halting `(images,)`, int64.
    """
    halts = scores.detach().cumsum(dim=1).clamp(max=1.0)[:, :-1] > thresholds
    halts = torch.cat([halts, torch.ones_like(scores[:, :1], dtype=torch.bool)], dim=1)
    stage = halts.int().argmax(dim=1)
    before = torch.arange(scores.shape[1], device=scores.device) < stage[:, None]
    weights = scores * before
    remainder = 1 - weights.sum(dim=1, keepdim=True)
    return weights.scatter(1, stage[:, None], remainder), stage


def act_loss(
    losses: torch.Tensor, scores: torch.Tensor, thresholds: torch.Tensor, ponder_weight: float
) -> torch.Tensor:
    """
    The loss of the answer at which an image halts, and the ponder cost N + R: stages that ran, and the remainder.

    Args:
        losses (`torch.Tensor` of shape `(images, stages)`): of each stage's answer.
        scores, thresholds: as in `act_weights`.
        ponder_weight (`float`): α_p, the weight of the ponder cost.

    Returns:
        `torch.Tensor` of shape `(images,)`.
    """
    weights, stage = act_weights(scores, thresholds)
    remainder = weights.gather(1, stage[:, None]).squeeze(1)
    return losses.gather(1, stage[:, None]).squeeze(1) + ponder_weight * (stage + 1 + remainder)


def pondernet_loss(
    losses: torch.Tensor, scores: torch.Tensor, prior_score: float, divergence_weight: float
) -> torch.Tensor:
    """
    PonderNet's expected loss, Σ p_l · loss_l + β · KL(p ‖ prior) (arXiv 2107.05407, section 2.3). The prior is
    geometric, with the last stage taking all that is left, so that the divergence is 0 where every exit has the prior's
    score.

    Args:
        losses, scores (`torch.Tensor` of shape `(images, stages)`): of each stage's answer; halting scores.
        prior_score (`float`): λ_p, the prior's probability of halting at each exit.
        divergence_weight (`float`): β.

    Returns:
        `torch.Tensor` of shape `(images,)`.
    """
    probabilities = halting_distribution(scores)
    prior = halting_distribution(torch.full_like(scores[:1], prior_score))
    divergence = torch.xlogy(probabilities, probabilities) - probabilities * prior.log()
    return (probabilities * losses).sum(dim=1) + divergence_weight * divergence.sum(dim=1)


def self_distillation_loss(stage_logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    FastBERT's self-distillation, the mean over the exits of KL(p_exit ‖ p_last) (arXiv 2004.02178, section 3.3). The
    last answer learns nothing from it.

    Args:
        stage_logits (`Sequence[torch.Tensor]`): logits `(images, num_labels)` of every stage, at least two.

    Returns:
        `torch.Tensor` of shape `(images,)`.
    """
    target = stage_logits[-1].detach().float().log_softmax(dim=-1)
    answers = [logits.float().log_softmax(dim=-1) for logits in stage_logits[:-1]]
    # PyTorch's argument order is that of KL(second ‖ first).
    divergences = [F.kl_div(target, answer, reduction="none", log_target=True).sum(dim=-1) for answer in answers]
    return torch.stack(divergences).mean(dim=0)


def exit_losses(
    config, stage_logits: Sequence[torch.Tensor], losses: torch.Tensor, halting_scores: Sequence[torch.Tensor] | None
) -> torch.Tensor:
    """
    The training loss of each image that `config` describes, of the stages that ran.

    Args:
        config (`EarlyExitViTConfig`): with `halting` or `self_distillation`.
        stage_logits (`Sequence[torch.Tensor]`): logits `(images, num_labels)` of each stage that ran.
        losses (`torch.Tensor` of shape `(images, stages)`): of these answers.
        halting_scores (`Sequence[torch.Tensor]`, *optional*): `(images,)` of each of these stages.

    Returns:
        `torch.Tensor` of shape `(images,)`, float32.

    Raises:
        ValueError: for self-distillation of a single stage, which has no exit to train.
    """
    if config.self_distillation:
        if len(stage_logits) < 2:
            raise ValueError("`self_distillation` trains exits, but only one stage runs: raise `max_stages`.")
        return self_distillation_loss(stage_logits)
    scores = torch.stack(list(halting_scores), dim=1)
    if config.halting == "pondernet":
        return pondernet_loss(losses, scores, config.halting_prior, config.halting_loss_weight)
    thresholds = scores.new_tensor(config.exit_thresholds[: scores.shape[1] - 1])
    return act_loss(losses, scores, thresholds, config.halting_loss_weight)


def exit_training_loss(
    config,
    labels: torch.Tensor,
    steps: Sequence[StageStep],
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    The mean of `exit_losses` over the images whose label counts, with `config.label_smoothing`.

    Args:
        config (`EarlyExitViTConfig`): with `halting` or `self_distillation`.
        labels (`torch.LongTensor` of shape `(images,)`): class indices; -100 marks images that do not count.
        steps (`Sequence[StageStep]`): every stage that ran, for all images.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): labels of the whole batch, of which this is a part.

    Returns:
        `torch.Tensor`: a float32 scalar.
    """
    stage_logits = [step.answer["logits"] for step in steps]
    labels, smoothing = labels.to(stage_logits[0].device), config.label_smoothing
    options = {"ignore_index": IGNORE_INDEX, "label_smoothing": smoothing, "reduction": "none"}
    losses = torch.stack([F.cross_entropy(logits.float(), labels, **options) for logits in stage_logits], dim=1)
    scores = [step.answer["halting_score"] for step in steps] if config.halting else None
    counts = labels != IGNORE_INDEX
    loss = (exit_losses(config, stage_logits, losses, scores) * counts).sum() / counts.sum().clamp(min=1)
    return loss * share_of_batch(labels, num_items_in_batch)


__all__ = [
    "act_loss",
    "act_weights",
    "exit_losses",
    "exit_training_loss",
    "halting_distribution",
    "pondernet_loss",
    "self_distillation_loss",
]
