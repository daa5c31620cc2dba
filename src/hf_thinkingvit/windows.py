"""
Images with masks cut into windows of a model's size, for evaluation. Each pixel counts in one window only, although
windows overlap: in that in whose inner part it lies. So the windows' confusion matrices add up to that of the image.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import datasets
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from .data import ImageCollator, ImageSplit
from .image_sizes import fitted_size
from .inference.sliding import default_stride, window_anchors


@dataclass(frozen=True)
class WindowPlan:
    """
    How images are cut.

    Attributes:
        size (`tuple[int, int]`): (height, width) of the windows. Smaller images are enlarged.
        short_side, long_side (`int`, *optional*): see [`~hf_thinkingvit.image_sizes.fitted_size`].
        stride (`tuple[int, int]`, *optional*): from window to window; by default 32 pixels less than `size`, or half
            of windows of 64 pixels or fewer.
    """

    size: tuple[int, int]
    short_side: int | None = None
    long_side: int | None = None
    stride: tuple[int, int] | None = None

    def __str__(self) -> str:
        height, width = self.size
        size = (
            "images as they are"
            if self.short_side is None
            else f"images whose shorter side has {self.short_side} pixels"
        )
        most = f", the longer at most {self.long_side}" if self.short_side and self.long_side else ""
        return (
            f"in windows of {height} × {width} pixels, each by itself, of {size}{most}; masks are resized with them, "
            "and each pixel counts in one window"
        )

    def facts(self) -> dict[str, Any]:
        """The plan as plain data, which a calibration records as its condition `preprocessing`."""
        stride = [self._stride(axis) for axis in range(2)]
        return {
            "window": list(self.size),
            "stride": stride,
            "short_side": self.short_side,
            "long_side": self.long_side if self.short_side else None,
        }

    def cut(
        self, pixel_values: torch.Tensor, mask: torch.Tensor, ignore_index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The windows of an image, row by row.

        Args:
            pixel_values (`torch.Tensor` of shape `(channels, height, width)`): preprocessed.
            mask (`torch.Tensor` of shape `(height, width)`): integers.
            ignore_index (`int`): what pixels get that count in another window.

        Returns:
            Pixel values `(windows, channels, *size)`, and labels `(windows, *size)`, int64.
        """
        size = fitted_size(pixel_values.shape[1:], self.short_side, self.long_side)
        short = max(window / side for window, side in zip(self.size, size))
        if short > 1:
            size = tuple(max(round(side * short), window) for side, window in zip(size, self.size))
        if size != tuple(mask.shape):
            pixel_values = F.interpolate(pixel_values[None], size=size, mode="bilinear", align_corners=False)[0]
            mask = F.interpolate(mask[None, None].float(), size=size, mode="nearest")[0, 0]
        mask = mask.long()
        rows, columns = (self._spans(length, axis) for axis, length in enumerate(size))
        (height, width), images, labels = self.size, [], []
        for top, first_row, last_row in rows:
            for left, first, last in columns:
                images.append(pixel_values[:, top : top + height, left : left + width])
                label = torch.full(self.size, ignore_index)
                label[first_row - top : last_row - top, first - left : last - left] = mask[
                    first_row:last_row, first:last
                ]
                labels.append(label)
        return torch.stack(images), torch.stack(labels)

    def _spans(self, length: int, axis: int) -> list[tuple[int, int, int]]:
        """For each window along an axis: where it begins, and from where to where pixels count in it."""
        window = self.size[axis]
        begins = window_anchors(length, window, self._stride(axis))
        borders = [0, *((one + window + other) // 2 for one, other in pairwise(begins)), length]
        return list(zip(begins, borders, borders[1:]))

    def _stride(self, axis: int) -> int:
        return self.stride[axis] if self.stride else default_stride(self.size[axis])


@dataclass
class WindowCollator(ImageCollator):
    """
    Encoded rows to the windows of all of them: `pixel_values` and `labels`, and `image` `(windows,)`, the row that each
    is of. Also `rows`, the number of rows, as a tensor.
    """

    plan: WindowPlan

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        images, labels, counts = [], [], []
        for row in rows:
            encoded = row[self.split.image_column]
            image = self._decode(encoded)
            where = f"{encoded.get('path') or 'without a name'} of `{self.split.name}`"
            mask = self.split.labels.decode(row[self.split.label_column], image, where)
            pixels = self.processor(image, do_resize=False, return_tensors="pt")["pixel_values"][0]
            windows, label = self.plan.cut(pixels, mask, self.split.labels.ignore_index)
            images.append(windows)
            labels.append(label)
            counts.append(len(windows))
        return {
            "pixel_values": torch.cat(images),
            "labels": torch.cat(labels),
            "image": torch.arange(len(rows)).repeat_interleave(torch.tensor(counts)),
            "rows": torch.tensor(len(rows)),
        }


def window_batches(
    split: ImageSplit, processor: Any, plan: WindowPlan, batch_size: int, num_workers: int = 0
) -> DataLoader:
    """Batches of the windows of `batch_size` images. To be sharded by `Accelerator.prepare`."""
    if isinstance(split.rows, datasets.IterableDataset):
        raise ValueError(f"`{split.name}` is evaluated in windows, for which it must not be a stream: download it.")
    return DataLoader(
        split.rows, batch_size=batch_size, num_workers=num_workers, collate_fn=WindowCollator(split, processor, plan)
    )
