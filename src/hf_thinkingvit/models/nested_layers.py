"""
Layers that run on their leading channels: the input's width decides which slice of the weights is used.

Slices are views: no weight is copied. At full width the layers are exactly `nn.Linear` and `nn.LayerNorm`.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN


class KeptTensorsMixin:
    """
    What a module makes of its parameters in every call, it may keep for inference, in `self._kept`.

    Who keeps, checks that the parameter has not moved since (another device, dtype or checkpoint). What is kept holds
    memory, so nothing is where weights come and go between calls, and it does not travel with a copied or pickled
    module.
    """

    def keeps(self, parameter: torch.Tensor) -> bool:
        """Whether to keep what is made of `parameter`; if not, what has been kept is forgotten."""
        if torch.compiler.is_compiling():
            return False
        # Sharded or quantised weights are no plain parameters; `_hf_hook` is Accelerate's, which offloads weights.
        if not torch.is_grad_enabled() and type(parameter) is nn.Parameter and "_hf_hook" not in self.__dict__:
            return True
        self._forget()
        return False

    def _forget(self) -> None:
        self.__dict__.pop("_kept", None)

    def _apply(self, *args, **kwargs):
        self._forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self._forget()
        return super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}


class LeadingSliceMixin(KeptTensorsMixin):
    """
    `leading(...)`: weight and bias of the leading channels. Taking the views anew costs more, at batch 1 on a CPU, than
    some of the products that they serve, so inference keeps them.
    """

    def leading(self, *sizes: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Views of the leading corner `sizes` of the weight, and of as much of the bias as the corner has rows."""
        weight, bias = self.weight, self.bias
        if sizes == weight.shape:
            return weight, bias
        if not self.keeps(weight):
            return self._corner(weight, bias, sizes)
        kept = self.__dict__.setdefault("_kept", {})
        addresses = (weight.data_ptr(), None if bias is None else bias.data_ptr())
        if sizes not in kept or kept[sizes][1] != addresses:
            kept[sizes] = self._corner(weight, bias, sizes), addresses
        return kept[sizes][0]

    def _corner(
        self, weight: torch.Tensor, bias: torch.Tensor | None, sizes: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        corner = tuple(slice(size) for size in sizes)
        return weight[corner], None if bias is None else bias[corner[0]]


class NestedLinear(LeadingSliceMixin, nn.Linear):
    """A linear map whose leading rows and columns are a smaller linear map."""

    def forward(self, hidden_states: torch.Tensor, out_features: int | None = None) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(..., width)`): uses the first `width` columns of the weight.
            out_features (`int`, *optional*): uses the first `out_features` rows; all by default.

        Returns:
            `torch.Tensor` of shape `(..., out_features)`.
        """
        weight, bias = self.leading(out_features or self.out_features, hidden_states.shape[-1])
        return nn.functional.linear(hidden_states, weight, bias)


class NestedConv2d(LeadingSliceMixin, nn.Conv2d):
    """A patch embedding (a convolution with stride = kernel size) of which any range of channels can be computed."""

    def forward(self, pixel_values: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """`pixel_values` (batch, channels, height, width) → patches (batch, number of patches, stop - start)."""
        if start == 0:
            weight, bias = self.leading(stop or self.out_channels, *self.weight.shape[1:])
            return self._conv_forward(pixel_values, weight, bias).flatten(2).transpose(1, 2)
        # Later channels are for the images that go on, maybe few: a product with their patches is the same, and quicker
        # for few images than setting up a convolution.
        rows, columns = (side // patch for side, patch in zip(pixel_values.shape[2:], self.kernel_size))
        patches = pixel_values[..., : rows * self.kernel_size[0], : columns * self.kernel_size[1]]
        patches = patches.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 1, 3, 5)
        weight, bias = self.weight[start:stop].flatten(1), self.bias[start:stop]
        return nn.functional.linear(patches.flatten(3).flatten(1, 2), weight, bias)


class NestedLayerNorm(LeadingSliceMixin, nn.LayerNorm):
    """LayerNorm over however many leading channels the input `(..., width)` has, with their weights and biases."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        width = hidden_states.shape[-1]
        weight, bias = self.leading(width)
        return torch.layer_norm(hidden_states, (width,), weight, bias, self.eps)


def may_overwrite(*modules: nn.Module) -> bool:
    """
    Whether inference may write into what these modules have just put out: fresh memory costs a layer on a CPU about a
    tenth of its time. Not where a gradient will need it, nor where a hook may have kept it.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not any(module._forward_hooks for module in modules)


def add_residual(hidden_states: torch.Tensor, branch: torch.Tensor, *modules: nn.Module) -> torch.Tensor:
    """`hidden_states + branch`, where one of `modules` has just put out `branch` and the others have passed it on."""
    if branch.dtype == hidden_states.dtype and may_overwrite(*modules):  # under autocast, the sum is the wider dtype's
        return branch.add_(hidden_states)
    return hidden_states + branch


class NestedMLP(nn.Module):
    """Two linear maps with an activation between them, on their leading channels."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str):
        super().__init__()
        self.activation_fn = ACT2FN[hidden_act]
        self.is_gelu = hidden_act == "gelu"
        self.fc1 = NestedLinear(hidden_size, intermediate_size)
        self.fc2 = NestedLinear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, intermediate_size: int) -> torch.Tensor:
        """`hidden_states` (..., width) → the same shape, by way of the first `intermediate_size` channels."""
        intermediate = self.fc1(hidden_states, intermediate_size)
        if self.is_gelu and may_overwrite(self.fc1, self.activation_fn):
            torch.ops.aten.gelu_(intermediate)
        else:
            intermediate = self.activation_fn(intermediate)
        return self.fc2(intermediate, hidden_states.shape[-1])


class ResidualDropout(nn.Module):
    """
    What training drops of a residual branch: single values (dropout), and the whole branch of an image (stochastic
    depth, arXiv 1603.09382). What is kept is rescaled. In evaluation, nothing.
    """

    def __init__(self, dropout_prob: float = 0.0, drop_path_rate: float = 0.0):
        super().__init__()
        self.dropout_prob = dropout_prob
        self.drop_path_rate = drop_path_rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states` of shape `(batch, ...)`; one draw per image, so the number of tokens changes no draw."""
        if not self.training:
            return hidden_states
        hidden_states = nn.functional.dropout(hidden_states, self.dropout_prob)
        if self.drop_path_rate == 0.0:
            return hidden_states
        image_shape = (hidden_states.shape[0],) + (1,) * (hidden_states.dim() - 1)
        return hidden_states * nn.functional.dropout(hidden_states.new_ones(image_shape), self.drop_path_rate)

    def extra_repr(self) -> str:
        return f"dropout_prob={self.dropout_prob}, drop_path_rate={self.drop_path_rate:.4g}"
