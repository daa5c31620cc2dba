"""
Training images: their order, their augmentation, and their distribution over processes and workers.

The order of the images is a function of the seed and the epoch; each image's augmentation is a function of the seed,
the epoch and its position in that order. So a run that resumes in the middle of an epoch reads the same batches as an
uninterrupted one, and two processes together read the same images as one.
"""

import hashlib
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Sampler, default_collate, get_worker_info

from ..data import ImageSplit, Rows, decode, find_split, num_shared_rows
from .config import TrainingConfig
from .seeding import seeded
from .splits import TrainingData, held_out_from, hold_out, reported_split, selection_split
from .stop_signals import ignore_stop_signals
from .tasks import training_task


logger = logging.getLogger(__name__)


def load_data(config: TrainingConfig, splits: Mapping[str, Rows] | None = None) -> TrainingData:
    """
    The splits that a run reads.

    Args:
        config (`TrainingConfig`): of the run.
        splits (`dict`, *optional*): the data by split, instead of those that `config.dataset` names.

    Raises:
        ValueError: if the data, a split or a column cannot be found (the message lists those that exist, or says how to
            log in), or if the labels cannot be trained on.
    """
    task = training_task(config.task)
    splits = task.load_splits(config) if splits is None else splits
    find_split(splits, config.train_split, config.dataset)
    selected_on = selection_split(config, splits)
    reported = reported_split(config, splits, selected_on)
    read = {
        role: task.as_split(find_split(splits, name, config.dataset), config)
        for role, name in (("train", config.train_split), ("evaluation", selected_on), ("test", reported))
        if name is not None
    }
    for name in (selected_on, reported):
        if name is not None and (shared := num_shared_rows(splits, config.train_split, name)):
            logger.warning(
                "%d images are both in %r, which is trained on, and in %r, which is evaluated: accuracy on them tells "
                "nothing of other images",
                shared,
                config.train_split,
                name,
            )
    if "test" in read and not read["test"].labels.are_known(read["test"].rows, read["test"].label_column):
        if config.test_split is not None:
            raise ValueError(f"The images of split {reported!r} of `{config.dataset}` have no labels to measure with.")
        del read["test"]
    if read["train"].label_names is None:
        read = _with_named_labels(read)
    if any(split.label_names != read["train"].label_names for split in read.values()):
        raise ValueError(f"The splits of `{config.dataset}` have different labels.")
    if len(read["train"].label_names) < 2:
        raise ValueError(
            f"The images of `{config.dataset}` (split {config.train_split!r}) have one label, "
            f"{read['train'].label_names}: there is nothing to learn from fewer than two. Check the folders (one a "
            f"label), or name another `label_column` than {read['train'].label_column!r}."
        )
    if selected_on is None:
        read["train"], read["evaluation"] = hold_out(read["train"], config.validation_fraction, config.max_eval_samples)
        selected_on = held_out_from(config.train_split)
    return TrainingData(
        train=read["train"].take(config.max_train_samples),
        evaluation=read["evaluation"].take(config.max_eval_samples),
        test=read["test"].take(config.max_eval_samples) if "test" in read else None,
        id2label=dict(enumerate(read["train"].label_names)),
        selected_on=selected_on,
        split=reported if "test" in read else selected_on,
    )


def _with_named_labels(splits: dict[str, ImageSplit]) -> dict[str, ImageSplit]:
    """The splits with strings or numbers as labels converted to indices of the training split's sorted labels."""
    train = splits["train"]
    column = train.label_column
    if isinstance(train.rows, datasets.IterableDataset):
        raise ValueError(
            f"The labels in column {column!r} of `{train.name}` have no names (`ClassLabel`), and a stream cannot be "
            "searched for them: download the data instead."
        )
    names = [str(label) for label in sorted(train.rows.unique(column))]
    unknown = {str(label) for split in splits.values() for label in split.rows.unique(column)} - set(names)
    if unknown:
        raise ValueError(f"`{train.name}` is evaluated on labels that it is not trained on: {sorted(unknown)[:10]}.")
    words, labels = datasets.Value("string"), datasets.ClassLabel(names=names)
    return {
        role: replace(split, rows=split.rows.cast_column(column, words).cast_column(column, labels), label_names=names)
        for role, split in splits.items()
    }


