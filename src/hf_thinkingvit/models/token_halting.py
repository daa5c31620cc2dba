"""
When does a token stop? The bookkeeping of A-ViT (arXiv 2112.07658, section 3, algorithm 1), after each layer.

Shared by the dense computation, where halted tokens are masked, and the sparse one, where they are gone: the state has
one entry per token, whatever the tokens' shape is.
"""

from typing import NamedTuple

import torch

from .configuration_avit import AViTConfig


class HaltingState(NamedTuple):
    """
    Of each token: float32 tensors of one shape, which is the caller's.

    Attributes:
        cumulative: sum of its halting scores so far.
        remainder: what is left of 1 for its last output.
    """

    cumulative: torch.Tensor
    remainder: torch.Tensor

    @classmethod
    def start(cls, shape: tuple[int, ...], device: torch.device) -> "HaltingState":
        return cls(torch.zeros(shape, device=device), torch.ones(shape, device=device))

    def select(self, index: torch.Tensor) -> "HaltingState":
        return HaltingState(self.cumulative[index], self.remainder[index])


class HaltingStep(NamedTuple):
    """
    What a layer did to the tokens that were active in it.

    Attributes:
        halts: bool, which tokens halt after this layer.
        weight: share of this layer's output in the token's halting-weighted output; 0 where it was not active. Where a
            token halts, it is its remainder, which the ponder loss counts.
    """

    halts: torch.Tensor
    weight: torch.Tensor


def halting_scores(hidden_states: torch.Tensor, scale: float, center: float, channel: int) -> torch.Tensor:
    """`sigmoid(scale * t[channel] - center)` of tokens `(..., width)`: shape `(...)`, float32."""
    return torch.sigmoid(hidden_states[..., channel].float() * scale - center)


def halt(
    state: HaltingState, scores: torch.Tensor, epsilon: float, active: torch.Tensor | None = None
) -> tuple[HaltingStep, HaltingState]:
    """
    Account for a layer.

    Args:
        state (`HaltingState`): before the layer.
        scores (`torch.Tensor`): halting scores of the layer's output; 1 where tokens must halt.
        epsilon (`float`): a token halts once its scores sum to 1 - epsilon.
        active (`torch.BoolTensor`, *optional*): which tokens were still computed; all by default.
    """
    if active is not None:
        scores = torch.where(active, scores, 0.0)
    cumulative = state.cumulative + scores
    halts = cumulative >= 1.0 - epsilon
    if active is not None:
        halts = halts & active
    weight = torch.where(halts, state.remainder, scores)
    # What a halted token's remainder becomes is never read.
    return HaltingStep(halts, weight), HaltingState(cumulative, state.remainder - scores)


def depth_until_answer(token_depth: torch.Tensor, num_prefix: int) -> torch.Tensor:
    """
    Layers that each token runs until its image is finished, from the depths `(batch_size, tokens)` of the tokens. An
    image is finished once all of its first `num_prefix` tokens have halted; tokens that are active then leave with it.
    """
    return torch.minimum(token_depth, token_depth[:, :num_prefix].amax(dim=1, keepdim=True))


def sparse_macs(config: AViTConfig, depth: torch.Tensor, num_layers: int) -> torch.Tensor:
    """
    Multiply-accumulates per image, int64 `(batch_size,)`, that `num_layers` layers spend in the sparse computation,
    where the image's tokens run `depth` `(batch_size, tokens)` of them until its answer is there. The last layer
    computes only the prefix tokens.
    """
    width, layers = config.hidden_size, torch.arange(1, num_layers + 1, device=depth.device)
    active = depth >= layers[:, None, None]
    num_tokens = active.sum(dim=2)
    num_queries = torch.cat([num_tokens[:-1], active[-1:, :, : config.num_prefix_tokens].sum(dim=2)])
    key_value = 2 * num_tokens * width**2
    per_query = 2 * width**2 + 2 * num_tokens * width + 2 * width * config.intermediate_size
    return (key_value + num_queries * per_query).sum(dim=0)


def depth_prior(num_layers: int, target_depth: float, std: float, mass: float = 0.98) -> torch.Tensor:
    """
    The target of the distributional prior: a Gaussian density over the layer indices 0 to `num_layers` - 1, centred at
    `target_depth`, scaled so that its first `target_depth` entries sum to `mass`. Float32 `(num_layers,)`.
    """
    density = torch.exp(-0.5 * ((torch.arange(num_layers, dtype=torch.float64) - target_depth) / std) ** 2)
    before = density[: max(int(target_depth), 1)].sum()
    return (density * (mass / before)).float()


def prior_loss(mean_scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    Divergence of the layers' share of halting from `target`: Σ target · (log target - log share) / layers.

    Args:
        mean_scores (`torch.Tensor` of shape `(layers,)`): halting scores, averaged over tokens and images.
        target (`torch.Tensor` of shape `(layers,)`): from `depth_prior`.
    """
    # Scores may all underflow to 0: then every share is 0, not NaN, and nothing is learnt from the prior yet.
    share = (mean_scores / mean_scores.sum().clamp(min=1e-20)).clamp(0.01, 0.99)
    return torch.nn.functional.kl_div(share.log(), target, reduction="sum") / len(target)
