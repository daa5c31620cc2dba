"""
Official checkpoints with token pruning: DynamicViT on DeiT (raoyongming/DynamicViT), and ThinkingViT with DynamicViT in
its last stage, whose tensors are as wide as a supernet although its stages are not.
"""

import re
from typing import Any

import torch

from .official import Checkpoint, UnstatedField
from .official_deit import DEIT_DEPTH
from .official_supernet import cut_supernet


CROP_PCT = 0.875  # both official evaluations resize the shorter side to 256 for a crop of 224

# Parts of a score predictor, in our state dicts and in the official ones.
PREDICTOR_PARTS = {
    "layernorm": "in_conv.0",
    "in_proj": "in_conv.1",
    "fc1": "out_conv.0",
    "fc2": "out_conv.2",
    "fc3": "out_conv.4",
}


def predictor_name(name: str) -> str | None:
    """The official name of the tensor that holds our parameter `name` of a score predictor; `None` for others."""
    found = re.match(r"^score_predictors\.(\d+)\.(\w+)\.(\w+)$", name)
    return f"score_predictor.{found[1]}.{PREDICTOR_PARTS[found[2]]}.{found[3]}" if found else None


def predictor_width(state_dict: dict[str, torch.Tensor]) -> int | None:
    """The width of the stage that is pruned; `None` where no tokens are pruned."""
    norm = state_dict.get("score_predictor.0.in_conv.0.weight")
    return None if norm is None else len(norm)


def cut_to_stages(checkpoint: Checkpoint, head_dim: int, thinking_stages: list[int]) -> dict[str, torch.Tensor]:
    """
    The state dict without what no stage reads: channels beyond the widest stage, and the α of which there is one per
    layer although only the first is read. The logits stay the same.

    Raises:
        ValueError: if the predictors have another width than the last stage.
    """
    state_dict = checkpoint.state_dict
    num_heads = state_dict["patch_embed.proj.weight"].shape[0] // head_dim
    width = predictor_width(state_dict)
    if width != head_dim * thinking_stages[-1]:
        raise ValueError(
            f"{checkpoint.path} prunes a stage of {width} channels, but the last of `thinking_stages` "
            f"({thinking_stages}) has {head_dim * thinking_stages[-1]}."
        )
    read = {f"alpha.{index}" for index in range(len(thinking_stages) - 1)}
    state_dict = {name: state_dict[name] for name in state_dict if not name.startswith("alpha.") or name in read}
    return cut_supernet(state_dict, num_heads, thinking_stages)


def pruning_fields(checkpoint: Checkpoint, num_layers: int, num_stages: int, overrides: dict) -> dict[str, Any]:
    """
    Fields of a configuration about pruning and, with several stages, about exits: as published, an image exits iff the
    entropy of all its probabilities is at most τ. No τ is published: with 0, the last stage answers, but for images
    whose entropy is 0 in float32 (`exit_at_threshold=False` lets none of them leave).

    Raises:
        ValueError: if neither files nor `overrides` state the keep rate, or the pruning layers where they are not
            those of the published models.
    """
    fields: dict[str, Any] = {}
    predictors = {name.split(".")[1] for name in checkpoint.state_dict if name.startswith("score_predictor.")}
    layers = checkpoint.model_args.get("pruning_loc")
    if layers is None and len(predictors) == 3 and num_layers == DEIT_DEPTH:
        layers = [3, 6, 9]
    for name, value, usual in (
        ("pruning_layers", layers, "[3, 6, 9] for 12 layers"),
        ("pruning_keep_rate", checkpoint.model_args.get("base_rate"), "0.7, 0.8 or 0.9"),
    ):
        if value is None and name not in overrides:
            raise UnstatedField(
                f"{checkpoint.path} prunes tokens and does not state `{name}`. Pass it: the official models have "
                f"{usual}."
            )
        fields[name] = list(value) if isinstance(value, tuple) else value
    if num_stages > 1:
        fields.update(exit_criterion="entropy", exit_at_threshold=True, threshold=0.0)
    return fields
