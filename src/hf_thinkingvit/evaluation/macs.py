"""
Multiply-accumulates in matrix products, from a configuration alone.

Models that think in stages are counted in two ways. `stage_macs` counts what this package computes: on ViT, only those
parts of a last layer that are read, each recycling projection only as wide as the next stage, and each channel of the
patch embedding once. `published_stage_macs` counts as the paper's tables do, every stage as a complete plain model.
Both give one number per stage: an image that exits after stage s has cost the sum of the first s + 1 entries.
`halting_macs` counts an A-ViT from the depths of an image's tokens. How a family is counted is part of its record in
`families/`.
"""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedConfig

from ..families import family_of
from ..models.configuration_avit import AViTConfig
from ..models.configuration_elastic_vit import ElasticViTConfig
from ..models.configuration_staged import StagedConfig


def stage_macs(config: StagedConfig, image_size: int | Sequence[int] | None = None) -> list[int]:
    """
    MACs that one image adds by running each stage, including the step from the previous stage to it.

    Args:
        config (`ThinkingViTConfig` or `ThinkingSwinConfig`): the model.
        image_size (`int` or `(height, width)`, *optional*): input in pixels, `config.image_size` by default.

    Returns:
        `list[int]`, one entry per stage.

    Raises:
        ValueError: if the model does not think in stages, or belongs to no known family.
    """
    return _counting(config, "stages")(config, image_size)


def published_stage_macs(config: StagedConfig, image_size: int | Sequence[int] | None = None) -> list[int]:
    """
    MACs of each stage as the paper counts them: a complete plain ViT or Swin of the stage's width. Recycling is counted
    on Swin and not on ViT. Arguments, result and errors as for `stage_macs`.
    """
    return _counting(config, "published_stages")(config, image_size)


def sub_network_macs(config: ElasticViTConfig, image_size: int | Sequence[int] | None = None) -> list[int]:
    """
    MACs of each sub-network of an elastic ViT alone, as this package computes it. Arguments as of `stage_macs`.

    Raises:
        ValueError: if the model has no sub-networks to choose from.
    """
    return _counting(config, "sub_networks")(config, image_size)


def halting_macs(
    config: AViTConfig, token_depth: torch.Tensor, image_size: int | Sequence[int] | None = None
) -> torch.Tensor:
    """
    MACs that an A-ViT spends on each image, from the depths of its tokens in a call without `max_depth`. Equal to
    `macs` of the outputs without `output_token_depth`, where an image stops as soon as its class token has halted.

    Args:
        config (`AViTConfig`): the model.
        token_depth (`torch.LongTensor` of shape `(batch_size, tokens)`): layers that each token runs, from 1; the class
            token (and distillation token) first.
        image_size (`int` or `(height, width)`, *optional*): input in pixels, `config.image_size` by default.

    Returns:
        `torch.LongTensor` of shape `(batch_size,)`.

    Raises:
        ValueError: if `token_depth` has another number of tokens, or the model does not halt tokens.
    """
    return _counting(config, "halting")(config, token_depth, image_size)


COUNTED = {
    "stages": "think in stages",
    "published_stages": "think in stages",
    "sub_networks": "have sub-networks to choose from",
    "halting": "halt tokens",
}


def _counting(config: PreTrainedConfig, kind: str) -> Callable:
    family = family_of(config)
    counting = getattr(family.costs, kind)
    if counting is None:
        raise ValueError(f"{family.name} models do not {COUNTED[kind]}, got {type(config).__name__}.")
    return counting
