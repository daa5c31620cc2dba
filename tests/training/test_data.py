import random

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value

from hf_thinkingvit.data import evaluation_batches
from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.training import TrainingConfig
from hf_thinkingvit.training.data import Place, load_data, num_train_images, train_batches
from hf_thinkingvit.training.recipe import train_transform
from hf_thinkingvit.training.seeding import seeded
from tests.training.tiny_runs import LABELS, encoded_image, write_images


def config(dataset, **overrides) -> TrainingConfig:
    return TrainingConfig(**{"dataset": str(dataset), "eval_split": "test", "num_workers": 0, "cpu": True, **overrides})


def place(**overrides) -> Place:
    fields = {"batch_size": 4, "rank": 0, "world_size": 1, "seed": 0, "epoch": 0, "start": 0, "stop": 6}
    return Place(**{**fields, **overrides})


def read(config: TrainingConfig, **overrides) -> list[dict]:
    transform = train_transform(config, 16)
    return list(train_batches(config, load_data(config).train, transform, place(**overrides)))


def plain(dataset, **overrides) -> TrainingConfig:
    """Without augmentation, so that an image is recognised by its pixels."""
    still = {"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0], "horizontal_flip": 0.0, "color_jitter": 0.0}
    return config(dataset, **{**still, "auto_augment": None, "random_erasing": 0.0, **overrides})


def fingerprints(batches: list[dict]) -> list[float]:
    return [round(float(image.double().sum()), 3) for batch in batches for image in batch["pixel_values"]]


class TestOrder:
    @pytest.mark.parametrize("streaming", [False, True])
    def test_every_image_once_an_epoch_in_another_order(self, images, streaming):
        settings = plain(images, streaming=streaming, shuffle_buffer=8)
        epochs = [fingerprints(read(settings, epoch=epoch)) for epoch in (0, 1)]
        assert len(set(epochs[0])) == 24
        assert set(epochs[0]) == set(epochs[1])
        assert epochs[0] != epochs[1]

    @pytest.mark.parametrize("num_workers", [0, 2])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_an_epoch_continues_in_its_middle(self, images, streaming, num_workers):
        settings = config(images, streaming=streaming, shuffle_buffer=8, num_workers=num_workers)
        whole, rest = read(settings), read(settings, start=3)
        assert len(whole) == 6
        assert len(rest) == 3
        for one, other in zip(whole[3:], rest):
            assert torch.equal(one["pixel_values"], other["pixel_values"])
            assert torch.equal(one["labels"], other["labels"])

    @pytest.mark.parametrize("broken", [[], [1, 4, 13, 20]], ids=["whole", "broken"])
    @pytest.mark.parametrize("start", range(1, 6))
    def test_a_stream_of_several_readers_continues_in_its_middle(self, tmp_path, start, broken):
        """Two files, so that two workers alternate; an odd start is in the middle of a round."""
        folder = write_images(tmp_path, broken={"train": broken}, train_files=2)
        settings = config(folder, streaming=True, shuffle_buffer=4, num_workers=2)
        whole, rest = read(settings), read(settings, start=start)
        assert len(rest) == 6 - start
        for one, other in zip(whole[start:], rest, strict=True):
            assert torch.equal(one["labels"], other["labels"])
            assert torch.equal(one["pixel_values"], other["pixel_values"])

    def test_two_processes_read_what_one_would(self, images):
        settings = config(images)
        alone = read(settings, batch_size=8, stop=3)
        shares = [read(settings, rank=rank, world_size=2, stop=3) for rank in (0, 1)]
        for batch, *halves in zip(alone, *shares):
            together = torch.cat([half["pixel_values"] for half in halves])
            assert torch.equal(batch["pixel_values"], together)

    def test_streaming_processes_share_the_images(self, images):
        settings = plain(images, streaming=True, shuffle=False)
        shares = [fingerprints(read(settings, rank=rank, world_size=2, stop=3)) for rank in (0, 1)]
        assert [len(share) for share in shares] == [12, 12]
        assert len(set(shares[0] + shares[1])) == 24

    def test_a_stream_begins_again_where_it_is_too_short(self, images):
        read_twice = fingerprints(read(plain(images, streaming=True, shuffle=False), stop=12))
        assert read_twice[:24] == read_twice[24:]

    def test_streaming_equals_map_style(self, images):
        streamed = read(config(images, streaming=True, shuffle=False))
        mapped = read(config(images, shuffle=False))
        for one, other in zip(streamed, mapped, strict=True):
            assert torch.equal(one["pixel_values"], other["pixel_values"])
            assert torch.equal(one["labels"], other["labels"])


class TestAugmentation:
    def test_depends_on_the_epoch_and_the_seed_alone(self, images):
        settings = config(images, shuffle=False)
        first, again, later = read(settings), read(settings), read(settings, epoch=1)
        assert torch.equal(first[0]["pixel_values"], again[0]["pixel_values"])
        assert not torch.equal(first[0]["pixel_values"], later[0]["pixel_values"])

    def test_leaves_the_random_numbers_of_others_alone(self):
        states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
        with seeded(1, 2, 3):
            drawn = random.random(), np.random.rand(), torch.rand(1).item()
        assert random.getstate() == states[0]
        assert np.array_equal(np.random.get_state()[1], states[1])
        assert torch.equal(torch.get_rng_state(), states[2])
        with seeded(1, 2, 3):
            assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())


