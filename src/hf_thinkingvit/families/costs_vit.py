"""
Multiply-accumulates in matrix products on a plain ViT backbone, from a configuration alone: of nested stages, of
sub-networks, of exits by layer, and of tokens that halt or are pruned. `evaluation/macs.py` says what is counted.
"""

from collections.abc import Sequence

import torch

from ..models.configuration_avit import AViTConfig
from ..models.configuration_checks import as_pair
from ..models.configuration_early_exit_vit import EarlyExitViTConfig
from ..models.configuration_elastic_vit import ElasticViTConfig
from ..models.configuration_nested_vit import NestedViTConfig
from ..models.configuration_pruning import kept_counts, resolve_keep_rates
from ..models.configuration_thinkingvit import ThinkingViTConfig
from ..models.sub_networks import SubNetwork


def stage_macs(config: ThinkingViTConfig, image_size: int | Sequence[int] | None = None) -> list[int]:
    """
    As computed here: what a stage leaves uncomputed in its last layer is added by the next one. With a decoder, which
    reads all tokens, nothing is left uncomputed.
    """
    is_dense = config.decoder_type is not None
    num_patches, num_tokens = _num_patches_and_tokens(config, image_size)
    stages = config.stages
    macs = []
    for index, stage in enumerate(stages):
        if index == 0:
            entry = _patch_embedding(config, num_patches, stage.hidden_size)
        else:  # the rest of the previous stage's last layer, its tokens to this stage's width, and the new channels
            previous = stages[index - 1]
            entry = 0 if is_dense else _tokens_of_layer(previous, num_tokens - 1, num_tokens)
            entry += num_tokens * previous.hidden_size * stage.hidden_size
            entry += _patch_embedding(config, num_patches, stage.hidden_size - previous.hidden_size)
        pruned = index == len(stages) - 1
        *whole, last = _tokens_in_layers(config, num_patches) if pruned else [num_tokens] * config.num_hidden_layers
        layers = sum(_key_value(stage, tokens) + _tokens_of_layer(stage, tokens, tokens) for tokens in whole)
        layers += _score_predictors(config, num_patches) if pruned else 0
        last_layer = _key_value(stage, last) + _tokens_of_layer(stage, last if is_dense else 1, last)
        macs.append(entry + layers + last_layer + _answer(config, stage, num_patches))
    return macs


def published_stage_macs(config: ThinkingViTConfig, image_size: int | Sequence[int] | None = None) -> list[int]:
    """
    As published: every stage with all tokens of all layers (that were not pruned before) and its own patch embedding,
    recycling and decoders not counted.
    """
    num_patches, num_tokens = _num_patches_and_tokens(config, image_size)
    macs = []
    for index, stage in enumerate(config.stages):
        pruned = index == len(config.stages) - 1
        tokens_in_layers = _tokens_in_layers(config, num_patches) if pruned else [num_tokens] * config.num_hidden_layers
        layers = sum(_key_value(stage, tokens) + _tokens_of_layer(stage, tokens, tokens) for tokens in tokens_in_layers)
        layers += _score_predictors(config, num_patches) if pruned else 0
        classifier = 0 if config.decoder_type is not None else stage.hidden_size * config.num_labels
        macs.append(_patch_embedding(config, num_patches, stage.hidden_size) + layers + classifier)
    return macs


def _answer(config: ThinkingViTConfig, stage: SubNetwork, num_patches: int) -> int:
    """The classifier, or a decoder."""
    num_labels = config.num_labels
    if config.decoder_type is None:
        return stage.hidden_size * num_labels
    if config.decoder_type == "linear":
        return num_patches * stage.hidden_size * num_labels
    sizes, num_tokens = config.decoder_sizes, num_patches + num_labels
    layer = _key_value(sizes, num_tokens) + _tokens_of_layer(sizes, num_tokens, num_tokens)
    projections = num_patches * stage.hidden_size * sizes.hidden_size + num_tokens * sizes.hidden_size**2
    masks = num_patches * num_labels * sizes.hidden_size
    return config.decoder_num_hidden_layers * layer + projections + masks


def exit_macs(config: EarlyExitViTConfig, image_size: int | Sequence[int] | None = None) -> list[int]:
    """Of layers up to each exit, with its head. The other tokens of an exit's last layer are of the next stage."""
    num_patches, num_tokens = _num_patches_and_tokens(config, image_size)
    sizes, macs = config.sub_network, []
    layer = _key_value(sizes, num_tokens) + _tokens_of_layer(sizes, num_tokens, num_tokens)
    class_token_only = _key_value(sizes, num_tokens) + _tokens_of_layer(sizes, 1, num_tokens)
    left = 0  # by the stage before
    for index, stage in enumerate(config.stages):
        entry = _patch_embedding(config, num_patches, sizes.hidden_size) if index == 0 else left
        is_exit = index < config.num_stages - 1
        head = sizes.hidden_size * (config.num_labels + (is_exit and config.halting is not None))
        last = class_token_only
        if is_exit and config.exit_head == "transformer_layer":
            last, head = layer, head + class_token_only
        left = layer - last
        macs.append(entry + (len(stage.layers) - 1) * layer + last + head)
    return macs


