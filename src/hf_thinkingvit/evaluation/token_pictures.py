"""
Pictures of the patches that leave the computation: images beside the depths of their patches, the mean depth at each
position, and an A-ViT's halting scores. Needs matplotlib.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from ..models.configuration_checks import as_pair


ENLARGED_SIZE = 600  # pixels: images are enlarged to at least this, so that the pixels' edges stay sharp
SHEET_COLUMNS = 4
LEGEND = "layers until the patch leaves"
NUMBERED_GRID = 16  # patches a side, up to which the mean depths are written out
DPI = 110


@dataclass
class ImageTokens:
    """
    One image.

    Attributes:
        name (`str`): to show.
        label (`str`): that was predicted.
        depth (`np.ndarray` of shape `(rows, columns)`): layers that each patch runs.
        pixels (`np.ndarray` of shape `(height, width, channels)`, *optional*): with 8 bits a channel, as the model sees
            it; needed to draw the image.
    """

    name: str
    label: str
    depth: np.ndarray
    pixels: np.ndarray | None = None

    def title(self, width: int) -> str:
        """Name, prediction and mean depth, in lines of at most `width` characters."""
        lines = (self.name, f"predicted: {self.label}", f"mean depth {self.depth.mean():.2f}")
        return "\n".join(line if len(line) <= width else f"{line[: width - 1]}…" for line in lines)


def undo_normalisation(pixel_values: torch.Tensor, processor: BaseImageProcessor) -> np.ndarray:
    """One image (height, width, channels) with 8 bits a channel, as it was before the processor normalised it."""
    pixels = pixel_values.permute(1, 2, 0).numpy()
    if processor.do_normalize:
        pixels = pixels * np.array(processor.image_std) + np.array(processor.image_mean)
    return (pixels * 255).round().clip(0, 255).astype(np.uint8)


def depth_scale(num_layers: int, discrete: bool) -> tuple[Any, Any]:
    """
    Colormap and norm of matplotlib for depths from 1 to `num_layers`; discrete or not, an integer depth has the same
    colour. A patch that is removed before the first layer has the colour of 1.
    """
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, Normalize

    colors = colormaps["viridis"]
    if discrete or num_layers == 1:
        return colors.resampled(num_layers), BoundaryNorm(np.arange(num_layers + 1) + 0.5, num_layers)
    return colors, Normalize(1, num_layers)


def side_by_side(tokens: ImageTokens, config: PreTrainedConfig) -> np.ndarray:
    """The image, and beside it the depths of its patches: 8-bit RGB, enlarged by an integer, without interpolation."""
    colors, norm = depth_scale(config.num_hidden_layers, discrete=True)
    height, width = tokens.pixels.shape[:2]
    patch_height, patch_width = as_pair(config.patch_size)
    patches = colors(norm(tokens.depth), bytes=True)[..., :3]
    patches = patches.repeat(patch_height, axis=0).repeat(patch_width, axis=1)
    right = np.full((height, width, 3), 255, dtype=np.uint8)
    right[: patches.shape[0], : patches.shape[1]] = patches
    factor = -(-ENLARGED_SIZE // max(height, width))
    left, right = (
        np.broadcast_to(half, (height, width, 3)).repeat(factor, axis=0).repeat(factor, axis=1)
        for half in (tokens.pixels, right)
    )
    gap = np.full((left.shape[0], left.shape[1] // 30, 3), 255, dtype=np.uint8)
    return np.concatenate([left, gap, right], axis=1)


def plot_image(tokens: ImageTokens, config: PreTrainedConfig) -> Any:
    """One image beside its depths. Returns a matplotlib `Figure`, as all plots do."""
    picture = side_by_side(tokens, config)
    height = 9.0 * picture.shape[0] / picture.shape[1]  # inches
    figure, axis = _subplots(figsize=(10.0, height + 0.8))
    axis.imshow(picture)
    axis.set_title(tokens.title(90), fontsize=11, parse_math=False)
    axis.set_axis_off()
    _add_legend(figure, config.num_hidden_layers, discrete=True, label=LEGEND, axis=axis)
    return figure


def plot_sheet(shown: Sequence[ImageTokens], config: PreTrainedConfig) -> Any:
    """Many images beside their depths, under one legend."""
    pictures = [side_by_side(tokens, config) for tokens in shown]
    columns = min(len(shown), SHEET_COLUMNS)
    rows = -(-len(shown) // columns)
    height = 3.8 * pictures[0].shape[0] / pictures[0].shape[1] + 0.75  # inches
    figure, axes = _subplots(rows, columns, figsize=(3.9 * columns + 0.9, height * rows), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, tokens, picture in zip(axes.flat, shown, pictures):
        axis.imshow(picture)
        axis.set_title(tokens.title(44), fontsize=9, parse_math=False)
    _add_legend(figure, config.num_hidden_layers, discrete=True, label=LEGEND, axes=axes)
    return figure


def plot_mean_depth(depths: np.ndarray, config: PreTrainedConfig) -> Any:
    """The mean depth of each patch position over the images of `depths` (images, rows, columns), with numbers."""
    mean, num_images = depths.mean(axis=0), len(depths)
    rows, columns = mean.shape
    patch_height, patch_width = as_pair(config.patch_size)
    height = 7.3 * (rows * patch_height) / (columns * patch_width)  # inches
    colors, norm = depth_scale(config.num_hidden_layers, discrete=False)
    figure, axis = _subplots(figsize=(8.4, height + 0.4))
    axis.imshow(mean, cmap=colors, norm=norm, aspect=patch_height / patch_width)
    if max(rows, columns) <= NUMBERED_GRID:
        for (row, column), value in np.ndenumerate(mean):
            color = "black" if norm(value) > 0.6 else "white"
            axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=9, color=color)
    images = "1 image" if num_images == 1 else f"{num_images} images"
    axis.set(xticks=[], yticks=[], title=f"Mean depth at each patch position, over {images}")
    _add_legend(figure, config.num_hidden_layers, discrete=False, label="mean number of layers", axis=axis)
    return figure


def plot_halting_scores(scores: Sequence[np.ndarray]) -> Any:
    """Of each layer, a box of the `scores` of the tokens that are active in it, and their share of all tokens."""
    figure, axis = _subplots(figsize=(max(7.0, 1.5 + 0.7 * len(scores)), 5.0))
    axis.boxplot(
        scores,
        whis=(1, 99),
        showfliers=False,
        showmeans=True,
        widths=0.6,
        patch_artist=True,
        boxprops={"facecolor": "#cfe0f0"},
        medianprops={"color": "black"},
        meanprops={"marker": "D", "markersize": 5, "markerfacecolor": "tab:orange", "markeredgecolor": "tab:orange"},
    )
    active = [len(layer) / len(scores[0]) for layer in scores]
    axis.set_xticks(range(1, len(scores) + 1), [f"{layer}\n{share:.0%}" for layer, share in enumerate(active, 1)])
    axis.set(xlabel="layer, and share of tokens that are active in it", ylabel="halting score", ylim=(-0.03, 1.03))
    axis.set_title(
        "Halting scores of active tokens\nbox: quartiles; line: median; diamond: mean; whiskers: percentiles 1 and 99",
        fontsize=11,
    )
    axis.grid(axis="y", alpha=0.3)
    return figure


def save_picture(figure: Any, path: Path) -> None:
    """Write a figure of this module as PNG."""
    figure.savefig(path, dpi=DPI, bbox_inches="tight", pad_inches=0.1)


def _subplots(*shape: int, figsize: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot, which needs a window system and has global state

    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(*shape, **options)


def _add_legend(
    figure: Any, num_layers: int, discrete: bool, label: str, axis: Any = None, axes: np.ndarray | None = None
) -> None:
    """A colour bar from 1 to `num_layers` beside one `axis` or all `axes`, at which only integers are marked."""
    from matplotlib.cm import ScalarMappable

    colors, norm = depth_scale(num_layers, discrete)
    ticks = np.unique(np.linspace(1, num_layers, min(num_layers, 16)).round())
    if axis is not None:
        place = {"cax": axis.inset_axes([1.025, 0, 0.02, 1])}
    else:
        place = {"ax": axes, "shrink": 0.6, "aspect": 30, "pad": 0.01}
    bar = figure.colorbar(ScalarMappable(norm, colors), ticks=ticks, label=label, **place)
    bar.ax.set_yticklabels([f"{tick:.0f}" for tick in ticks])
    bar.ax.minorticks_off()
