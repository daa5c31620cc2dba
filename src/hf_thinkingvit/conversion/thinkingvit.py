"""The official ThinkingViT state dict: which tensor each of our parameters is, and what shapes tell of the model."""

import re

import torch

from ..models.configuration_thinkingvit import ThinkingViTConfig
from ..models.modeling_thinkingvit import ThinkingViTForImageClassification
from .checkpoint import Checkpoint


DEIT_HEAD_DIM = 64
DEIT_DEPTH = 12

# Our module names → the official ones, in our order of nesting.
RENAMES = (
    (r"^thinkingvit\.embeddings\.cls_token$", "cls_token"),
    (r"^thinkingvit\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^thinkingvit\.embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^thinkingvit\.layers\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"^thinkingvit\.layers\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"^thinkingvit\.layers\.(\d+)\.attention\.[qkv]_proj\.", r"blocks.\1.attn.qkv."),
    (r"^thinkingvit\.layers\.(\d+)\.attention\.o_proj\.", r"blocks.\1.attn.proj."),
    (r"^thinkingvit\.layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
    (r"^thinkingvit\.layernorm\.", "norm."),
    (r"^thinkingvit\.recyclers\.(\d+)\.alpha$", r"alpha.\1"),
    (r"^classifier\.", "head."),
)


def official_name(name: str) -> str:
    """The official name of the tensor that holds our parameter `name` (for queries, keys and values: a third of it)."""
    recycler = re.match(r"^thinkingvit\.recyclers\.(\d+)\.projection\.(.*)$", name)
    if recycler:
        index = int(recycler[1])
        return f"proj_layer{index + 1 if index else ''}.{recycler[2]}"
    for pattern, replacement in RENAMES:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    raise KeyError(name)


def convert_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Our parameter `name` from the official tensor that holds it."""
    projection = re.search(r"\.([qkv])_proj\.", name)
    return tensor.chunk(3)["qkv".index(projection[1])].clone() if projection else tensor


def matches(checkpoint: Checkpoint, overrides: dict) -> bool:
    """Whether this is a ThinkingViT: recycling weights, or stages that somebody states."""
    return (
        "alpha.0" in checkpoint.state_dict
        or "proj_layer.weight" in checkpoint.state_dict
        or "thinking_stages" in {**checkpoint.model_args, **overrides}
    ) and not any(name.startswith("layers.") for name in checkpoint.state_dict)


def required_names() -> list[str]:
    """Official names of the tensors whose shapes `build_config` reads."""
    return ["patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "head.weight"]


def build_config(checkpoint: Checkpoint, **overrides) -> ThinkingViTConfig:
    """
    The configuration that belongs to an official checkpoint. Sizes come from the tensors, stages from the files or from
    `overrides`, which win.

    Raises:
        ValueError: if nothing says how many heads the stages have.
    """
    state_dict, model_args = checkpoint.state_dict, checkpoint.model_args
    hidden_size, num_channels, patch_height, patch_width = state_dict["patch_embed.proj.weight"].shape
    thinking_stages = overrides.get("thinking_stages") or model_args.get("thinking_stages")
    thinking_stages = list(thinking_stages or _stages_from_widths(checkpoint, hidden_size))
    layers = {int(name.split(".")[1]) for name in state_dict if name.startswith("blocks.")}
    fields = {
        "thinking_stages": thinking_stages,
        "hidden_size": hidden_size,
        "num_attention_heads": max(thinking_stages),
        # Published configurations leave the depth to the architecture; a bare file has only its layers to tell.
        "num_hidden_layers": model_args.get("depth") or (DEIT_DEPTH if checkpoint.config else max(layers) + 1),
        "intermediate_size": state_dict["blocks.0.mlp.fc1.weight"].shape[0],
        "patch_size": patch_height if patch_height == patch_width else (patch_height, patch_width),
        "num_channels": num_channels,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state_dict,
        "num_labels": state_dict["head.weight"].shape[0],
        "image_size": _image_size(checkpoint, patch_height, patch_width),
    }
    labels = checkpoint.config.get("label_names")
    if labels is not None:
        fields["id2label"] = dict(enumerate(labels))
        fields["label2id"] = {label: index for index, label in enumerate(labels)}
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


def _image_size(checkpoint: Checkpoint, patch_height: int, patch_width: int) -> int | tuple[int, int]:
    size = (
        checkpoint.model_args.get("img_size") or checkpoint.config.get("pretrained_cfg", {}).get("input_size", [])[1:]
    )
    if not size:
        side = round((checkpoint.state_dict["pos_embed"].shape[1] - 1) ** 0.5)
        size = (side * patch_height, side * patch_width)
    if not isinstance(size, int):
        size = size[0] if len(set(size)) == 1 else tuple(size)
    return size


MODEL_CLASS = ThinkingViTForImageClassification
