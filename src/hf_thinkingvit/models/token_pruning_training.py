"""
DynamicViT's training (arXiv 2106.02034, section 3.3): no token is removed, so that gradients reach the predictors.
Which patches are kept is sampled, and the attention of every layer leaves out the others.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from .staged_run import Answer, StagedRun, State
from .task_classification import share_of_batch
from .token_policies import TokenPolicy


# Entries of a stage's state and answer: of each pruning layer, which patches are kept; and the stage's final patches.
DECISIONS = "keep_decisions."
PATCHES = "patch_tokens"

OUTSIDE_LOSS = (
    "A loss that is computed from `logits` trains the last stage only, and leaves out the ratio loss, so that nothing "
    "teaches how many patches to keep; `Trainer` does that with `label_smoothing_factor` or `compute_loss_func`. For "
    "label smoothing, set `label_smoothing` in the model's configuration instead. A loss of your own should be "
    "computed from every entry of `stage_logits`, and add `ratio_loss` of the outputs times "
    "`pruning_ratio_loss_weight`; call the model with `output_stage_logits=True` to say so."
)
EPSILON = 1e-6  # of the official attention; with it, also an image whose patches are all left out has finite values


def gumbel_noise(log_probabilities: torch.Tensor) -> torch.Tensor:
    """Independent draws of the standard Gumbel distribution, of the same shape, dtype and device."""
    return -torch.empty_like(log_probabilities).exponential_().log()


def sample_kept(log_probabilities: torch.Tensor) -> torch.Tensor:
    """
    A draw for each patch, 1 to keep it and 0 to leave it out, with the gradient of the probability that both noises
    give: the straight-through Gumbel-softmax at temperature 1 (arXiv 1611.01144).

    Args:
        log_probabilities (`torch.Tensor` of shape `(batch, patches, 2)`): of keeping and of removing.

    Returns:
        `torch.Tensor` of shape `(batch, patches)`.
    """
    noisy = log_probabilities + gumbel_noise(log_probabilities)
    probability = noisy.softmax(dim=-1)[..., 0]
    kept = (noisy[..., 0] > noisy[..., 1]).to(probability.dtype)
    return kept - probability.detach() + probability


class TrainedPruning(TokenPolicy):
    """
    Samples which patches are kept, of those kept so far, and tells the attention of all layers, also of those before
    the first pruning layer, whose patches are all kept.

    Args:
        predictors (`Sequence[ScorePredictor]`): one per pruning layer.
        layers (`Sequence[int]`): before which layers patches are scored.
        num_prefix_tokens (`int`): tokens before the patches, which are always kept.

    Attributes:
        decisions (`list[torch.Tensor]`): for each pruning layer passed so far, which patches are kept: 1 or 0, float32
            `(batch, patches)`, differentiable.
    """

    def __init__(self, predictors: Sequence[nn.Module], layers: Sequence[int], num_prefix_tokens: int):
        self.predictors, self.layers, self.num_prefix_tokens = predictors, list(layers), num_prefix_tokens
        self.decisions: list[torch.Tensor] = []

    def before_layer(
        self, layer: int, hidden_states: torch.Tensor, is_last: bool
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        patches = hidden_states[:, self.num_prefix_tokens :]
        previous = self.decisions[-1] if self.decisions else patches.new_ones(patches.shape[:2], dtype=torch.float32)
        if layer in self.layers:
            log_probabilities = self.predictors[self.layers.index(layer)](patches, previous)
            previous = sample_kept(log_probabilities) * previous
            self.decisions.append(previous)
        prefix = previous.new_ones(len(previous), self.num_prefix_tokens)
        return hidden_states, {"kept_keys": torch.cat([prefix, previous], dim=1)}

    def entries(self) -> dict[str, torch.Tensor]:
        """`decisions` as entries of a state."""
        return {f"{DECISIONS}{index}": decision for index, decision in enumerate(self.decisions)}


def attention_to_kept(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept_keys: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention in which tokens that are left out are keys for themselves alone, in float32. Unlike a softmax it has an ε,
    as the official weights were trained with, so a key that is left out has a probability of about ε / tokens.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, queries, head_dim)`): of the leading tokens, or of all.
        key, value (`torch.Tensor` of shape `(batch, heads, tokens, head_dim)`): of all tokens.
        kept_keys (`torch.Tensor` of shape `(batch, tokens)`): 1 where a token is kept, 0 where it is left out.
        scaling (`float`): of the products.
        dropout (`float`): of the probabilities.

    Returns:
        The output `(batch, queries, heads, head_dim)`, and the probabilities `(batch, heads, queries, tokens)`.
    """
    num_queries, num_tokens = query.shape[2], key.shape[2]
    scores = (query @ key.transpose(2, 3) * scaling).float()
    itself = torch.eye(num_queries, num_tokens, device=query.device)
    visible = kept_keys[:, None, None, :]
    visible = visible + (1 - visible) * itself
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp() * visible
    probabilities = (weights + EPSILON / num_tokens) / (weights.sum(dim=-1, keepdim=True) + EPSILON)
    probabilities = nn.functional.dropout(probabilities.to(value.dtype), dropout)
    return (probabilities @ value).transpose(1, 2), probabilities


def decisions_of(answer: Answer) -> tuple[torch.Tensor, ...]:
    """The decisions of each pruning layer; none of a stage that was not pruned."""
    return tuple(answer[name] for name in answer if name.startswith(DECISIONS))


def training_entries(state: State, num_prefix_tokens: int) -> State:
    """What a pruned stage answers with in training, beside its logits: the decisions, and its final patches."""
    entries = {name: state[name] for name in state if name.startswith(DECISIONS)}
    return {**entries, PATCHES: state["tokens"][:, num_prefix_tokens:]} if entries else {}


def ratio_loss(answer: Answer, rates: Sequence[float]) -> torch.Tensor | None:
    """
    How far the share of patches that each image keeps is from the `rates`: the squared difference, averaged over the
    batch and the pruning layers, a float32 scalar, 0 for an empty batch. `None` where the answer is of a stage that was
    not pruned.
    """
    decisions = decisions_of(answer)
    if not decisions:
        return None
    shares = torch.stack([kept.mean(dim=1) for kept in decisions], dim=1)
    squares = (shares - torch.tensor(rates, dtype=shares.dtype, device=shares.device)).square()
    return squares.sum() / max(squares.numel(), 1)


def add_pruning_outputs(
    outputs: ModelOutput,
    config: Any,
    run: StagedRun,
    rates: Sequence[float],
    labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs,
) -> None:
    """
    Set `ratio_loss`, `keep_decisions` and `patch_tokens` of a classifier's outputs where the pruned stage ran in
    training, and add the ratio loss to `loss` where there are labels. It is scaled by the part's share of a batch of
    which `num_items_in_batch` labels are counted, as all of `loss`.
    """
    answer = run.steps[-1].answer
    loss = ratio_loss(answer, rates)
    if loss is None:
        return
    outputs.ratio_loss, outputs.keep_decisions = loss, decisions_of(answer)
    outputs.patch_tokens = answer[PATCHES]
    if labels is not None:
        outputs.ratio_loss = loss * share_of_batch(labels.to(loss.device), num_items_in_batch)
        outputs.loss = outputs.loss + config.pruning_ratio_loss_weight * outputs.ratio_loss


__all__ = [
    "DECISIONS",
    "TrainedPruning",
    "add_pruning_outputs",
    "attention_to_kept",
    "ratio_loss",
    "sample_kept",
    "training_entries",
]
