"""
Learning rates that fall from the classifier to the embeddings, for fine-tuning: each layer learns `decay` times as fast
as the one behind it (layer-wise learning rate decay, arXiv 2003.10555, as BEiT and MAE fine-tune with it).
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn


# A transformer layer, also of a hierarchy: `layers.3`, `layers.1.blocks.0`.
_LAYER = re.compile(r"^(?:.*?\.)?layers\.\d+(?:\.blocks\.\d+)?(?=\.)")
_EMBEDDINGS = re.compile(r"(?:^|\.)embeddings\.")


def parameter_depths(names: Iterable[str]) -> dict[str, int]:
    """
    The depth of each parameter: 0 for embeddings, from 1 on for transformer layers in the order of `names`, and one
    more than the last layer's for all else, which is behind the layers (classifiers, norms) or between stages.
    """
    names = list(names)
    layers: dict[str, int] = {}
    for name in names:
        if found := _LAYER.match(name):
            layers.setdefault(found[0], len(layers) + 1)
    top = len(layers) + 1
    return {
        name: layers[found[0]] if (found := _LAYER.match(name)) else 0 if _EMBEDDINGS.search(name) else top
        for name in names
    }


def with_layer_decay(groups: list[dict[str, Any]], model: nn.Module, decay: float) -> Iterator[dict[str, Any]]:
    """
    Each group of an optimizer divided by depth, with `lr_scale`, by which timm's schedules multiply the learning rate.

    Args:
        groups (`list[dict]`): with the parameters of `model` under `params`.
        model (`nn.Module`): to name the parameters.
        decay (`float`): factor of the learning rate from a layer to the one before it.
    """
    depths = parameter_depths(name for name, _ in model.named_parameters())
    depth_of = {id(parameter): depths[name] for name, parameter in model.named_parameters()}
    top = max(depths.values())
    for group in groups:
        for depth in range(top + 1):
            parameters = [each for each in group["params"] if depth_of[id(each)] == depth]
            if parameters:
                yield {**group, "params": parameters, "lr_scale": decay ** (top - depth)}
