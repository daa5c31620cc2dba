"""
Images and labels for training and evaluation, from anything that `datasets` reads.

The order of the images is a function of the seed and the epoch, and each image's augmentation one of the seed, the
epoch and its place in that order. So a run that resumes in the middle of an epoch sees what it would have seen, and two
processes see what one would have seen.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import DataLoader, Sampler, get_worker_info

from .config import TrainingConfig
from .seeding import seeded


logger = logging.getLogger(__name__)

DIGITS = "sklearn-digits"


@dataclass
class ImageData:
    """
    Images with their labels.

    Attributes:
        train, evaluation: splits of two columns, whose images are still encoded.
        image_column, label_column: their names.
        id2label: name of each label.
        name: what the data are called, for messages and the model card.
    """

    train: datasets.Dataset | datasets.IterableDataset
    evaluation: datasets.Dataset | datasets.IterableDataset
    image_column: str
    label_column: str
    id2label: dict[int, str]
    name: str


def load_data(config: TrainingConfig) -> ImageData:
    """
    Raises:
        ValueError: if the data, a split or a column cannot be found; the message says what there is, or how to log in.
    """
    splits = _load_splits(config)
    evaluation = config.eval_split or next((name for name in ("validation", "test", "val") if name in splits), None)
    for name in (config.train_split, evaluation):
        if name not in splits:
            raise ValueError(
                f"`{config.dataset}` has no split to evaluate on: it has {list(splits)}. Name it with `eval_split`."
                if name is None
                else f"`{config.dataset}` has no split {name!r}: it has {list(splits)}."
            )
    train, evaluation = splits[config.train_split], splits[evaluation]
    features = train.features
    if features is None:
        raise ValueError(f"`{config.dataset}` does not state its columns, which streaming needs: download it instead.")
    image_column = config.image_column or _only(
        [name for name, kind in features.items() if isinstance(kind, datasets.Image)], "image_column", config, features
    )
    label_column = config.label_column or _only(
        [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        or [name for name in ("label", "labels", "fine_label") if name in features],
        "label_column",
        config,
        features,
    )
    for name in (image_column, label_column):
        if name not in features:
            raise ValueError(f"`{config.dataset}` has no column {name!r}: it has {list(features)}.")
    if not isinstance(features[label_column], datasets.ClassLabel):
        if config.streaming:
            raise ValueError(
                f"The labels in column {label_column!r} of `{config.dataset}` have no names (`ClassLabel`), and a "
                "stream cannot be searched for them: download the data instead."
            )
        train = train.class_encode_column(label_column)
        names = train.features[label_column]
        evaluation = evaluation.cast_column(label_column, names)
        features = train.features
    if config.max_train_samples is not None:
        train = train.take(config.max_train_samples)
    if config.max_eval_samples is not None:
        evaluation = evaluation.take(config.max_eval_samples)
    # Encoded, so that a broken image is met where it can be skipped.
    train, evaluation = (
        split.select_columns([image_column, label_column]).cast_column(image_column, datasets.Image(decode=False))
        for split in (train, evaluation)
    )
    names = features[label_column].names
    return ImageData(train, evaluation, image_column, label_column, dict(enumerate(names)), config.dataset)


def _only(found: list[str], name: str, config: TrainingConfig, features: datasets.Features) -> str:
    if len(found) != 1:
        what = "several columns" if found else "no column"
        raise ValueError(f"`{config.dataset}` has {what} for `{name}` among {list(features)}: name it with `{name}`.")
    return found[0]


def _load_splits(config: TrainingConfig) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    if config.dataset == DIGITS:
        splits = load_digits()
        return {name: split.to_iterable_dataset() for name, split in splits.items()} if config.streaming else splits
    path = Path(config.dataset)
    try:
        if path.is_file():
            return datasets.load_dataset("parquet", data_files={"train": str(path)}, streaming=config.streaming)
        return datasets.load_dataset(config.dataset, streaming=config.streaming)
    except ConnectionError as error:
        raise ValueError(f"`{config.dataset}` is no folder here, and the Hub cannot be reached: {error}.") from error
    except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        if "gated" in str(error):
            raise ValueError(
                f"`{config.dataset}` is gated: accept its terms at https://huggingface.co/datasets/{config.dataset}, "
                "then log in with `hf auth login` (or set HF_TOKEN) on this machine."
            ) from error
        raise ValueError(
            f"There is no dataset `{config.dataset}`: it must be a Hub id, a folder of images (one folder a label) or "
            f"of Parquet files, a Parquet file, or {DIGITS!r}. If it is private, log in with `hf auth login`."
        ) from error


def load_digits() -> datasets.DatasetDict:
    """scikit-learn's 8 × 8 handwritten digits, 1257 to train on and 540 to test on, as RGB."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits = load()
    images = [Image.fromarray((pixels * 255 / 16).astype(np.uint8)).convert("RGB") for pixels in digits.images]
    parts = train_test_split(images, digits.target.tolist(), test_size=0.3, random_state=0, stratify=digits.target)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict({"image": part, "label": labels}, features=features)
            for name, part, labels in (("train", parts[0], parts[2]), ("test", parts[1], parts[3]))
        }
    )