class TestBrokenImages:
    @pytest.mark.parametrize("streaming", [False, True])
    def test_training_skips_and_counts_them(self, tmp_path, streaming, caplog):
        folder = write_images(tmp_path, broken={"train": [2, 5, 6]})
        batches = read(plain(folder, streaming=streaming, shuffle=False), stop=5)
        assert len({image for batch in batches for image in batch["skipped"]}) == 3
        assert all(batch["pixel_values"].shape == (4, 3, 16, 16) for batch in batches)
        assert "train-2.png" in caplog.text
        readable = fingerprints(read(plain(write_images(tmp_path / "whole"), shuffle=False)))
        assert set(fingerprints(batches)) <= {value for index, value in enumerate(readable) if index not in (2, 5, 6)}

    def test_a_stream_replaces_them_as_map_style_data_does(self, tmp_path):
        folder = write_images(tmp_path, broken={"train": [2, 5, 6, 23]})
        streamed, mapped = (read(config(folder, streaming=stream, shuffle=False)) for stream in (True, False))
        for one, other in zip(streamed, mapped, strict=True):
            assert torch.equal(one["pixel_values"], other["pixel_values"])
            assert torch.equal(one["labels"], other["labels"])
            assert len(one["skipped"]) == len(other["skipped"])

    @pytest.mark.parametrize("streaming", [False, True])
    def test_training_needs_one_that_is_whole(self, tmp_path, streaming):
        folder = write_images(tmp_path, broken={"train": list(range(24))})
        with pytest.raises(ValueError, match="No image of .* can be decoded"):
            read(plain(folder, streaming=streaming))

    def test_evaluation_names_them(self, tmp_path):
        settings = config(write_images(tmp_path, broken={"test": [3]}))
        batches = evaluation_batches(load_data(settings).evaluation, evaluation_image_processor(16), batch_size=4)
        with pytest.raises(ValueError, match=r"test-3\.png.*cannot be decoded"):
            list(batches)


class TestSources:
    def test_label_names_come_with_the_data(self, images):
        assert load_data(config(images)).id2label == dict(enumerate(LABELS))

    def test_a_folder_of_images(self, tmp_path):
        for split in ("train", "validation"):
            for label in ("ant", "bee"):
                (tmp_path / split / label).mkdir(parents=True)
                for index in range(2):
                    (tmp_path / split / label / f"{index}.png").write_bytes(encoded_image(index))
        data = load_data(config(tmp_path, eval_split=None))
        assert data.id2label == {0: "ant", 1: "bee"}
        assert (len(data.train.rows), len(data.evaluation.rows)) == (4, 4)
        assert len(read(plain(tmp_path, eval_split=None), stop=1)[0]["labels"]) == 4

    def test_labels_without_names_are_given_some(self, tmp_path):
        features = Features({"img": Image(), "label": Value("string")})
        for split in ("train", "test"):
            rows = {"img": [{"bytes": encoded_image(i), "path": None} for i in range(4)], "label": ["b", "a", "b", "a"]}
            Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
        data = load_data(config(tmp_path))
        assert data.id2label == {0: "a", 1: "b"}
        assert data.train.rows[0]["label"] == 1
        with pytest.raises(ValueError, match="have no names"):
            load_data(config(tmp_path, streaming=True))

    def test_grey_images_become_rgb(self):
        settings = config("sklearn-digits", crop_pct=1.0)
        data = load_data(settings)
        assert (len(data.train.rows), len(data.evaluation.rows), len(data.id2label)) == (1257, 540, 10)
        batch = next(
            iter(evaluation_batches(data.evaluation, evaluation_image_processor(8, crop_pct=1.0), batch_size=4))
        )
        assert batch["pixel_values"].shape[1:] == (3, 8, 8)

    def test_parts_of_the_data(self, images):
        data = load_data(config(images, max_train_samples=5, max_eval_samples=3))
        assert (len(data.train.rows), len(data.evaluation.rows)) == (5, 3)

    def test_a_stream_must_say_how_long_it_is(self, tmp_path):
        images = write_images(tmp_path)  # a separate folder, because `datasets` caches the lengths of those it has read
        settings = config(images, streaming=True)
        with pytest.raises(ValueError, match="set `images_per_epoch`"):
            num_train_images(settings, load_data(settings).train)
        settings = config(images, streaming=True, images_per_epoch=24)
        assert num_train_images(settings, load_data(settings).train) == 24

    @pytest.mark.parametrize(
        "overrides, message",
        [
            ({"dataset": "/nowhere/at/all"}, "There is no dataset `/nowhere/at/all`"),
            ({"train_split": "training"}, r"no split 'training': it has \['train', 'test'\]"),
            ({"image_column": "picture"}, r"no column 'picture': it has \['image', 'label'\]"),
        ],
    )
    def test_says_what_there_is(self, images, overrides, message):
        with pytest.raises(ValueError, match=message):
            load_data(config(**{"dataset": images, **overrides}))


@pytest.mark.parametrize("label", [ClassLabel(names=["cat"]), Value("string")])
def test_one_label_is_refused(tmp_path, label):
    rows = {"image": [{"bytes": encoded_image(i), "path": None} for i in range(4)], "label": ["cat"] * 4}
    features = Features({"image": Image(), "label": label})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"have one label, \['cat'\].*Check the folders.*`label_column` than 'label'"):
        load_data(TrainingConfig(dataset=str(tmp_path), validation_fraction=0.5))
