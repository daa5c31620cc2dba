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
        weight = self.weight[:out_features, : hidden_states.shape[-1]]
        bias = None if self.bias is None else self.bias[:out_features]
        return nn.functional.linear(hidden_states, weight, bias)


class NestedLayerNorm(nn.LayerNorm):
    """LayerNorm over however many leading channels the input `(..., width)` has, with their weights and biases."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        width = hidden_states.shape[-1]
        return nn.functional.layer_norm(hidden_states, (width,), self.weight[:width], self.bias[:width], self.eps)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, drops a residual branch per image and rescales the rest."""

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return hidden_states
        keep_prob = 1.0 - self.drop_prob
        keep = hidden_states.new_empty(hidden_states.shape[0], *[1] * (hidden_states.dim() - 1)).bernoulli_(keep_prob)
        return hidden_states * (keep / keep_prob if keep_prob > 0.0 else keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"
