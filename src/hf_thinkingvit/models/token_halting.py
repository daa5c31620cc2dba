"""
A-ViT's halting (arXiv 2112.07658, section 3, algorithm 1) as two token policies with equal results.

`DenseHalting` masks halted tokens: every step is differentiable. `SparseHalting` removes them: the tokens of the batch
are packed one after another, an image leaves with its class token (and distillation token), and the last layer computes
only the tokens that are read. Both use the same bookkeeping, which has one entry per token in whatever shape.
"""

from typing import Any, NamedTuple

import torch

from .configuration_avit import AViTConfig
from .token_packing import PackedTokens
from .token_policies import TokenPolicy


class HaltingState(NamedTuple):
    """
    What has been accumulated for each token: float32 tensors of the same shape.

    Attributes:
        cumulative: sum of the token's halting scores so far.
        remainder: 1 minus that sum, the weight of the token's last output.
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
    The outcome of one layer.

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
    # The remainder of a token that has halted is never read again.
    return HaltingStep(halts, weight), HaltingState(cumulative, state.remainder - scores)


class DenseHalting(TokenPolicy):
    """
    Halted tokens are masked and set to zero; nothing is removed. Tokens still active in the last layer halt there.

    Args:
        config (`AViTConfig`): for the halting score.
        epsilon (`float`): ε.
        hidden_states (`torch.Tensor` of shape `(batch, tokens, width)`): the input of the first layer.

    Attributes:
        output (`torch.Tensor` of shape `(batch, tokens, width)`): halting-weighted sum of each token's outputs.
        token_depth (`torch.LongTensor` of shape `(batch, tokens)`): layers that each token ran.
        ponder (`torch.Tensor` of shape `(batch, tokens)`): ρ, float32.
        scores (`list[torch.Tensor]`): halting scores `(batch, tokens)` of each layer's output.
    """

    def __init__(self, config: AViTConfig, epsilon: float, hidden_states: torch.Tensor):
        self.config, self.epsilon = config, epsilon
        shape, device = hidden_states.shape[:2], hidden_states.device
        self.active = torch.ones(shape, dtype=torch.bool, device=device)
        self.state = HaltingState.start(shape, device)
        self.output = torch.zeros_like(hidden_states)
        self.token_depth = torch.zeros(shape, dtype=torch.long, device=device)
        self.ponder = torch.zeros(shape, device=device)
        self.scores: list[torch.Tensor] = []

    def before_layer(
        self, layer: int, hidden_states: torch.Tensor, is_last: bool
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        return hidden_states, {"active": self.active, "attention_mask": self._mask(hidden_states)}

    def _mask(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Additive mask of keys (batch, 1, tokens, tokens). Images without active tokens see all: they are not read."""
        visible = self.active | ~self.active.any(dim=1, keepdim=True)
        mask = torch.zeros(visible.shape, dtype=hidden_states.dtype, device=visible.device)
        mask = mask.masked_fill(~visible, torch.finfo(hidden_states.dtype).min)
        return mask[:, None, None, :].expand(-1, 1, visible.shape[1], -1)

    def after_layer(self, layer: int, output: torch.Tensor, is_last: bool) -> torch.Tensor:
        config, active = self.config, self.active
        scores = halting_scores(output, config.gate_scale, config.gate_center, config.gate_channel)
        self.scores.append(scores)
        last = torch.ones_like(scores) if is_last else scores
        step, self.state = halt(self.state, last, self.epsilon, active)
        self.output = self.output + step.weight[..., None].to(output.dtype) * output
        self.ponder = self.ponder + active + torch.where(step.halts, step.weight, 0.0)
        self.token_depth = self.token_depth + active
        self.active = active & ~step.halts
        return output


class SparseHalting(TokenPolicy):
    """
    Halted tokens are removed. Tokens still active in the last layer halt there. For inference: not differentiable.

    Args:
        config (`AViTConfig`): for the halting score and the number of prefix tokens (class, distillation).
        epsilon (`float`): ε.
        hidden_states (`torch.Tensor` of shape `(batch, tokens, width)`): the input of the first layer.
        all_depths (`bool`): run images until all their tokens have halted, for their depths; otherwise an image leaves
            as soon as its prefix tokens have halted, after which nothing can change its answer.

    Attributes:
        output (`torch.Tensor` of shape `(batch * prefix tokens, width)`): halting-weighted sum of their outputs.
        token_depth (`torch.LongTensor` of shape `(batch * tokens,)`): layers that each token ran, as far as it was run.
    """

    def __init__(self, config: AViTConfig, epsilon: float, hidden_states: torch.Tensor, all_depths: bool):
        self.config, self.epsilon, self.all_depths = config, epsilon, all_depths
        self.num_layers = 0  # that have run
        batch_size, num_tokens, width = hidden_states.shape
        num_prefix, device = config.num_prefix_tokens, hidden_states.device
        self.output = hidden_states.new_zeros(batch_size * num_prefix, width)
        self.token_depth = torch.zeros(batch_size * num_tokens, dtype=torch.long, device=device)
        self.packed = PackedTokens.whole(batch_size, num_tokens, num_prefix, device)
        self.state = HaltingState.start((batch_size * num_tokens,), device)

    @property
    def is_done(self) -> bool:
        return self.packed.prefix.numel() == 0 and not (self.all_depths and self.packed.position.numel())

    def before_layer(
        self, layer: int, hidden_states: torch.Tensor, is_last: bool
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        packed = self.packed
        if not self.num_layers:
            hidden_states = hidden_states.flatten(0, 1)[None]
        if not is_last:
            return hidden_states, {"query_lengths": packed.lengths, "key_lengths": packed.lengths}
        # Every token halts here, and only the outputs of prefix tokens are read.
        lengths = {"query_lengths": packed.prefix_lengths, "key_lengths": packed.lengths}
        return hidden_states, {"queries": packed.prefix, **lengths}

    def after_layer(self, layer: int, output: torch.Tensor | tuple[torch.Tensor, ...], is_last: bool) -> torch.Tensor:
        config, packed = self.config, self.packed
        self.num_layers += 1
        if is_last:
            self.token_depth[packed.position] = self.num_layers
            prefix, weight = output[0][0], self.state.remainder[packed.prefix]
            self.output.index_add_(0, packed.prefix_slot, weight[:, None].to(self.output.dtype) * prefix)
            return prefix[None]
        hidden_states = output[0]
        scores = halting_scores(hidden_states, config.gate_scale, config.gate_center, config.gate_channel)
        step, self.state = halt(self.state, scores, self.epsilon)
        weight, prefix = step.weight[packed.prefix], hidden_states[packed.prefix]
        self.output.index_add_(0, packed.prefix_slot, weight[:, None].to(self.output.dtype) * prefix)
        if not step.halts.any():
            return output
        stays = ~step.halts
        if not self.all_depths:
            unfinished = torch.zeros(packed.batch_size, device=stays.device)
            unfinished.index_add_(0, packed.image[packed.prefix], stays[packed.prefix].float())
            stays = stays & (unfinished > 0)[packed.image]
        self.token_depth[packed.position[~stays]] = self.num_layers
        rows = stays.nonzero().squeeze(1)
        self.packed, self.state = packed.select(rows), self.state.select(rows)
        return hidden_states[rows][None]


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
