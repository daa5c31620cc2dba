"""
Calls of nested layers, also where an adapter (PEFT) or a quantised layer has taken their place.

Such a module knows nothing of narrower sub-networks. It runs at full width: zeros stand for the channels that the
sub-network does not have, and the outputs that it does not have are cut off. Whatever the module makes of its weights,
that is the leading corner of what they amount to, and so equals the sub-network after an adapter is merged. The layer
inside a LoRA adapter computes its leading corner alone.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn


class LeadingCorner(NamedTuple):
    """
    Which part of a linear map a module around it will read, if it calls the map at full width.

    Attributes:
        in_features: input channels; the others are 0.
        out_features: outputs that will be read.
        row_blocks: equal blocks that the outputs consist of, of each of which the leading ones are read.
    """

    in_features: int
    out_features: int
    row_blocks: int = 1

    def cut(self, output: torch.Tensor) -> torch.Tensor:
        """All outputs → those that are read."""
        blocks = output.unflatten(-1, (self.row_blocks, -1))
        return blocks[..., : self.out_features // self.row_blocks].flatten(-2)

    def widen(self, output: torch.Tensor, out_features: int) -> torch.Tensor:
        """Inverse of `cut`: as many as there are in all, with 0 for those that will not be read."""
        blocks = output.unflatten(-1, (self.row_blocks, -1))
        return nn.functional.pad(blocks, (0, (out_features - self.out_features) // self.row_blocks)).flatten(-2)


def project(
    layer: nn.Module, hidden_states: torch.Tensor, out_features: int | None = None, row_blocks: int = 1
) -> torch.Tensor:
    """
    The leading corner of a linear layer, nested or in the place of a nested one.

    Args:
        layer (`nn.Module`): a nested layer, or a module with as many input and output channels.
        hidden_states (`torch.Tensor` of shape `(..., width)`): the leading channels of its input.
        out_features (`int`, *optional*): how many outputs; all by default.
        row_blocks (`int`): equal blocks that the outputs consist of, of each of which the leading ones are used.

    Returns:
        `torch.Tensor` of shape `(..., out_features)`.
    """
    if is_nested(layer):
        return layer(hidden_states, out_features)
    base = base_layer(layer)
    if not hasattr(base, "in_features"):  # a module of the user's own, which knows what it replaces
        return layer(hidden_states) if out_features is None else layer(hidden_states, out_features)
    if hidden_states.dim() > 3:  # some adapters (OFT) take four dimensions for an image of a convolution
        output = project(layer, hidden_states.flatten(1, -2), out_features, row_blocks)
        return output.unflatten(1, hidden_states.shape[1:-1])
    width = hidden_states.shape[-1]
    out_features = base.out_features if out_features is None else out_features
    if width > base.in_features or out_features > base.out_features:
        raise ValueError(
            f"A {type(layer).__name__} of {base.in_features} inputs and {base.out_features} outputs is in a place "
            f"where {width} and {out_features} are needed."
        )
    if width == base.in_features and out_features == base.out_features:
        return layer(hidden_states)
    hidden_states = nn.functional.pad(hidden_states, (0, base.in_features - width))
    corner = LeadingCorner(width, out_features, row_blocks)
    output = layer(hidden_states, corner) if _adds_to_nested(layer, base) else layer(hidden_states)
    return corner.cut(output)


def project_patches(layer: nn.Module, pixel_values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """The same for a patch embedding: channels `start` to `stop` of the patches `(batch, patches, stop - start)`."""
    if is_nested(layer) or not hasattr(base_layer(layer), "out_channels"):
        return layer(pixel_values, start, stop)
    return layer(pixel_values).flatten(2).transpose(1, 2)[..., start:stop]


def is_nested(layer: nn.Module) -> bool:
    """
    Whether `layer` computes leading corners itself. Modules that pass attributes on pass arguments on as well: those of
    `torch.compile`, and PEFT's `modules_to_save`, which trains a copy.
    """
    return hasattr(layer, "leading")


def base_layer(layer: nn.Module) -> nn.Module:
    """The layer within the adapters of PEFT around it; without any, `layer` itself."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _adds_to_nested(layer: nn.Module, base: nn.Module) -> bool:
    """
    Whether `layer` hands its input to a nested layer, and adds to each output: LoRA, without the variants that read the
    weights. So the outputs that will not be read may be anything.
    """
    is_lora = type(layer).__module__.startswith("peft.tuners.lora.") and not getattr(layer, "lora_variant", True)
    return is_lora and layer.base_layer is base and is_nested(base)


def check_merged(model: nn.Module, use: str, names: Iterable[str] | None = None, otherwise: str = "") -> None:
    """
    `ValueError` for adapters in `model`, which what is called `use` would leave out. `names` are those of its weights,
    by default of its parameters; `otherwise` ends the message.
    """
    names = [name for name, _ in model.named_parameters()] if names is None else names
    adapted = [name for name in names if ".base_layer." in name or ".original_module." in name]
    if adapted:
        raise ValueError(
            f"{type(model).__name__} has adapters, which {use} would leave out: {adapted[0].rpartition('.')[0]} and "
            f"{len(adapted) - 1} more. Merge them first: `model = peft_model.merge_and_unload()`{otherwise}."
        )


__all__ = ["LeadingCorner", "check_merged", "project", "project_patches"]