@dataclass(frozen=True)
class Place:
    """
    The part of an epoch that a process reads.

    Attributes:
        batch_size: images of one process in one forward pass.
        rank, world_size: index and number of processes.
        seed, epoch: for the order and the augmentation.
        start: index of the first batch to read.
        stop: index after the last batch; the same for all processes.
    """

    batch_size: int
    rank: int
    world_size: int
    seed: int
    epoch: int
    start: int
    stop: int

    def position(self, batch: int, row: int) -> int:
        """The position of an image of this process in the order of the epoch."""
        return (batch * self.world_size + self.rank) * self.batch_size + row


def epoch_order(num_images: int, seed: int, epoch: int, shuffle: bool) -> torch.Tensor:
    if not shuffle:
        return torch.arange(num_images)
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))
    return torch.randperm(num_images, generator=generator)


class EpochBatches(Sampler):
    """
    Batches of (position in the epoch, index of the image) for one process. An epoch that is longer than the data passes
    over them several times, in an order of its own each time.
    """

    def __init__(self, num_images: int, place: Place, shuffle: bool):
        self.num_images, self.place, self.shuffle = num_images, place, shuffle

    def __len__(self) -> int:
        return self.place.stop - self.place.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        place, count = self.place, self.num_images
        laps = max(1, -(-place.stop * place.batch_size * place.world_size // count))
        laps = range(place.epoch * laps, (place.epoch + 1) * laps)
        order = [index for lap in laps for index in epoch_order(count, place.seed, lap, self.shuffle).tolist()]
        for batch in range(place.start, place.stop):
            positions = (place.position(batch, row) for row in range(place.batch_size))
            yield [(position, order[position]) for position in positions]


@dataclass
class TrainImages(torch.utils.data.Dataset):
    """
    Augmented training images. An image that cannot be decoded is replaced by the next one that can, and counted.

    Args:
        data: the images and labels.
        transform: from a PIL image to a tensor.
        place: for the seeds of the augmentation.
    """

    data: ImageSplit
    transform: Any
    place: Place

    def __getitem__(self, key: tuple[int, int]) -> dict:
        position, index = key
        num_images = len(self.data.rows)
        for skipped in range(num_images):
            row = self.data.rows[(index + skipped) % num_images]
            example = augment(row, self, position, f"{(index + skipped) % num_images}")
            if example is not None:
                return {**example, "skipped": [(index + each) % num_images for each in range(skipped)]}
        raise ValueError(f"No image of `{self.data.name}` can be decoded.")


@dataclass
class StreamedTrainImages(torch.utils.data.IterableDataset):
    """
    As `TrainImages`, from a stream. Each process and each of its workers reads its own shards, from the beginning again
    if they hold fewer images than its batches need. Batches before `place.start` are skipped without decoding, so it is
    unknown which of their images can be decoded; therefore an image that replaces one that cannot be decoded is also
    read at its own position, so that the positions of all later images do not depend on it.
    """

    data: ImageSplit
    transform: Any
    place: Place
    shuffle_buffer: int = 1
    stream: datasets.IterableDataset = field(init=False)

    def __post_init__(self):
        stream = self.data.rows
        if self.shuffle_buffer > 1:
            stream = stream.shuffle(seed=self.place.seed, buffer_size=self.shuffle_buffer)
        self.stream = split_dataset_by_node(stream, self.place.rank, self.place.world_size)

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        worker_id, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        rows, read_ahead = self._rows(), deque()
        for batch in range(worker_id, self.place.stop, num_workers):
            for row in range(self.place.batch_size):
                lap, candidate = read_ahead.popleft() if read_ahead else next(rows)
                if batch < self.place.start:
                    continue
                skipped, last_lap, position = [], lap + 1, self.place.position(batch, row)
                while (example := augment(candidate, self, position, f"{position} of the stream")) is None:
                    skipped.append(fingerprint_of(candidate[self.data.image_column]))
                    if len(skipped) > len(read_ahead):
                        read_ahead.append(next(rows))
                    lap, candidate = read_ahead[len(skipped) - 1]
                    if lap > last_lap:
                        raise ValueError(f"No image of `{self.data.name}` can be decoded.")
                yield {**example, "skipped": skipped}

    def _rows(self) -> Iterator[tuple[int, dict]]:
        """The images of the stream over and over, each with the number of the pass."""
        lap = 0
        while True:
            self.stream.set_epoch(self.place.epoch + lap)
            empty = True
            for row in self.stream:
                empty = False
                yield lap, row
            if empty:
                raise ValueError(
                    f"A stream of `{self.data.name}` has nothing to read: it has fewer files than readers. Use fewer "
                    "`num_workers`."
                )
            lap += 1


def augment(row: dict, images: TrainImages | StreamedTrainImages, position: int, name: str) -> dict | None:
    """The augmented image and its label; `None`, with a warning, if the image cannot be decoded."""
    data, place = images.data, images.place
    name = (row[data.image_column] or {}).get("path") or name
    try:
        image = decode(row[data.image_column])
    except Exception as error:  # Pillow's decoders raise many types
        _warn_once(f"skipping image {name} of `{data.name}`, which cannot be decoded: {error}")
        return None
    label = data.labels.decode(row[data.label_column], image, f"{name} of `{data.name}`")
    with seeded(place.seed, place.epoch, position):
        pixel_values, label = data.labels.transformed(images.transform, image, label)
    return {"pixel_values": pixel_values, "labels": label}


@cache
def _warn_once(message: str) -> None:
    """In this process: each epoch comes upon the same images."""
    logger.warning(message)


def fingerprint_of(image: Mapping[str, Any] | None) -> str:
    """What tells an encoded image of a stream, which has no index, from others: a hash of its path and its file."""
    image = image or {}
    return hashlib.sha256(f"{image.get('path')}\n".encode() + (image.get("bytes") or b"")).hexdigest()[:16]


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": default_collate([example["labels"] for example in examples]),  # numbers, or masks of the same size
        "skipped": [image for example in examples for image in example["skipped"]],
    }


def train_batches(config: TrainingConfig, data: ImageSplit, transform: Any, place: Place) -> Iterable[dict]:
    """
    The batches of one process from `place.start` to `place.stop`: `pixel_values` (float32 of shape `(batch_size,
    channels, height, width)`), `labels` (int64 of shape `(batch_size,)`, of masks `(batch_size, height, width)`) and
    `skipped`, what tells the images apart that could not be decoded: their indices, of a stream their fingerprints.
    """
    options = {
        "num_workers": config.num_workers,
        "collate_fn": collate,
        "worker_init_fn": ignore_stop_signals,
        "pin_memory": torch.cuda.is_available() and not config.cpu,
    }
    if not config.streaming:
        sampler = EpochBatches(len(data.rows), place, config.shuffle)
        return DataLoader(TrainImages(data, transform, place), batch_sampler=sampler, **options)
    # Workers deliver one batch each in turn, so a resumed run starts at the first worker's turn and drops the batches
    # that it has already trained on.
    num_readers = min(config.num_workers, data.rows.num_shards // place.world_size) or 1
    dropped = place.start % num_readers
    shuffle_buffer = config.shuffle_buffer if config.shuffle else 1
    images = StreamedTrainImages(data, transform, replace(place, start=place.start - dropped), shuffle_buffer)
    options["num_workers"] = num_readers if config.num_workers else 0
    return islice(DataLoader(images, batch_size=place.batch_size, **options), dropped, None)


def num_train_images(config: TrainingConfig, data: ImageSplit) -> int:
    """The length of an epoch in images; `ValueError` for a stream of unknown length without `images_per_epoch`."""
    if config.images_per_epoch is not None:
        return config.images_per_epoch
    if isinstance(data.rows, datasets.Dataset):
        return len(data.rows)
    split = (data.rows.info.splits or {}).get(str(data.rows.split))
    if split is None or not split.num_examples:
        raise ValueError(f"The stream of `{data.name}` does not say how long it is: set `images_per_epoch`.")
    return min(split.num_examples, config.max_train_samples or split.num_examples)
