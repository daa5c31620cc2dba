"""
The augmentation of images with their masks, by torchvision: resized by a random scale, cropped so that no class covers
nearly all of a crop, flipped, distorted in colour, normalised and padded.
"""

from typing import TYPE_CHECKING

import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..image_sizes import fitted_size


if TYPE_CHECKING:
    from .config import TrainingConfig


CROP_TRIES = 10


class SegmentationAugmentation:
    """
    Args:
        config (`TrainingConfig`): of the run, with its normalisation.
        size (`tuple[int, int]`): (height, width) of the result.
        ignore_index (`int`): label of pixels that do not count, which is that of the padding.
    """

    def __init__(self, config: "TrainingConfig", size: tuple[int, int], ignore_index: int):
        self.size, self.ignore_index = size, ignore_index
        self.short_side, self.long_side = config.short_side, config.long_side
        self.scales, self.class_share = tuple(config.scale_jitter), config.crop_class_share
        # Each with its own draw, as in mmsegmentation's `PhotoMetricDistortion`; hues turn by up to a tenth.
        changes = ({"brightness": 32 / 255}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 0.1})
        distortions = [v2.RandomApply([v2.ColorJitter(**change)], config.photometric_distortion) for change in changes]
        self.after_crop = v2.Compose(
            [
                v2.RandomHorizontalFlip(config.horizontal_flip),
                *(distortions if config.photometric_distortion else []),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(config.image_mean, config.image_std),
            ]
        )

    def __call__(self, image: Image.Image, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            image (`PIL.Image.Image`): RGB.
            mask (`torch.Tensor` of shape `(height, width)`): the labels of its pixels.

        Returns:
            Pixel values `(3, height, width)`, float32, and labels `(height, width)`, int64.
        """
        pixels, mask = tv_tensors.Image(F.pil_to_tensor(image)), tv_tensors.Mask(mask[None])
        ratio = torch.empty(1).uniform_(*self.scales).item()
        size = fitted_size(pixels.shape[1:], self.short_side, self.long_side, ratio)
        if size != tuple(pixels.shape[1:]):  # not antialiased, as evaluation is not
            pixels = F.resize(pixels, list(size), v2.InterpolationMode.BILINEAR, antialias=False)
            mask = F.resize(mask, list(size), v2.InterpolationMode.NEAREST)
        top, left, height, width = self._crop(mask)
        pixels, mask = (F.crop(each, top, left, height, width) for each in (pixels, mask))
        pixels, mask = self.after_crop(pixels, mask)
        padding = [0, 0, self.size[1] - width, self.size[0] - height]
        if any(padding):
            pixels, mask = F.pad(pixels, padding, fill=0.0), F.pad(mask, padding, fill=self.ignore_index)
        return pixels.as_subclass(torch.Tensor), mask[0].as_subclass(torch.Tensor).long()

    def _crop(self, mask: torch.Tensor) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop: of several draws the first of which no class has too great a share."""
        height, width = (min(side, most) for side, most in zip(mask.shape[1:], self.size))
        for _ in range(CROP_TRIES):
            top, left = (
                int(torch.randint(side - cropped + 1, ())) for side, cropped in zip(mask.shape[1:], (height, width))
            )
            if self.class_share >= 1:
                break
            labels = mask[0, top : top + height, left : left + width]
            counts = torch.bincount(labels[labels != self.ignore_index])  # many times faster than `unique`
            if (counts > 0).sum() > 1 and counts.max() < self.class_share * counts.sum():
                break
        return top, left, height, width
