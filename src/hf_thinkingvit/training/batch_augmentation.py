"""
Random crops, flips and erasing of whole batches of images of one size, on the device that trains.

Cropping and resizing is linear in the rows and in the columns of an image: two matrices for each image, whose entries
are the weights with which Pillow interpolates. So a batch takes two batched matrix products instead of a chain of calls
for each image. The random numbers are a function of the seed, the epoch and the position of an image in the epoch, as
everywhere in training, so that batches can be divided and resumed at will.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..models.configuration_checks import as_pair


if TYPE_CHECKING:
    from .config import TrainingConfig


ATTEMPTS = 10  # rectangles that are drawn, of which the first that fits is taken, as in torchvision and timm
# Columns of the random numbers of an image.
CROP = slice(0, 2 * ATTEMPTS + 2)
FLIP = CROP.stop
ERASE = FLIP + 1
ERASED = slice(ERASE + 1, ERASE + 1 + 2 * ATTEMPTS + 2)
NUM_DRAWS = ERASED.stop
ERASED_AREA, ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)  # of random erasing (arXiv 1708.04896), as in timm
BLOCK = 1024  # positions whose random numbers are drawn together


def _bicubic(distance: torch.Tensor) -> torch.Tensor:
    """Keys' kernel with a = -1/2, which Pillow calls bicubic."""
    x = distance.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, far * (x < 2))


def _bilinear(distance: torch.Tensor) -> torch.Tensor:
    return (1 - distance.abs()).clamp(min=0)


KERNELS = {"bicubic": _bicubic, "bilinear": _bilinear}


class Rectangles(NamedTuple):
    """Rectangles in images, one an image: float64 arrays of whole numbers `(images,)`."""

    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray


