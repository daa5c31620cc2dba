"""
Training images that are decoded once and kept in memory, for data that fit there: small images of one size.

The decoded images are cached on disk by `datasets`, so that further runs on the same images read them from there.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import datasets
import numpy as np
import torch

from ..data import ImageSplit, decode
from .batch_augmentation import BatchAugmentation
from .data import Place, epoch_order


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryImages:
    """
    Images of one size, and their labels. In the place of an image that cannot be decoded is the next one that can.

    Attributes:
        pixels (`torch.Tensor` of shape `(images, height, channels, width)`): uint8, in the order of axes that
            `BatchAugmentation` reads.
        labels (`torch.Tensor` of shape `(images,)`): int64.
        skipped (`torch.Tensor` of shape `(images,)`): int64, how many images that cannot be decoded are before the one
            that is in this place.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    skipped: torch.Tensor

    def batches(
        self, augmentation: BatchAugmentation, place: Place, shuffle: bool, device: torch.device | str = "cpu"
    ) -> Iterator[dict[str, torch.Tensor]]:
        """What `train_batches` yields, of the same images in the same order, with the pixels on `device`."""
        order = epoch_order(len(self.labels), place.seed, place.epoch, shuffle)
        for batch in range(place.start, place.stop):
            first = place.position(batch, 0)
            rows = order[first : first + place.batch_size]
            pixels = self.pixels[rows].to(device, non_blocking=True)
            positions = np.arange(first, first + len(rows))
            yield {
                "pixel_values": augmentation(pixels, place.epoch, positions),
                "labels": self.labels[rows],
                "skipped": self._skipped_before(rows),
            }

    def _skipped_before(self, rows: torch.Tensor) -> list[int]:
        """Indices of the images that cannot be decoded, in whose places others are."""
        pairs = zip(rows.tolist(), self.skipped[rows].tolist())
        return [(row + each) % len(self.labels) for row, skipped in pairs for each in range(skipped)]


def load_in_memory(split: ImageSplit) -> MemoryImages:
    """
    Decode the images of a split, or read them from the cache of an earlier call.

    Raises:
        ValueError: for a stream, if the images are of several sizes, or none can be decoded.
    """
    if isinstance(split.rows, datasets.IterableDataset):
        raise ValueError("`in_memory` keeps all images, and `streaming` none: leave one of them out.")
    size = next((image.size for row in split.rows if (image := _decoded(row[split.image_column])) is not None), None)
    if size is None:
        raise ValueError(f"No image of `{split.name}` can be decoded.")
    rows = split.rows.map(
        partial(_decode_rows, column=split.image_column, size=size),
        batched=True,
        remove_columns=split.image_column,
        features=datasets.Features(
            {"pixels": datasets.Value("binary"), split.label_column: split.rows.features[split.label_column]}
        ),
        desc="decoding images",
    )
    encoded = rows.with_format("arrow")[:]
    pixels = encoded["pixels"].to_pylist()
    whole = np.array([entry is not None for entry in pixels])
    if not whole.all():
        logger.warning("%d images of `%s` cannot be decoded, and are skipped", (~whole).sum(), split.name)
    # For each place, the first image from there on that is whole; after the last one, from the beginning again.
    found = np.flatnonzero(whole)
    source = found[np.searchsorted(found, np.arange(len(whole))) % len(found)]
    width, height = size
    stacked = torch.frombuffer(bytearray(b"".join(pixels[index] for index in source)), dtype=torch.uint8)
    labels = torch.tensor(encoded[split.label_column].to_pylist())
    return MemoryImages(
        pixels=stacked.view(len(whole), height, 3, width),
        labels=labels[torch.from_numpy(source)],
        skipped=torch.from_numpy((source - np.arange(len(whole))) % len(whole)),
    )


def _decoded(image: dict):
    try:
        return decode(image)
    except Exception:  # Pillow's decoders raise many types
        return None


def _decode_rows(rows: dict[str, list], column: str, size: tuple[int, int]) -> dict[str, list]:
    """Pixels in the order (height, channels, width) as bytes; `None` for images that cannot be decoded."""
    pixels: list[bytes | None] = []
    for encoded in rows[column]:
        image = _decoded(encoded)
        if image is not None and image.size != size:
            raise ValueError(
                f"`in_memory` needs images of one size, but there are images of {size} and of {image.size} (width, "
                "height): leave it out."
            )
        pixels.append(None if image is None else np.asarray(image).transpose(0, 2, 1).tobytes())
    return {"pixels": pixels}
