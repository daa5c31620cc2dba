"""The official ThinkingViT state dict: which tensor each of our parameters is, and how many heads its stages have."""

import re

from ..models.configuration_thinkingvit import ThinkingViTConfig
from ..models.modeling_thinkingvit import ThinkingViTForImageClassification
from .checkpoint import Checkpoint
from .deit import DEIT_HEAD_DIM, REQUIRED, convert_tensor, deit_fields, deit_name


__all__ = ["MODEL_CLASS", "REQUIRED", "build_config", "convert_tensor", "matches", "official_name"]

MODEL_CLASS = ThinkingViTForImageClassification


def official_name(name: str) -> str:
    """The official name of the tensor that holds our parameter `name`."""
    name = name.removeprefix("thinkingvit.")
    recycler = re.match(r"^recyclers\.(\d+)\.(?:projection\.)?(.*)$", name)
    if recycler is None:
        return deit_name(name)
    index, rest = int(recycler[1]), recycler[2]
    return f"alpha.{index}" if rest == "alpha" else f"proj_layer{index + 1 if index else ''}.{rest}"


def matches(checkpoint: Checkpoint, overrides: dict) -> bool:
    """Whether this is a ThinkingViT on DeiT: recycling weights, or stages that somebody states."""
    return (
        "alpha.0" in checkpoint.state_dict
        or "proj_layer.weight" in checkpoint.state_dict
        or "thinking_stages" in {**checkpoint.model_args, **overrides}
    ) and not any(name.startswith("layers.") for name in checkpoint.state_dict)


def build_config(checkpoint: Checkpoint, **overrides) -> ThinkingViTConfig:
    """
    The configuration that belongs to an official checkpoint. Sizes come from the tensors, stages from the files or from
    `overrides`, which win.

    Raises:
        ValueError: if nothing says how many heads the stages have.
    """
    fields = deit_fields(checkpoint)
    thinking_stages = overrides.get("thinking_stages") or checkpoint.model_args.get("thinking_stages")
    fields["thinking_stages"] = list(thinking_stages or _stages_from_widths(checkpoint, fields["hidden_size"]))
    fields["num_attention_heads"] = max(fields["thinking_stages"])
    return ThinkingViTConfig(**{**fields, **overrides})


def _stages_from_widths(checkpoint: Checkpoint, hidden_size: int) -> list[int]:
    widths = []
    while (name := f"proj_layer{len(widths) + 1 if widths else ''}.weight") in checkpoint.state_dict:
        widths.append(checkpoint.state_dict[name].shape[1])
    widths.append(hidden_size)
    head_dim = DEIT_HEAD_DIM
    if checkpoint.model_args.get("num_heads"):
        head_dim = hidden_size // checkpoint.model_args["num_heads"]
    if any(width % head_dim for width in widths):
        raise ValueError(
            f"{checkpoint.path} has stages of {widths} channels and does not say how many heads they have. "
            "Pass `thinking_stages`, the heads of each stage (--thinking-stages on the command line)."
        )
    return [width // head_dim for width in widths]
