"""
The parts of a Swin Transformer (arXiv 2103.14030) on their leading channels and heads.

In the order in which pixels flow: embeddings, patch merging, windows, attention, block, layer. A `SubNetwork`
gives the numbers of heads and channels of a layer; at full width this is Transformers' Swin.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_checks import as_pair
from .configuration_thinking_swin import ThinkingSwinConfig
from .module_caches import ModuleCacheMixin, is_plain_tensor
from .nested_layers import (
    LeadingSliceMixin,
    NestedLayerNorm,
    NestedLinear,
    NestedMLP,
    ResidualDropout,
    add_residual,
    product_at_full_width,
)
from .nested_projection import LeadingCorner, is_nested, project
from .nested_vit import attend, check_pixel_values
from .sub_networks import SubNetwork


# Added to the attention scores of tokens that the cyclic shift brought into one window from opposite ends of the image:
# the value of Swin's code, and so of the weights.
NOT_ADJACENT = -100.0
# Of the norms of patch embedding and patch merging, whatever `layer_norm_eps`, as in Transformers' Swin.
PATCH_NORM_EPS = 1e-5
# How many kinds of windows (sizes, shifts, dtypes) a layer caches before it starts anew.
MAX_CACHED_WINDOWS = 16


class NestedSwinEmbeddings(nn.Module):
    """Patches, normalised at full width; position embeddings where the configuration asks for them."""

    def __init__(self, config: ThinkingSwinConfig):
        super().__init__()
        self.config = config
        self.patch_size = as_pair(config.patch_size)
        self.patch_embeddings = nn.Conv2d(
            config.num_channels, config.embed_dim, kernel_size=self.patch_size, stride=self.patch_size
        )
        self.norm = nn.LayerNorm(config.embed_dim, eps=PATCH_NORM_EPS)
        self.position_embeddings = None
        if config.use_absolute_embeddings:
            rows, columns = config.patch_grid
            self.position_embeddings = nn.Parameter(torch.zeros(1, rows * columns, config.embed_dim))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values` (batch_size, num_channels, height, width) → (batch_size, rows, columns, embed_dim)."""
        pixel_values = pixel_values.to(self.patch_embeddings.weight.dtype)
        bottom, right = (-side % patch for side, patch in zip(pixel_values.shape[2:], self.patch_size))
        if bottom or right:
            pixel_values = nn.functional.pad(pixel_values, (0, right, 0, bottom))
        embeddings = self.norm(self.patch_embeddings(pixel_values).permute(0, 2, 3, 1))
        if self.position_embeddings is not None:
            embeddings = embeddings + self._position_embeddings(tuple(embeddings.shape[1:3]))
        return self.dropout(embeddings)

    def _position_embeddings(self, grid: tuple[int, int]) -> torch.Tensor:
        """For a grid of (rows, columns) patches, bicubic where it is another than the configuration's."""
        positions = self.position_embeddings.unflatten(1, self.config.patch_grid)
        if grid == self.config.patch_grid:
            return positions
        positions = nn.functional.interpolate(
            positions.permute(0, 3, 1, 2), size=grid, mode="bicubic", align_corners=False
        )
        return positions.permute(0, 2, 3, 1)

    def check(self, pixel_values: torch.Tensor | None, interpolate_pos_encoding: bool | None) -> None:
        """`ValueError` for images that do not fit: channels, or a size that position embeddings are not made for."""
        check_pixel_values(pixel_values, self.config.num_channels)
        (height, width), got = as_pair(self.config.image_size), tuple(pixel_values.shape[-2:])
        if min(got) < 1:
            raise ValueError(f"`pixel_values` of {got[0]}×{got[1]} pixels are no images.")
        if self.position_embeddings is not None and not interpolate_pos_encoding and got != (height, width):
            raise ValueError(
                f"`pixel_values` must be images of {height}×{width} pixels (`config.image_size`), since the model has "
                f"absolute position embeddings, got {got[0]}×{got[1]}. Resize them with the image processor, or pass "
                "`interpolate_pos_encoding=True`."
            )


