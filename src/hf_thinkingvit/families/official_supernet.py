"""
The first release of ThinkingViT: checkpoints as wide as a 12-head supernet, whatever stages were trained.

A stage reads the leading heads and channels of every tensor, so everything beyond the widest stage is unused. Cut to
the widest stage, the tensors are those of the later releases.
"""

import re

import torch


# Dimensions that grow with the number of heads, by the tensor's name. The rows of `qkv` are cut in each third; the
# columns of `proj_layer*` have the width of the recycled stage and are not cut.
SCALED_DIMENSIONS = (
    (r"^(cls_token|dist_token|pos_embed)$", (2,)),
    (r"^patch_embed\.proj\.(weight|bias)$", (0,)),
    (r"^blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight$", (0, 1)),
    (r"^blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.bias$", (0,)),
    (r"^(blocks\.\d+\.norm[12]|norm)\.(weight|bias)$", (0,)),
    (r"^proj_layer\d*\.(weight|bias)$", (0,)),
    (r"^head\.weight$", (1,)),
)


def is_supernet(state_dict: dict[str, torch.Tensor], num_heads: int, num_stages: int) -> bool:
    """
    Whether these are the weights of a supernet of `num_heads` heads: the first release has an α for each head, later
    releases have one for each stage but the last.

    Args:
        state_dict: under its official names.
        num_heads (`int`): of the tensors.
        num_stages (`int`): of the trained model.
    """
    return num_heads >= num_stages and f"alpha.{num_heads - 1}" in state_dict


def cut_supernet(
    state_dict: dict[str, torch.Tensor], num_heads: int, thinking_stages: list[int]
) -> dict[str, torch.Tensor]:
    """
    Cut the weights of a supernet to its widest stage, and drop the unused α. The logits stay the same.

    Args:
        state_dict: under its official names; it is not changed.
        num_heads (`int`): of the tensors.
        thinking_stages (`list[int]`): heads of each stage.

    Returns:
        A new dict. Its tensors share memory with the given ones wherever a slice suffices. Tensors of an unknown name
        or with too few dimensions are returned unchanged; the check of names and shapes refuses them.

    Raises:
        ValueError: if a stage has more heads than the supernet, or a dimension is not a multiple of the heads.
    """
    if max(thinking_stages) > num_heads:
        raise ValueError(
            f"`thinking_stages` ({thinking_stages}) asks for {max(thinking_stages)} heads, but the supernet has "
            f"{num_heads}."
        )
    unread = {f"alpha.{index}" for index in range(len(thinking_stages) - 1, num_heads)}
    return {
        name: cut_tensor(name, tensor, num_heads, max(thinking_stages))
        for name, tensor in state_dict.items()
        if name not in unread
    }


def cut_tensor(name: str, tensor: torch.Tensor, num_heads: int, kept_heads: int) -> torch.Tensor:
    """The official tensor `name` of a model of `num_heads` heads, cut to the leading `kept_heads`."""
    dimensions = next((found for pattern, found in SCALED_DIMENSIONS if re.match(pattern, name)), ())
    if any(dimension >= tensor.dim() for dimension in dimensions):
        return tensor
    thirds = 3 if ".qkv." in name else 1
    for dimension in dimensions:
        parts = thirds if dimension == 0 else 1
        if tensor.shape[dimension] % (parts * num_heads):
            raise ValueError(
                f"{name} of the shape {tuple(tensor.shape)} cannot be cut to {kept_heads} of {num_heads} heads: "
                f"dimension {dimension} must be a multiple of {parts * num_heads}."
            )
        kept = tensor.shape[dimension] // parts * kept_heads // num_heads
        leading = [part.narrow(dimension, 0, kept) for part in tensor.chunk(parts, dimension)]
        tensor = torch.cat(leading, dimension) if parts > 1 else leading[0]
    return tensor
