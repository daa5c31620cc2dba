"""At what layer each patch of an image leaves the computation, under either token policy: halting or pruning."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.configuration_avit import AViTConfig, check_halting_epsilon
from ..models.configuration_pruning import resolve_keep_rates


class TokenDepths(NamedTuple):
    """
    Attributes:
        predicted (`torch.LongTensor` of shape `(images,)`): the classes.
        depth (`torch.LongTensor` of shape `(images, rows, columns)`): layers that each patch runs.
        halting_scores (`list[torch.Tensor]`):
            Of an A-ViT, for each layer the scores of all tokens that were active in it, one after another; else empty.
    """

    predicted: torch.Tensor
    depth: torch.Tensor
    halting_scores: list[torch.Tensor]


def check_token_arguments(
    config: PreTrainedConfig,
    halting_epsilon: float | None = None,
    keep_rate: float | Sequence[float] | None = None,
) -> None:
    """
    `ValueError` for a model from which no patch leaves, and for arguments of `token_depths` that are invalid, or of the
    other kind of model.
    """
    if isinstance(config, AViTConfig):
        if keep_rate is not None:
            raise ValueError("`keep_rate` is of models that prune tokens, and this is an A-ViT.")
        if halting_epsilon is not None:
            check_halting_epsilon(halting_epsilon)
        return
    if not getattr(config, "pruning_layers", None):
        raise ValueError(
            "No patch leaves this model: it is neither an A-ViT nor a model with `pruning_layers`, but of type "
            f"{config.model_type!r}."
        )
    if halting_epsilon is not None:
        raise ValueError("`halting_epsilon` is of an A-ViT, and this model prunes tokens.")
    if keep_rate is not None:
        resolve_keep_rates(keep_rate, len(config.pruning_layers))


@torch.no_grad()
def token_depths(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    *,
    halting_epsilon: float | None = None,
    keep_rate: float | Sequence[float] | None = None,
) -> TokenDepths:
    """
    The depth of every patch. In an A-ViT that is the number of layers until it halts, even if the class token halts
    earlier. With token pruning it counts the layers of the last stage, which every image runs here, whatever τ is, and
    whose answer is the prediction; earlier stages remove nothing.

    Args:
        model (`PreTrainedModel`): an A-ViT or a model with `pruning_layers`, in evaluation mode.
        pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`): of `config.image_size`.
        halting_epsilon (`float`, *optional*): of an A-ViT, instead of its own; a greater one halts earlier.
        keep_rate (`float` or `list[float]`, *optional*): with token pruning, instead of `config.pruning_keep_rate`.

    Raises:
        ValueError: as `check_token_arguments`.
    """
    config = model.config
    check_token_arguments(config, halting_epsilon, keep_rate)
    if isinstance(config, AViTConfig):
        predicted, depth, scores = _read_halting(model, pixel_values, halting_epsilon)
    else:
        predicted, depth, scores = _read_pruning(model, pixel_values, keep_rate)
    return TokenDepths(predicted, depth.unflatten(1, config.patch_grid), scores)


def _read_halting(
    model: PreTrainedModel, pixel_values: torch.Tensor, halting_epsilon: float | None
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    predicted = model(pixel_values, halting_epsilon=halting_epsilon).logits.argmax(dim=1)
    tokens = model.base_model(pixel_values, halting_epsilon=halting_epsilon)
    scores = [each[tokens.token_depth > layer] for layer, each in enumerate(tokens.halting_scores)]
    return predicted, tokens.token_depth[:, model.config.num_prefix_tokens :], scores


def _read_pruning(
    model: PreTrainedModel, pixel_values: torch.Tensor, keep_rate: float | Sequence[float] | None
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    config = model.config
    # With the logits of every stage, so that every image runs the last one: with `exit_at_threshold`, an image of
    # entropy 0 would leave before it even at τ = 0.
    outputs = model(pixel_values, keep_rate=keep_rate, output_kept_tokens=True, output_stage_logits=True)
    leaves = [*config.pruning_layers, config.num_hidden_layers]  # layers that a patch has run when it leaves
    num_patches = config.patch_grid[0] * config.patch_grid[1]
    depth = torch.full((len(pixel_values), num_patches), leaves[0], device=pixel_values.device)
    for kept, layers in zip(outputs.kept_tokens, leaves[1:], strict=True):
        depth.scatter_(1, kept, layers)
    return outputs.stage_logits[-1].argmax(dim=1), depth, []