def published_exit_macs(config: EarlyExitViTConfig, image_size: int | Sequence[int] | None = None) -> list[int]:
    """As a plain ViT computes: all tokens of every layer, also of an exit's own transformer layer."""
    num_patches, num_tokens = _num_patches_and_tokens(config, image_size)
    sizes, macs = config.sub_network, []
    layer = _key_value(sizes, num_tokens) + _tokens_of_layer(sizes, num_tokens, num_tokens)
    for index, stage in enumerate(config.stages):
        is_exit = index < config.num_stages - 1
        entry = 0 if index else _patch_embedding(config, num_patches, sizes.hidden_size)
        layers = len(stage.layers) + (is_exit and config.exit_head == "transformer_layer")
        head = sizes.hidden_size * (config.num_labels + (is_exit and config.halting is not None))
        macs.append(entry + layers * layer + head)
    return macs


def sub_network_macs(config: ElasticViTConfig, image_size: int | Sequence[int] | None = None) -> list[int]:
    """Of each sub-network alone: of its last layer only the class token is computed."""
    num_patches, num_tokens = _num_patches_and_tokens(config, image_size)
    macs = []
    for network in config.networks:
        numbers = network.layer_numbers(config.num_hidden_layers)
        total = _patch_embedding(config, num_patches, network.hidden_size) + network.hidden_size * config.num_labels
        for number in numbers:
            queries = 1 if number == numbers[-1] else num_tokens
            sizes = network.at_layer(number)
            total += _key_value(sizes, num_tokens) + _tokens_of_layer(sizes, queries, num_tokens)
        macs.append(total)
    return macs


def halting_macs(
    config: AViTConfig, token_depth: torch.Tensor, image_size: int | Sequence[int] | None = None
) -> torch.Tensor:
    """From the layers that each token runs, int64 `(batch_size, tokens)`; see `evaluation.halting_macs`."""
    num_patches, num_tokens = _num_patches_and_tokens(config, image_size)
    if token_depth.shape[1] != num_tokens:
        raise ValueError(f"`token_depth` has {token_depth.shape[1]} tokens, an image of this size {num_tokens}.")
    stage, prefix = config.sub_network, token_depth[:, : config.num_prefix_tokens]
    fixed = _patch_embedding(config, num_patches, stage.hidden_size)
    fixed += config.num_prefix_tokens * stage.hidden_size * config.num_labels
    macs = torch.full((len(token_depth),), fixed)
    for layer in range(1, config.num_hidden_layers + 1):
        unfinished = (prefix >= layer).any(dim=1)
        active = (token_depth >= layer).sum(dim=1)
        queries = (prefix >= layer).sum(dim=1) if layer == config.num_hidden_layers else active
        macs += unfinished * (_key_value(stage, active) + _tokens_of_layer(stage, queries, active))
    return macs


def _num_patches_and_tokens(config: NestedViTConfig, image_size: int | Sequence[int] | None) -> tuple[int, int]:
    height, width = as_pair(config.image_size if image_size is None else image_size)
    patch_height, patch_width = as_pair(config.patch_size)
    if getattr(config, "decoder_type", None) is not None:  # pads images to whole patches
        height, width = height + -height % patch_height, width + -width % patch_width
    num_patches = (height // patch_height) * (width // patch_width)
    return num_patches, num_patches + config.num_prefix_tokens


def _kept_patches(config: ThinkingViTConfig, num_patches: int) -> dict[int, int]:
    """The patches that remain from each pruning layer on, by the layer's number."""
    layers = config.pruning_layers or []
    if not layers:
        return {}
    rates = resolve_keep_rates(config.pruning_keep_rate, len(layers))
    return dict(zip(layers, kept_counts(rates, num_patches)))


def _tokens_in_layers(config: ThinkingViTConfig, num_patches: int) -> list[int]:
    """Tokens in each layer of the last stage."""
    kept, tokens = _kept_patches(config, num_patches), []
    for layer in range(config.num_hidden_layers):
        num_patches = kept.get(layer, num_patches)
        tokens.append(num_patches + config.num_prefix_tokens)
    return tokens


def _score_predictors(config: ThinkingViTConfig, num_patches: int) -> int:
    """The predictors of the last stage, each of which scores the patches that it is given."""
    width, macs = config.stages[-1].hidden_size, 0
    for remaining in _kept_patches(config, num_patches).values():
        macs += num_patches * (width**2 + width * (width // 2) + (width // 2) * (width // 4) + (width // 4) * 2)
        num_patches = remaining
    return macs


def _patch_embedding(config: NestedViTConfig, num_patches: int, width: int) -> int:
    patch_height, patch_width = as_pair(config.patch_size)
    return num_patches * config.num_channels * patch_height * patch_width * width


def _key_value(stage: SubNetwork, num_tokens: int | torch.Tensor) -> int | torch.Tensor:
    return 2 * num_tokens * stage.hidden_size * stage.attention_size


def _tokens_of_layer(
    stage: SubNetwork, num_queries: int | torch.Tensor, num_tokens: int | torch.Tensor
) -> int | torch.Tensor:
    """A layer for `num_queries` tokens that attend to `num_tokens`, without computing their keys and values."""
    query_and_output = 2 * stage.hidden_size * stage.attention_size
    attention = 2 * num_tokens * stage.attention_size
    mlp = 2 * stage.hidden_size * stage.intermediate_size
    return num_queries * (query_and_output + attention + mlp)