class NestedSwinPatchMerging(nn.Module):
    """Four neighbours become one position: their kept channels side by side, normalised, to the next layer's width."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm = NestedLayerNorm(4 * in_channels, eps=PATCH_NORM_EPS)
        self.reduction = NestedLinear(4 * in_channels, out_channels, bias=False)

    def forward(self, hidden_states: torch.Tensor, out_channels: int) -> torch.Tensor:
        """(batch, rows, columns, kept channels) → (batch, rows / 2, columns / 2, `out_channels`), halves rounded up."""
        rows, columns = hidden_states.shape[1:3]
        if rows % 2 or columns % 2:
            hidden_states = nn.functional.pad(hidden_states, (0, 0, 0, columns % 2, 0, rows % 2))
        # The order of the four neighbours: down the left column, then down the right one.
        squares = hidden_states.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5)
        return project(self.reduction, self.norm(squares.flatten(3)), out_channels)


class Windows(NamedTuple):
    """
    How a grid is cut into windows, for one shift. Cutting is one permutation, shift and padding included.

    Attributes:
        grid: (rows, columns).
        size: side of a window.
        padding: rows below and columns to the right that complete the last windows.
        order (`torch.LongTensor` of shape `(windows * size²,)`): the position in the (padded) grid of each window's
            tokens, window after window.
        back (`torch.LongTensor` of shape `(rows * columns,)`): the place in `order` of each position of the grid.
        offsets (`torch.LongTensor` of shape `(size⁴,)`): for each pair of tokens of a window, the row of the table of
            relative position biases.
        mask (`torch.Tensor` of shape `(windows, 1, size², size²)`, *optional*): added to the attention scores where the
            shift brings opposite ends of the grid together.
    """

    grid: tuple[int, int]
    size: int
    padding: tuple[int, int]
    order: torch.Tensor
    back: torch.Tensor
    offsets: torch.Tensor
    mask: torch.Tensor | None

    @classmethod
    def of_grid(
        cls, grid: tuple[int, int], window_size: int, shift: int, device: torch.device, dtype: torch.dtype
    ) -> "Windows":
        """The windows of a grid of (rows, columns); one that is no longer than a window has the size of its side."""
        table_side, middle = 2 * window_size - 1, window_size - 1
        if min(grid) <= window_size:
            window_size, shift = min(grid), 0
        padding = tuple(-side % window_size for side in grid)
        rows, columns = (side + more for side, more in zip(grid, padding))
        places = torch.arange(rows * columns, device=device).view(rows, columns)
        order = _cut(places.roll((-shift, -shift), (0, 1)), window_size).flatten()
        back = order.argsort().view(rows, columns)[: grid[0], : grid[1]].flatten()
        places = torch.arange(window_size, device=device)
        apart = places[:, None] - places + middle
        offsets = (apart[:, None, :, None] * table_side + apart[None, :, None, :]).flatten()
        mask = None
        if shift:
            # Bands along each axis: positions in the same band were adjacent before the shift.
            row_bands, column_bands = (
                (torch.arange(side, device=device) >= side - window_size).long()
                + (torch.arange(side, device=device) >= side - shift).long()
                for side in (rows, columns)
            )
            regions = _cut(3 * row_bands[:, None] + column_bands, window_size).flatten(1)
            apart = regions[:, None, :, None] != regions[:, None, None, :]
            mask = torch.zeros(apart.shape, device=device, dtype=dtype).masked_fill(apart, NOT_ADJACENT)
        return cls(grid, window_size, padding, order, back, offsets, mask)

    def cut(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, rows, columns, channels) → (batch * windows, size², channels)."""
        bottom, right = self.padding
        if bottom or right:
            hidden_states = nn.functional.pad(hidden_states, (0, 0, 0, right, 0, bottom))
        return hidden_states.flatten(1, 2).index_select(1, self.order).unflatten(1, (-1, self.size**2)).flatten(0, 1)

    def join(self, windows: torch.Tensor) -> torch.Tensor:
        """Inverse of `cut`, without the padding: (batch, rows, columns, channels)."""
        tokens = windows.unflatten(0, (-1, len(self.order) // self.size**2)).flatten(1, 2)
        return tokens.index_select(1, self.back).unflatten(1, self.grid)


def _cut(grid: torch.Tensor, window_size: int) -> torch.Tensor:
    """(rows, columns) → (windows, window_size, window_size)."""
    squares = grid.unflatten(1, (-1, window_size)).unflatten(0, (-1, window_size))
    return squares.transpose(1, 2).flatten(0, 1)


class NestedQKV(LeadingSliceMixin, nn.Linear):
    """
    Queries, keys and values from one matrix of 3 · channels rows. `slicing` says which of the rows narrower rounds use
    (see `qkv_slicing` in [`ThinkingSwinConfig`]). Slices are views, and whatever is one block of rows is one
    product.
    """

    def __init__(self, channels: int, bias: bool, slicing: str):
        super().__init__(channels, 3 * channels, bias=bias)
        self.slicing = slicing

    def forward(
        self, hidden_states: torch.Tensor, out_features: int | LeadingCorner | None = None
    ) -> torch.Tensor | Sequence[torch.Tensor]:
        """
        (windows, tokens, width) → with `out_features` (3 · width), queries, keys and values, each (windows, tokens,
        width). Adapters around this layer call it at full width, by itself or with the corner that will be read, for
        the outputs in one tensor (windows, tokens, 3 · channels).
        """
        if out_features is None:
            return super().forward(hidden_states)
        if isinstance(out_features, LeadingCorner):
            corner = out_features
            parts = NestedQKV.forward(self, hidden_states[..., : corner.in_features], corner.out_features)
            return corner.widen(torch.cat(parts, dim=-1), self.out_features)
        width = hidden_states.shape[-1]
        is_one_block = self.slicing == "leading_rows" or width == self.in_features
        views = self.leading(out_features if is_one_block else width, width)
        if views is None:
            return product_at_full_width(self, hidden_states, out_features, 1 if is_one_block else 3).chunk(3, dim=-1)
        if is_one_block:
            return nn.functional.linear(hidden_states, *views).chunk(3, dim=-1)
        return [nn.functional.linear(hidden_states, *part) for part in views]

    def _corner(self, weight: torch.Tensor, bias: torch.Tensor | None, sizes: tuple[int, ...]):
        if self.slicing == "leading_rows":
            return super()._corner(weight, bias, sizes)
        # Slices instead of `chunk`, which quantised tensors do not have.
        blocks = [slice(start, start + self.in_features) for start in range(0, self.out_features, self.in_features)]
        parts = [(weight[block], None if bias is None else bias[block]) for block in blocks]
        return [super(NestedQKV, self)._corner(*part, sizes) for part in parts]


class NestedSwinAttention(nn.Module):
    """Self-attention within windows, with the leading heads and their relative position bias."""

    def __init__(self, config: ThinkingSwinConfig, full: SubNetwork):
        super().__init__()
        self.config = config
        self.head_dim = full.head_dim
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.qkv = NestedQKV(full.hidden_size, bias=config.qkv_bias, slicing=config.qkv_slicing)
        self.row_blocks = 1 if config.qkv_slicing == "leading_rows" else 3
        self.o_proj = NestedLinear(full.hidden_size, full.hidden_size)
        # One row per offset (rows, columns) between two tokens of a window.
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * config.window_size - 1) ** 2, full.num_attention_heads)
        )

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(windows, tokens, width) → queries, keys and values, each (windows, heads, tokens, head_dim)."""
        out_features = 3 * hidden_states.shape[-1]
        parts = project(self.qkv, hidden_states, out_features, self.row_blocks)
        if not is_nested(self.qkv):
            parts = parts.chunk(3, dim=-1)
        return tuple(part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)

    def bias_and_mask(self, windows: Windows, num_heads: int) -> torch.Tensor:
        """
        What is added to the scores: (1 or windows of an image, num_heads, size², size²). Only the offsets are cached:
        the table may change in any way between two calls, which no counter of torch tells for certain.
        """
        table = self.relative_position_bias_table.t()[:num_heads]
        bias = table.index_select(1, windows.offsets).view(1, num_heads, windows.size**2, windows.size**2)
        return bias if windows.mask is None else bias + windows.mask.to(bias.dtype)

    def forward(self, hidden_states: torch.Tensor, windows: Windows, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """`hidden_states` (batch * windows, size², width), normalised → the same, and attention probabilities."""
        query, key, value = self._project(hidden_states)
        attention_mask = self.bias_and_mask(windows, query.shape[1])
        batch_size = len(hidden_states) * windows.size**2 // len(windows.order)
        if len(attention_mask) > 1 and batch_size != 1:
            attention_mask = attention_mask.expand(batch_size, -1, -1, -1, -1).flatten(0, 1)
        attn_output, attn_weights = attend(self, query, key, value, attention_mask, self.scaling, **kwargs)
        return project(self.o_proj, attn_output.reshape(hidden_states.shape), hidden_states.shape[-1]), attn_weights


class NestedSwinBlock(GradientCheckpointingLayer):
    """A pre-norm transformer block with attention in windows."""

    def __init__(self, config: ThinkingSwinConfig, full: SubNetwork, drop_path_rate: float):
        super().__init__()
        self.attention = NestedSwinAttention(config, full)
        self.layernorm_before = NestedLayerNorm(full.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = NestedLayerNorm(full.hidden_size, eps=config.layer_norm_eps)
        self.mlp = NestedMLP(full.hidden_size, full.intermediate_size, config.hidden_act)
        self.dropout = ResidualDropout(config.hidden_dropout_prob, drop_path_rate)

    def forward(self, hidden_states: torch.Tensor, sub_network: SubNetwork, windows: Windows, **kwargs) -> torch.Tensor:
        """`hidden_states` (batch, rows, columns, sub_network.hidden_size) → the same."""
        normed = windows.cut(self.layernorm_before(hidden_states))
        mlp, dropout = self.mlp, self.dropout
        attn_output, _ = self.attention(normed, windows, **kwargs)
        hidden_states = add_residual(hidden_states, dropout(windows.join(attn_output)), dropout)
        mlp_output = mlp(self.layernorm_after(hidden_states), sub_network.intermediate_size)
        return add_residual(hidden_states, dropout(mlp_output), mlp.fc2, mlp, dropout)


class NestedSwinLayer(ModuleCacheMixin, nn.Module):
    """
    A layer of the hierarchy: patch merging (except in the first layer), then blocks. Every other block shifts its
    windows by half their size.
    """

    _cache_attributes = ("_windows",)

    def __init__(self, config: ThinkingSwinConfig, index: int, drop_path_rates: list[float]):
        super().__init__()
        width = config.hidden_sizes[index]
        full = SubNetwork(config.num_heads[index], width, int(config.mlp_ratio * width))
        self.window_size = config.window_size
        self.downsample = NestedSwinPatchMerging(config.hidden_sizes[index - 1], width) if index else None
        self.blocks = nn.ModuleList([NestedSwinBlock(config, full, rate) for rate in drop_path_rates])

    def forward(
        self, hidden_states: torch.Tensor, grid: tuple[int, int], sub_network: SubNetwork, **kwargs
    ) -> torch.Tensor:
        """
        `hidden_states` (batch, rows * columns of the `grid`, width of the layer before) → (batch, tokens of this layer,
        sub_network.hidden_size), where the grid of this layer is half as long on each side if there is a `downsample`.
        """
        hidden_states = hidden_states.unflatten(1, grid)
        if self.downsample is not None:
            hidden_states = self.downsample(hidden_states, sub_network.hidden_size)
        for index, block in enumerate(self.blocks):
            windows = self.windows(hidden_states, self.window_size // 2 if index % 2 else 0)
            hidden_states = block(hidden_states, sub_network, windows, **kwargs)
        return hidden_states.flatten(1, 2)

    def grid_after(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of this layer, from those of its input."""
        return grid if self.downsample is None else (-(-grid[0] // 2), -(-grid[1] // 2))

    def windows(self, hidden_states: torch.Tensor, shift: int) -> Windows:
        """The windows of `hidden_states` (batch, rows, columns, channels)."""
        grid, device, dtype = tuple(hidden_states.shape[1:3]), hidden_states.device, hidden_states.dtype
        if torch.compiler.is_compiling():
            return Windows.of_grid(grid, self.window_size, shift, device, dtype)
        cached, key = self.__dict__.setdefault("_windows", {}), (grid, shift, device, dtype)
        windows = cached.get(key)  # made of nothing but sizes: never stale
        if windows is None:
            with torch.inference_mode(False):  # autograd may need the indices later
                windows = Windows.of_grid(grid, self.window_size, shift, device, dtype)
            if len(cached) >= MAX_CACHED_WINDOWS:
                cached.clear()
            if is_plain_tensor(windows.order):
                cached[key] = windows
        return windows
