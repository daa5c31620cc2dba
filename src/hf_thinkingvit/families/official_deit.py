"""What official checkpoints on a DeiT backbone have in common: timm's names of the tensors, and the sizes."""

import re

import torch

from .official import Checkpoint, rename


DEIT_HEAD_DIM = 64
DEIT_DEPTH = 12

# Names in our state dicts, without the base model's prefix → timm's.
RENAMES = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"^layers\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"^layers\.(\d+)\.attention\.[qkv]_proj\.", r"blocks.\1.attn.qkv."),
    (r"^layers\.(\d+)\.attention\.o_proj\.", r"blocks.\1.attn.proj."),
    (r"^layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)


def deit_name(name: str) -> str:
    """timm's name of the tensor that holds our parameter `name` (for queries, keys and values: a third of it)."""
    return rename(name, RENAMES)


def convert_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Our parameter `name` from the official tensor that holds it."""
    projection = re.search(r"\.([qkv])_proj\.", name)
    if projection is None or tensor.dim() == 0 or tensor.shape[0] % 3:
        return tensor  # a tensor that is no stack of three fails the check of shapes, which names it
    return tensor.chunk(3)["qkv".index(projection[1])].clone()


# The tensors whose shapes `deit_fields` reads, and how many dimensions they have.
REQUIRED = {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2, "head.weight": 2}


def deit_fields(checkpoint: Checkpoint, num_prefix_tokens: int = 1) -> dict:
    """Fields of a configuration that follow from the shapes of the tensors."""
    state_dict = checkpoint.state_dict
    hidden_size, num_channels, *patch_size = state_dict["patch_embed.proj.weight"].shape
    layers = {int(match[1]) for name in state_dict if (match := re.match(r"blocks\.(\d+)\.", name))}
    return {
        "hidden_size": hidden_size,
        # Published configurations imply the depth by the architecture's name; in a bare file the layers are counted.
        "num_hidden_layers": checkpoint.model_args.get("depth")
        or (DEIT_DEPTH if checkpoint.config else max(layers) + 1),
        "intermediate_size": state_dict["blocks.0.mlp.fc1.weight"].shape[0],
        "patch_size": one_if_equal(patch_size),
        "num_channels": num_channels,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state_dict,
        "num_labels": state_dict["head.weight"].shape[0],
        "image_size": _image_size(checkpoint, patch_size, num_prefix_tokens),
    }


def _image_size(checkpoint: Checkpoint, patch_size: list[int], num_prefix_tokens: int) -> int | tuple[int, int]:
    size = checkpoint.model_args.get("img_size")
    size = size or checkpoint.preprocessing.get("input_size", [])[1:]
    if not size:
        side = round((checkpoint.state_dict["pos_embed"].shape[1] - num_prefix_tokens) ** 0.5)
        size = [side * patch for patch in patch_size]
    return size if isinstance(size, int) else one_if_equal(size)


def one_if_equal(sides: list[int]) -> int | tuple[int, int]:
    """A size as configurations store it: one number where the sides are equal."""
    return sides[0] if len(set(sides)) == 1 else tuple(sides)
