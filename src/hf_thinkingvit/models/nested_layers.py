"""
Layers that run on their leading channels: the input's width decides which slice of the weights is used.

Slices are views: no weight is copied. At full width the layers are exactly `nn.Linear` and `nn.LayerNorm`.
"""

import torch
from torch import nn


class LeadingSliceMixin:
    """
    `leading(...)`: weight and bias of the leading channels.

    Taking the views anew costs more, at batch 1 on a CPU, than some of the products that they serve. So inference keeps
    them, and takes them again when a parameter has moved (another device, dtype or checkpoint).
    """

    def leading(self, *sizes: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Views of the leading corner `sizes` of the weight, and of as much of the bias as the corner has rows."""
        weight, bias = self.weight, self.bias
        if sizes == weight.shape:
            return weight, bias
        # Sharded or quantised weights are no plain parameters, and need not tell by an address that they have moved.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(weight) is not nn.Parameter:
            return _corner(weight, bias, sizes)
        kept = self.__dict__.setdefault("_kept_views", {})
        addresses = (weight.data_ptr(), None if bias is None else bias.data_ptr())
        if sizes not in kept or kept[sizes][1] != addresses:
            kept[sizes] = _corner(weight, bias, sizes), addresses
        return kept[sizes][0]

    def _apply(self, *args, **kwargs):
        self.__dict__.pop("_kept_views", None)  # the weights are about to move: do not keep the old ones alive
        return super()._apply(*args, **kwargs)


def _corner(
    weight: torch.Tensor, bias: torch.Tensor | None, sizes: tuple[int, ...]
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
    """A convolution of which the leading output channels are a smaller one."""

    def forward(self, pixel_values: torch.Tensor, out_channels: int | None = None) -> torch.Tensor:
        """`pixel_values` (batch, channels, height, width) → the first `out_channels` (all by default) of the output."""
        weight, bias = self.leading(out_channels or self.out_channels, *self.weight.shape[1:])
        return self._conv_forward(pixel_values, weight, bias)


class NestedLayerNorm(LeadingSliceMixin, nn.LayerNorm):
    """LayerNorm over however many leading channels the input `(..., width)` has, with their weights and biases."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        width = hidden_states.shape[-1]
        weight, bias = self.leading(width)
        return torch.layer_norm(hidden_states, (width,), weight, bias, self.eps)


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