def decode(image: dict[str, Any]) -> Image.Image:
    """An encoded image of `datasets` as RGB."""
    return datasets.Image().decode_example(image).convert("RGB")


@dataclass(frozen=True)
class Place:
    """
    Where a process reads an epoch.

    Attributes:
        batch_size: images of one process in one forward pass.
        rank, world_size: which process of how many.
        seed, epoch: of the order and the augmentation.
        start: first batch to read.
        stop: the batch after the last one; every process has equally many.
    """

    batch_size: int
    rank: int
    world_size: int
    seed: int
    epoch: int
    start: int
    stop: int

    def position(self, batch: int, row: int) -> int:
        """In the epoch's order over all processes."""
        return (batch * self.world_size + self.rank) * self.batch_size + row


def epoch_order(num_images: int, seed: int, epoch: int, shuffle: bool) -> torch.Tensor:
    if not shuffle:
        return torch.arange(num_images)
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))
    return torch.randperm(num_images, generator=generator)


class EpochBatches(Sampler):
    """Batches of (position in the epoch, index of the image) for one process."""

    def __init__(self, num_images: int, place: Place, shuffle: bool):
        self.num_images, self.place, self.shuffle = num_images, place, shuffle

    def __len__(self) -> int:
        return self.place.stop - self.place.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        place = self.place
        order = epoch_order(self.num_images, place.seed, place.epoch, self.shuffle).tolist()
        for batch in range(place.start, place.stop):
            positions = (place.position(batch, row) for row in range(place.batch_size))
            yield [(position, order[position]) for position in positions]


@dataclass
class TrainImages(torch.utils.data.Dataset):
    """
    Augmented training images. One that cannot be decoded is replaced by the next that can, and counted.

    Args:
        data: what to read.
        transform: from a PIL image to a tensor.
        place: for the seeds.
    """

    data: ImageData
    transform: Any
    place: Place

    def __getitem__(self, key: tuple[int, int]) -> dict:
        position, index = key
        num_images = len(self.data.train)
        for skipped in range(num_images):
            row = self.data.train[(index + skipped) % num_images]
            example = augment(row, self, position, f"{(index + skipped) % num_images}")
            if example is not None:
                return {**example, "skipped": skipped}
        raise ValueError(f"No image of `{self.data.name}` can be decoded.")


@dataclass
class StreamedTrainImages(torch.utils.data.IterableDataset):
    """
    The same from a stream: each process and each of its workers reads a share of its own, again from the beginning
    where it has fewer images than its batches need. Batches before `place.start` are passed over undecoded.
    """

    data: ImageData
    transform: Any
    place: Place
    shuffle_buffer: int = 1
    stream: datasets.IterableDataset = field(init=False)

    def __post_init__(self):
        stream = self.data.train
        if self.shuffle_buffer > 1:
            stream = stream.shuffle(seed=self.place.seed, buffer_size=self.shuffle_buffer)
        self.stream = split_dataset_by_node(stream, self.place.rank, self.place.world_size)

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        worker_id, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        rows = self._rows()
        for batch in range(worker_id, self.place.stop, num_workers):
            for row in range(self.place.batch_size):
                skipped, position = 0, self.place.position(batch, row)
                if batch < self.place.start:
                    next(rows)
                    continue
                while (example := augment(next(rows), self, position, f"{position} of the stream")) is None:
                    skipped += 1
                yield {**example, "skipped": skipped}

    def _rows(self) -> Iterator[dict]:
        lap = 0
        while True:
            self.stream.set_epoch(self.place.epoch + lap)
            empty = True
            for row in self.stream:
                empty = False
                yield row
            if empty:
                raise ValueError(
                    f"A stream of `{self.data.name}` has nothing to read: it has fewer files than readers. Use fewer "
                    "`num_workers`."
                )
            lap += 1


