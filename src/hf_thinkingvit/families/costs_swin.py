"""
Multiply-accumulates in matrix products on a Swin backbone, from a configuration alone. `evaluation/macs.py` says what
is counted.
"""

from collections.abc import Sequence
from itertools import pairwise

from ..models.configuration_checks import as_pair
from ..models.configuration_thinking_swin import SwinRound, ThinkingSwinConfig


def stage_macs(config: ThinkingSwinConfig, image_size: int | Sequence[int] | None = None) -> list[int]:
    """As computed here: the patch embedding once, in the first round; recycling as one product with its tokens."""
    grid = _grid(config, image_size)
    rounds = config.stages
    macs = [_patch_embedding(config, grid) + _round(config, rounds[0], grid)]
    for before, after in pairwise(rounds):
        macs.append(_recycling(before, after, grid) + _round(config, after, grid))
    return macs


def published_stage_macs(config: ThinkingSwinConfig, image_size: int | Sequence[int] | None = None) -> list[int]:
    """As published: every round with its patch embedding, and the depthwise convolution of recycling by itself."""
    grid = _grid(config, image_size)
    rounds = config.stages
    macs = [_patch_embedding(config, grid) + _round(config, each, grid) for each in rounds]
    for index, (before, after) in enumerate(pairwise(rounds), start=1):
        macs[index] += _recycling(before, after, grid) + grid[0] * grid[1] * before.hidden_size
    return macs


def _grid(config: ThinkingSwinConfig, image_size: int | Sequence[int] | None) -> tuple[int, int]:
    return config.grid_of(as_pair(config.image_size if image_size is None else image_size))


def _patch_embedding(config: ThinkingSwinConfig, grid: tuple[int, int]) -> int:
    patch_height, patch_width = as_pair(config.patch_size)
    return grid[0] * grid[1] * config.num_channels * patch_height * patch_width * config.embed_dim


def _recycling(before: SwinRound, after: SwinRound, grid: tuple[int, int]) -> int:
    return grid[0] * grid[1] * before.hidden_size * after.layers[0].hidden_size


def _round(config: ThinkingSwinConfig, swin_round: SwinRound, grid: tuple[int, int]) -> int:
    """The pyramid and the classifier."""
    rows, columns = grid
    macs, width_before = 0, None
    for layer, depth in zip(swin_round.layers, config.depths):
        width = layer.hidden_size
        if width_before is not None:
            rows, columns = -(-rows // 2), -(-columns // 2)
            macs += rows * columns * 4 * width_before * width
        window = min(config.window_size, rows, columns)
        in_windows = -(-rows // window) * -(-columns // window) * window**2  # what fills up the last windows included
        attention = in_windows * (4 * width**2 + 2 * window**2 * width)
        mlp = rows * columns * 2 * width * layer.intermediate_size
        macs += depth * (attention + mlp)
        width_before = width
    return macs + swin_round.hidden_size * config.num_labels