def position_draws(seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 1 for each position in an epoch: float64 `(positions, NUM_DRAWS)`."""
    draws = np.empty((len(positions), NUM_DRAWS))
    for block in np.unique(positions // BLOCK):
        of_block = np.random.default_rng(np.random.SeedSequence((seed, epoch, int(block)))).random((BLOCK, NUM_DRAWS))
        here = positions // BLOCK == block
        draws[here] = of_block[positions[here] % BLOCK]
    return draws


def draw_rectangles(
    draws: np.ndarray, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], strict: bool
) -> tuple[Rectangles, np.ndarray]:
    """
    A rectangle for each image, of a share of its area between the bounds of `scale` (uniform) and an aspect ratio,
    width by height, between those of `ratio` (uniform in its logarithm): the first of `ATTEMPTS` that fits.

    Args:
        draws (`np.ndarray` of shape `(images, 2 * ATTEMPTS + 2)`): numbers from 0 to 1.
        size (`(height, width)`): of the images.
        strict (`bool`): whether a rectangle must be smaller than the image on both sides.

    Returns:
        The rectangles, and which of them fit, bool `(images,)`.
    """
    full_height, full_width = size
    shares, logs = draws[:, :ATTEMPTS], draws[:, ATTEMPTS : 2 * ATTEMPTS]
    area = (scale[0] + (scale[1] - scale[0]) * shares) * full_height * full_width
    ratios = np.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * logs)
    widths, heights = np.round(np.sqrt(area * ratios)), np.round(np.sqrt(area / ratios))
    fits = (widths < full_width + (not strict)) & (heights < full_height + (not strict)) & (widths > 0) & (heights > 0)
    first, rows = fits.argmax(axis=1), np.arange(len(draws))
    height, width = heights[rows, first], widths[rows, first]
    top = np.floor(draws[:, -2] * (full_height - height + 1))
    left = np.floor(draws[:, -1] * (full_width - width + 1))
    return Rectangles(top, left, height, width), fits.any(axis=1)


def central_crop(size: tuple[int, int], ratio: tuple[float, float]) -> tuple[float, float, float, float]:
    """Top, left, height and width of the largest central crop whose aspect ratio is within the bounds."""
    height, width = size
    if width / height < ratio[0]:
        height = round(width / ratio[0])
    elif width / height > ratio[1]:
        width = round(height * ratio[1])
    return (size[0] - height) // 2, (size[1] - width) // 2, height, width


def interpolation_weights(
    start: torch.Tensor, length: torch.Tensor, full: int, target: int, interpolation: str, mirrored: torch.Tensor
) -> torch.Tensor:
    """
    Matrices that cut `length` rows (or columns) from `start` on out of `full` and interpolate them to `target`, with a
    kernel as wide as Pillow's where there are fewer of them then.

    Args:
        start, length (`torch.Tensor` of shape `(images,)`): float32.
        mirrored (`torch.Tensor` of shape `(images,)`): bool, whether the result is in reverse order.

    Returns:
        `torch.Tensor` of shape `(images, target, full)`, float32, whose rows sum to 1.
    """
    device = start.device
    scale = (length / target)[:, None, None]
    places = torch.arange(target, device=device)
    places = torch.where(mirrored[:, None], target - 1 - places, places)
    centers = (places[:, :, None] + 0.5) * scale
    pixels = torch.arange(full, device=device) - start[:, None, None]
    weights = KERNELS[interpolation]((pixels + 0.5 - centers) / scale.clamp(min=1.0))
    weights = weights * ((pixels >= 0) & (pixels < length[:, None, None]))
    return weights / weights.sum(dim=2, keepdim=True)


class BatchAugmentation:
    """
    The augmentation of a run whose images are kept in memory: what `train_transform` does, with other
    random numbers, up to rounding and to where a bicubic overshoot is clipped: Pillow clips between its two passes too.

    Args:
        config (`TrainingConfig`): with `image_mean`, `image_std` and `interpolation` filled in.
        image_size (`int` or `(height, width)`): of the augmented images.

    Raises:
        ValueError: for augmentations that are not defined on batches.
    """

    def __init__(self, config: "TrainingConfig", image_size: int | tuple[int, int]):
        self.config, self.image_size = config, as_pair(image_size)
        if config.auto_augment or config.color_jitter:
            raise ValueError(
                "`in_memory` augments whole batches, by crops, flips and erasing: set `auto_augment` to none and "
                f"`color_jitter` to 0 (got {config.auto_augment!r} and {config.color_jitter}), or leave it out."
            )
        if config.interpolation not in KERNELS:
            raise ValueError(
                f"`in_memory` interpolates by one of {list(KERNELS)}, got `interpolation` {config.interpolation!r}."
            )

    def __call__(self, pixels: torch.Tensor, epoch: int, positions: np.ndarray) -> torch.Tensor:
        """
        Args:
            pixels (`torch.Tensor` of shape `(images, height, channels, width)`): uint8, in this order of axes.
            epoch (`int`), positions (`np.ndarray` of shape `(images,)`): where in the run the images are, for the
                random numbers.

        Returns:
            `torch.Tensor` of shape `(images, channels, *image_size)`: normalised, float32.
        """
        config, device = self.config, pixels.device
        count, full_height, channels, full_width = pixels.shape
        height, width = self.image_size
        draws = position_draws(config.seed, epoch, positions)
        size, ratio = (full_height, full_width), tuple(config.crop_ratio)
        crops, fit = draw_rectangles(draws[:, CROP], size, tuple(config.crop_scale), ratio, strict=False)
        crops = [np.where(fit, drawn, central) for drawn, central in zip(crops, central_crop(size, ratio))]
        flips = draws[:, FLIP] < config.horizontal_flip
        numbers = torch.from_numpy(np.stack([*crops, flips]).astype(np.float32)).to(device)
        top, left, crop_height, crop_width, flips = numbers
        never = torch.zeros(count, dtype=torch.bool, device=device)
        rows = interpolation_weights(top, crop_height, full_height, height, config.interpolation, never)
        columns = interpolation_weights(left, crop_width, full_width, width, config.interpolation, flips > 0)
        # In float32, since these are the pixels.
        images = torch.bmm(rows, pixels.reshape(count, full_height, channels * full_width).float())
        images = torch.bmm(images.view(count, height * channels, full_width), columns.transpose(1, 2))
        images = images.view(count, height, channels, width).permute(0, 2, 1, 3)
        mean, std = (torch.tensor(each, device=device)[:, None, None] for each in (config.image_mean, config.image_std))
        images = (images.clamp(0, 255) / 255 - mean) / std
        if config.random_erasing:
            self._erase(images, draws, epoch, positions)
        return images

    def _erase(self, images: torch.Tensor, draws: np.ndarray, epoch: int, positions: np.ndarray) -> None:
        """Replace a rectangle of some of the images by normally distributed pixels, in place."""
        erased, fit = draw_rectangles(draws[:, ERASED], self.image_size, ERASED_AREA, ERASED_RATIO, strict=True)
        for index in np.flatnonzero(fit & (draws[:, ERASE] < self.config.random_erasing)):
            top, left, height, width = (int(each[index]) for each in erased)
            place = np.random.SeedSequence((self.config.seed, epoch, int(positions[index]), ERASE))
            noise = np.random.default_rng(place).standard_normal((images.shape[1], height, width), dtype=np.float32)
            images[index, :, top : top + height, left : left + width] = torch.from_numpy(noise).to(images.device)