def augment(row: dict, images: TrainImages | StreamedTrainImages, position: int, name: str) -> dict | None:
    """The augmented image and its label; `None`, and a warning that names it, if it cannot be decoded."""
    data, place = images.data, images.place
    try:
        image = decode(row[data.image_column])
    except Exception as error:  # Pillow raises whatever its decoders do
        path = (row[data.image_column] or {}).get("path") or name
        logger.warning("skipping image %s of `%s`, which cannot be decoded: %s", path, data.name, error)
        return None
    with seeded(place.seed, place.epoch, position):
        return {"pixel_values": images.transform(image), "labels": row[data.label_column]}


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
        "skipped": torch.tensor(sum(example["skipped"] for example in examples)),
    }


def train_batches(config: TrainingConfig, data: ImageData, transform: Any, place: Place) -> Iterable[dict]:
    """The batches of one process from `place.start` to `place.stop`: `pixel_values`, `labels`, `skipped`."""
    options = {
        "num_workers": config.num_workers,
        "collate_fn": collate,
        "pin_memory": torch.cuda.is_available() and not config.cpu,
    }
    if not config.streaming:
        sampler = EpochBatches(len(data.train), place, config.shuffle)
        return DataLoader(TrainImages(data, transform, place), batch_sampler=sampler, **options)
    # Workers take turns, a batch each; so a run that resumes begins with a whole turn, of which it drops what it had.
    num_readers = min(config.num_workers, data.train.num_shards // place.world_size) or 1
    dropped = place.start % num_readers
    shuffle_buffer = config.shuffle_buffer if config.shuffle else 1
    images = StreamedTrainImages(data, transform, replace(place, start=place.start - dropped), shuffle_buffer)
    options["num_workers"] = num_readers if config.num_workers else 0
    return islice(DataLoader(images, batch_size=place.batch_size, **options), dropped, None)


@dataclass
class EvaluationCollator:
    """Encoded rows to `pixel_values` and `labels`. A broken image is an error."""

    data: ImageData
    processor: Any

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        images = [self._decode(row[self.data.image_column]) for row in rows]
        pixel_values = self.processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "labels": torch.tensor([row[self.data.label_column] for row in rows])}

    def _decode(self, image: dict[str, Any]) -> Image.Image:
        try:
            return decode(image)
        except Exception as error:  # Pillow raises whatever its decoders do
            path = (image or {}).get("path") or "without a name"
            raise ValueError(
                f"An evaluation image ({path}) of `{self.data.name}` cannot be decoded: {error}. Leaving it out would "
                "change what is measured, so mend or remove it."
            ) from error


def evaluation_batches(config: TrainingConfig, data: ImageData, processor: Any) -> DataLoader:
    """Every evaluation image once, in order; for `Accelerator.prepare` to share out."""
    return DataLoader(
        data.evaluation,
        batch_size=config.eval_batch_size,
        num_workers=0 if config.streaming else config.num_workers,
        collate_fn=EvaluationCollator(data, processor),
    )


def num_train_images(config: TrainingConfig, data: ImageData) -> int:
    """Raises `ValueError` for a stream that does not say how long it is, without `images_per_epoch`."""
    if config.images_per_epoch is not None:
        return config.images_per_epoch
    if isinstance(data.train, datasets.Dataset):
        return len(data.train)
    split = (data.train.info.splits or {}).get(str(data.train.split))
    if split is None or not split.num_examples:
        raise ValueError(f"The stream of `{data.name}` does not say how long it is: set `images_per_epoch`.")
    return min(split.num_examples, config.max_train_samples or split.num_examples)
