"""
DynamicViT's token pruning (arXiv 2106.02034): before some layers, a small predictor scores the patches, and those with
the lowest scores are removed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .configuration_checks import as_plain_numbers
from .configuration_pruning import kept_counts, resolve_keep_rates
from .staged_compilation import compilable_step
from .staged_run import StagedRun, State
from .token_policies import TokenPolicy
from .token_pruning_training import OUTSIDE_LOSS, TrainedPruning


# Entries of a stage's state and answer: of each pruning layer, the patches that remain.
KEPT_TOKENS = "kept_tokens."


def kept_entries(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries of a state or answer that say which patches remain, in the order of the pruning layers."""
    return {name: state[name] for name in state if name.startswith(KEPT_TOKENS)}


class Float32Linear(nn.Linear):
    """
    A linear layer that computes in float32 whatever dtype its weights and input have, also under autocast. In bfloat16
    most patches of an image would get equal scores, and which of them remain would be chance.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states` (..., in_features) → (..., out_features), float32."""
        if hidden_states.dtype == torch.float32:
            return super().forward(hidden_states)
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(hidden_states.device.type, enabled=False):
            return nn.functional.linear(hidden_states.float(), self.weight.float(), bias)


class ScorePredictor(nn.Module):
    """
    Scores patches (arXiv 2106.02034, section 3.2). Half of the channels are of the patch itself, the other half are
    averaged over the patches that are still there.

    Args:
        width (`int`): channels of a token, a multiple of 4.
    """

    def __init__(self, width: int):
        super().__init__()
        self.layernorm = nn.LayerNorm(width, eps=1e-5)  # the official value, whatever the backbone's is
        self.in_proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, width // 2)
        self.fc2 = nn.Linear(width // 2, width // 4)
        self.fc3 = Float32Linear(width // 4, 2)
        self.activation_fn = nn.GELU()

    def forward(self, patches: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            patches (`torch.Tensor` of shape `(batch, patches, width)`): the residual stream before the layer.
            kept (`torch.Tensor` of shape `(batch, patches)`, *optional*): 1 for the patches that are averaged over, 0
                for the others; all by default. Where an image has none, the average is 0.

        Returns:
            `torch.Tensor` of shape `(batch, patches, 2)`: log-probabilities of keeping and of removing each, float32.
        """
        local, shared = self.activation_fn(self.in_proj(self.layernorm(patches))).chunk(2, dim=-1)
        if kept is None:
            shared = shared.mean(dim=1, keepdim=True)
        else:
            kept = kept[..., None].float()
            # A kept patch counts as 1 up to rounding, so the bound is for images without any.
            mean = (kept * shared.float()).sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True).clamp(min=0.5)
            shared = mean.to(local.dtype)
        shared = shared.expand_as(local)
        hidden_states = self.activation_fn(self.fc1(torch.cat([local, shared], dim=-1)))
        return self.fc3(self.activation_fn(self.fc2(hidden_states))).log_softmax(dim=-1)


class TokenPruning(TokenPolicy):
    """
    Removes patches: those that remain are gathered in descending order of their scores, as the official code orders
    them, behind the class token (and distillation token), which always remain. Sizes depend on the number of patches
    alone, so that the layers can be compiled and exported.

    The order is that of the probability of keeping, and is taken from its logarithm minus that of removing: the
    logarithm alone is rounded to 0 for every patch that is kept with near certainty.

    Args:
        predictors (`Sequence[ScorePredictor]`): one per pruning layer.
        layers (`Sequence[int]`): before which layers patches are removed.
        counts (`Sequence[int]`): patches that remain from each of them on.
        num_prefix_tokens (`int`): tokens before the patches.

    Attributes:
        kept (`list[torch.Tensor]`): for each pruning layer passed so far, the numbers of the remaining patches in the
            order of the tokens, int64 `(batch, count)`, counted from 0 in the order of the image.
    """

    def __init__(
        self,
        predictors: Sequence[ScorePredictor],
        layers: Sequence[int],
        counts: Sequence[int],
        num_prefix_tokens: int,
    ):
        self.predictors, self.layers, self.counts = predictors, list(layers), counts
        self.num_prefix_tokens = num_prefix_tokens
        self.kept: list[torch.Tensor] = []

    def before_layer(
        self, layer: int, hidden_states: torch.Tensor, is_last: bool
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        if layer not in self.layers:
            return hidden_states, {}
        index, num_prefix = self.layers.index(layer), self.num_prefix_tokens
        prefix, patches = hidden_states[:, :num_prefix], hidden_states[:, num_prefix:]
        keeping, removing = self.predictors[index](patches).unbind(dim=-1)
        best = (keeping - removing).topk(self.counts[index], dim=1).indices
        self.kept.append(self.kept[-1].gather(1, best) if self.kept else best)
        patches = patches.gather(1, best[..., None].expand(-1, -1, patches.shape[-1]))
        return torch.cat([prefix, patches], dim=1), {}

    def entries(self) -> dict[str, torch.Tensor]:
        """`kept` as entries of a state."""
        return {f"{KEPT_TOKENS}{index}": kept for index, kept in enumerate(self.kept)}


class ScorePredictors(nn.ModuleList):
    """
    The predictors of a model's last stage, one per pruning layer; empty where the model removes no tokens.

    Args:
        config (`PreTrainedConfig`): for `pruning_layers`, `pruning_keep_rate` and the number of prefix tokens.
        width (`int`): of the last stage.
    """

    def __init__(self, config: Any, width: int):
        super().__init__([ScorePredictor(width) for _ in config.pruning_layers or ()])
        self.config = config
        self.pruning_layers = list(config.pruning_layers or ())

    def counts(self, num_patches: int, keep_rate: float | Sequence[float] | None = None) -> list[int]:
        """
        Patches of `num_patches` that remain from each pruning layer on, at `keep_rate` instead of
        `config.pruning_keep_rate` where it is given.

        Raises:
            ValueError: for a rate that is invalid, or given to a model without pruning layers.
        """
        return kept_counts(self.rates(keep_rate), num_patches)

    def check_keep_rate(self, keep_rate: float | Sequence[float] | None) -> None:
        """`ValueError` for a rate that does not fit, also where no stage that runs would read it."""
        self.rates(keep_rate)

    def rates(self, keep_rate: float | Sequence[float] | None = None) -> tuple[float, ...]:
        """The share of patches that remains from each pruning layer on; arguments and errors as of `counts`."""
        if list(self.config.pruning_layers or ()) != self.pruning_layers:
            raise ValueError(
                f"`config.pruning_layers` is {self.config.pruning_layers} now, but the model has score predictors for "
                f"{self.pruning_layers or None}: set it before the model is made, or on loading, "
                "`from_pretrained(..., pruning_layers=...)`. To remove no tokens, use `keep_rate=1.0`."
            )
        if not self.pruning_layers:
            if keep_rate is not None:
                raise ValueError("`keep_rate` is of models with `pruning_layers`, and this one has none.")
            return ()
        keep_rate = self.config.pruning_keep_rate if keep_rate is None else keep_rate
        return resolve_keep_rates(keep_rate, len(self.pruning_layers))

    def policy(
        self, hidden_states: torch.Tensor, keep_rate: float | Sequence[float] | None, training: bool
    ) -> TokenPruning | TrainedPruning:
        """The policy for one run of the layers, from their input `(batch, tokens, width)` and their model's mode."""
        num_prefix = self.config.num_prefix_tokens
        if training:
            return TrainedPruning(self, self.pruning_layers, num_prefix)
        counts = self.counts(hidden_states.shape[1] - num_prefix, keep_rate)
        return TokenPruning(self, self.pruning_layers, counts, num_prefix)

    def kept_tokens(
        self, run: StagedRun, num_patches: int, keep_rate: float | Sequence[float] | None
    ) -> tuple[torch.Tensor, ...]:
        """
        The patches that remain at each pruning layer, int64 `(images that ran the last stage, kept)`, from a run whose
        stages were told to put them out. Of no image where the last stage did not run.
        """
        kept = tuple(kept_entries(run.steps[-1].answer).values())
        return kept or tuple(run.exit_stage.new_empty(0, count) for count in self.counts(num_patches, keep_rate))


class TokenPruningMixin:
    """
    What the steps of a staged model have more of where its backbone (`base_model`) has `score_predictors`, which may be
    empty.
    """

    def token_arguments(
        self, keep_rate: float | Sequence[float] | None = None, output_kept_tokens: bool | None = None
    ) -> dict[str, Any]:
        """
        As in [`Task`].

        Raises:
            ValueError: for a rate that does not fit, and in training mode for `output_kept_tokens`.
        """
        predictors, backbone = self.base_model.score_predictors, self.base_model
        predictors.check_keep_rate(keep_rate)
        if backbone.training and len(predictors) and output_kept_tokens:
            raise ValueError("`output_kept_tokens` is of evaluation mode: in training mode no token is removed.")
        arguments = {"output_kept_tokens": True} if output_kept_tokens else {}
        if keep_rate is not None:
            keep_rate = as_plain_numbers(keep_rate)
            arguments["keep_rate"] = tuple(keep_rate) if isinstance(keep_rate, Sequence) else keep_rate
        return arguments

    def outside_loss(self, stages: range) -> str | None:
        """As in [`ImageClassificationTask`]: where the pruned stage runs, `logits` and `stage_logits` are not all."""
        is_pruned = len(self.base_model.score_predictors) > 0 and self.config.num_stages - 1 in stages
        return OUTSIDE_LOSS if is_pruned else super().outside_loss(stages)

    @compilable_step
    def run_stage(
        self,
        stage_index: int,
        state: State,
        is_last: bool = False,
        keep_rate: float | tuple[float, ...] | None = None,
        **kwargs,
    ) -> State:
        """As in [`StagedModelMixin`]. Sizes depend on `keep_rate`, so there is a compiled program for each."""
        return super().run_stage(stage_index, state, is_last=is_last, keep_rate=keep_rate, **kwargs)


__all__ = ["ScorePredictor", "ScorePredictors", "TokenPruning", "TokenPruningMixin", "kept_entries"]
