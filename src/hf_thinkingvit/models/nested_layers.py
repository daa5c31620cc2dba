"""
Layers that run on their leading channels: the input's width decides which slice of the weights is used.

Slices are views: no weight is copied. At full width the layers are exactly `nn.Linear` and `nn.LayerNorm`.
"""

import torch
from torch import nn


class NestedLinear(nn.Linear):
    """A linear map whose leading rows and columns are a smaller linear map."""

    def forward(self, hidden_states: torch.Tensor, out_features: int | None = None) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(..., width)`): uses the first `width` columns of the weight.
            out_features (`int`, *optional*): uses the first `out_features` rows; all by default.

        Returns:
            `torch.Tensor` of shape `(..., out_features)`.
        """
        weight, bias, in_features = self.weight, self.bias, hidden_states.shape[-1]
        # Only where it cuts something: at batch 1 the cost of slicing in Python can be measured.
        if out_features is not None and out_features != self.out_features:
            weight, bias = weight[:out_features, :in_features], None if bias is None else bias[:out_features]
        elif in_features != self.in_features:
            weight = weight[:, :in_features]
        return nn.functional.linear(hidden_states, weight, bias)


class NestedLayerNorm(nn.LayerNorm):
    """LayerNorm over however many leading channels the input `(..., width)` has, with their weights and biases."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight, bias, width = self.weight, self.bias, hidden_states.shape[-1]
        if width != weight.shape[0]:
            weight, bias = weight[:width], bias[:width]
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
