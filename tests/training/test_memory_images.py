"""Images kept in memory and augmented in batches, against images decoded one by one and Pillow."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from hf_thinkingvit.training import TrainingConfig, TrainingRun, parse_config
from hf_thinkingvit.training.batch_augmentation import (
    CROP,
    NUM_DRAWS,
    BatchAugmentation,
    Rectangles,
    draw_rectangles,
    interpolation_weights,
)
from hf_thinkingvit.training.data import Place, load_data, train_batches
from hf_thinkingvit.training.memory_images import load_in_memory
from hf_thinkingvit.training.recipe import train_transform
from hf_thinkingvit.training.seeding import seeded
from tests.training.tiny_runs import assert_same, flags, weights, write_images


CHANNELS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
STILL = {"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0], "horizontal_flip": 0.0, "random_erasing": 0.0}


def config(dataset="none", **overrides) -> TrainingConfig:
    fields = {"eval_split": "test", "num_workers": 0, "cpu": True, "color_jitter": 0.0, "auto_augment": None}
    return TrainingConfig(**{"dataset": str(dataset), **fields, **CHANNELS, **overrides})


def place(**overrides) -> Place:
    fields = {"batch_size": 4, "rank": 0, "world_size": 1, "seed": 0, "epoch": 0, "start": 0, "stop": 6}
    return Place(**{**fields, **overrides})


def read(settings: TrainingConfig, size: int = 16, **overrides) -> list[dict]:
    images = load_in_memory(load_data(settings).train)
    return list(images.batches(BatchAugmentation(settings, size), place(**overrides), settings.shuffle))


class TestPixels:
    @pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
    @pytest.mark.parametrize("crop", [(0, 0, 20, 24), (3, 5, 11, 9), (2, 0, 18, 24)])
    def test_a_crop_is_resized_as_pillow_does(self, interpolation, crop):
        """Larger and smaller than before. Pillow rounds twice to whole levels; that it also clips twice is not seen."""
        pixels = np.random.default_rng(0).integers(64, 192, (20, 24, 3), dtype=np.uint8)
        top, left, height, width = crop
        box = (left, top, left + width, top + height)
        resample = Image.Resampling[interpolation.upper()]
        expected = np.asarray(Image.fromarray(pixels).crop(box).resize((13, 15), resample)).astype(float)
        numbers = [torch.tensor([float(number)]) for number in crop]
        never = torch.tensor([False])
        rows = interpolation_weights(numbers[0], numbers[2], 20, 15, interpolation, never)[0]
        columns = interpolation_weights(numbers[1], numbers[3], 24, 13, interpolation, never)[0]
        ours = torch.einsum("yh,hwc,xw->yxc", rows, torch.from_numpy(pixels).float(), columns).clamp(0, 255)
        assert np.abs(ours.numpy() - expected).max() <= 1.5

    @pytest.mark.parametrize("flip", [0.0, 1.0])
    def test_without_crops_they_are_those_of_the_transform_for_single_images(self, images, flip):
        settings = config(images, **{**STILL, "horizontal_flip": flip})
        one_by_one = train_batches(settings, load_data(settings).train, train_transform(settings, 16), place())
        for batch, expected in zip(read(settings), one_by_one, strict=True):
            torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], atol=1e-5, rtol=0)
            assert torch.equal(batch["labels"], expected["labels"])

    def test_erasing_replaces_a_rectangle_by_noise(self, images):
        settings = config(images, **{**STILL, "random_erasing": 1.0})
        plain = read(config(images, **STILL))
        changed = [(batch["pixel_values"] != other["pixel_values"]) for batch, other in zip(read(settings), plain)]
        for image in torch.cat(changed)[:, 0]:
            top, left = image.any(dim=1), image.any(dim=0)
            assert image[top][:, left].all()
            assert 0 < image.sum() <= 16 * 16 / 3 + 16


class TestPositions:
    """Crops of 8 by 8 pixels out of 12 by 20, whose pixels say where they were."""

    SETTINGS = {"crop_scale": [64 / 240] * 2, "crop_ratio": [1.0, 1.0], "horizontal_flip": 0.5, "random_erasing": 0.0}
    LEVELS = {"image_mean": [0.0] * 3, "image_std": [1 / 255] * 3}  # pixels are levels again

    def places(self, crops: torch.Tensor) -> list[tuple[int, int, bool]]:
        """Top, left and whether it is mirrored, of crops `(images, 3, 8, 8)` that must be whole parts of the image."""
        crops = crops.round().long()
        tops, lefts = crops[:, 0, 0, 0], crops[:, 1, 0].amin(dim=1)
        mirrored = crops[:, 1, 0, 0] > crops[:, 1, 0, 1]
        rows, columns = tops[:, None] + torch.arange(8), lefts[:, None] + torch.arange(8)
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        expected = [rows[:, :, None].expand_as(crops[:, 0]), columns[:, None, :].expand_as(crops[:, 1])]
        assert torch.equal(crops, torch.stack([*expected, 20 * expected[0] + expected[1]], dim=1))
        return list(zip(tops.tolist(), lefts.tolist(), mirrored.tolist()))

    def image(self) -> np.ndarray:
        rows, columns = np.mgrid[:12, :20]
        return np.stack([rows, columns, 20 * rows + columns], axis=-1).astype(np.uint8)

    def test_every_place_is_as_likely_as_any_other(self):
        count = 13_000
        pixels = torch.from_numpy(self.image().transpose(0, 2, 1).copy()).expand(count, 12, 3, 20)
        augmentation = BatchAugmentation(config(**{**self.SETTINGS, **self.LEVELS}), 8)
        found = Counter(self.places(augmentation(pixels, 0, np.arange(count))))
        assert set(found) == set(product(range(5), range(13), (False, True)))
        # 100 of each of 130 are expected, with a standard deviation of 10.
        assert min(found.values()) > 55 and max(found.values()) < 145

    def test_they_are_the_places_of_the_transform_for_single_images(self):
        transform, image = train_transform(config(**{**self.SETTINGS, **self.LEVELS}), 8), Image.fromarray(self.image())
        with seeded(0):
            crops = torch.stack([transform(image) for _ in range(2000)])
        assert set(self.places(crops)) == set(product(range(5), range(13), (False, True)))


class TestRectangles:
    def test_they_fit_and_have_the_area_and_the_ratio_asked_for(self):
        draws = np.random.default_rng(0).random((2000, CROP.stop))
        crops, fit = draw_rectangles(draws, (32, 48), (0.25, 0.5), (3 / 4, 4 / 3), strict=False)
        assert isinstance(crops, Rectangles)
        assert fit.all()
        assert ((crops.top >= 0) & (crops.top + crops.height <= 32)).all()
        assert ((crops.left >= 0) & (crops.left + crops.width <= 48)).all()
        share = crops.height * crops.width / (32 * 48)
        assert (share > 0.23).all()
        assert (share < 0.53).all()
        assert share.mean() == pytest.approx(0.375, abs=0.01)
        assert np.log(crops.width / crops.height).mean() == pytest.approx(0.0, abs=0.02)

    def test_without_one_that_fits_the_crop_is_central(self):
        """A wide image, which no crop of all of its area and such a ratio fits into."""
        settings = config(**{**STILL, "crop_ratio": [0.5, 1.0]})
        pixels = torch.zeros(1, 8, 3, 16, dtype=torch.uint8)
        pixels[..., 4:12] = 255
        white = BatchAugmentation(settings, 8)(pixels, 0, np.array([0]))
        assert white.min() > 0


class TestReproducible:
    LIVELY = {"crop_scale": [0.3, 1.0], "random_erasing": 0.5}

    def test_an_epoch_continues_in_its_middle(self, images):
        settings = config(images, **self.LIVELY)
        whole, rest = read(settings), read(settings, start=3)
        assert [len(whole), len(rest)] == [6, 3]
        for one, other in zip(whole[3:], rest):
            assert torch.equal(one["pixel_values"], other["pixel_values"])

    def test_two_processes_read_what_one_would(self, images):
        settings = config(images, **self.LIVELY)
        alone = read(settings, batch_size=8, stop=3)
        shares = [read(settings, rank=rank, world_size=2, stop=3) for rank in (0, 1)]
        for batch, *halves in zip(alone, *shares):
            together = torch.cat([half["pixel_values"] for half in halves])
            torch.testing.assert_close(batch["pixel_values"], together, atol=1e-6, rtol=0)

    def test_positions_beyond_a_block_and_epochs_differ(self, monkeypatch):
        monkeypatch.setattr("hf_thinkingvit.training.batch_augmentation.BLOCK", 4)
        augmentation = BatchAugmentation(config(), 8)
        pixels = torch.arange(256, dtype=torch.uint8).view(1, 8, 1, 32).expand(6, 8, 3, 32)
        first, again, later = (augmentation(pixels, epoch, np.arange(2, 8)) for epoch in (0, 0, 1))
        assert torch.equal(first, again)
        assert len({tuple(image.flatten().tolist()) for image in torch.cat([first, later])}) == 12
        torch.testing.assert_close(augmentation(pixels[:2], 0, np.arange(4, 6)), first[2:4], atol=1e-6, rtol=0)

    def test_a_killed_run_is_resumed_bit_by_bit(self, images, tmp_path):
        from hf_thinkingvit.training import parse_config, train

        lively = {"in_memory": True, "color_jitter": 0, "auto_augment": "none", "save_steps": 2, "log_steps": 2}
        train(parse_config(flags(images, tmp_path / "whole", **lively)))
        train(parse_config(flags(images, tmp_path / "parts", **lively, max_steps=4)))
        train(parse_config(flags(images, tmp_path / "parts", **lively, resume="auto")))
        assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


class TestLimits:
    def test_broken_images_are_replaced_and_counted_as_elsewhere(self, tmp_path):
        settings = config(write_images(tmp_path, broken={"train": [2, 5, 6, 23]}), **STILL)
        one_by_one = train_batches(settings, load_data(settings).train, train_transform(settings, 16), place())
        for batch, expected in zip(read(settings), one_by_one, strict=True):
            torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], atol=1e-5, rtol=0)
            assert torch.equal(batch["labels"], expected["labels"])
            assert batch["skipped"] == expected["skipped"]

    def test_none_is_whole(self, tmp_path):
        settings = config(write_images(tmp_path, broken={"train": list(range(24))}))
        with pytest.raises(ValueError, match="No image of .* can be decoded"):
            load_in_memory(load_data(settings).train)

    def test_images_of_several_sizes(self, tmp_path):
        for split, sizes in (("train", (8, 9, 8, 8)), ("test", (8, 8, 8, 8))):
            for index, size in enumerate(sizes):
                folder = tmp_path / split / ("ant", "bee")[index % 2]
                folder.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (size, 8)).save(folder / f"{index}.png")
        with pytest.raises(ValueError, match="needs images of one size"):
            load_in_memory(load_data(config(tmp_path)).train)

    def test_a_stream(self, images):
        with pytest.raises(ValueError, match="`in_memory` keeps all images, and `streaming` none"):
            load_in_memory(load_data(config(images, streaming=True)).train)

    @pytest.mark.parametrize(
        "overrides, message",
        [
            ({"auto_augment": "rand-m9-mstd0.5-inc1"}, "set `auto_augment` to none"),
            ({"color_jitter": 0.3}, "`color_jitter` to 0"),
            ({"interpolation": "lanczos"}, "interpolates by one of"),
        ],
    )
    def test_other_augmentation(self, overrides, message):
        with pytest.raises(ValueError, match=message):
            BatchAugmentation(config(**overrides), 16)


def test_an_epoch_longer_than_the_images_is_refused(images, tmp_path):
    words = flags(images, tmp_path, in_memory=True, auto_augment="none", color_jitter=0, images_per_epoch=48)
    with pytest.raises(ValueError, match=r"one pass over the \d+ images: `images_per_epoch` \(48\) must not be more"):
        TrainingRun(parse_config(words))


def test_columns_of_random_numbers_do_not_overlap():
    from hf_thinkingvit.training import batch_augmentation as module

    columns = [*range(NUM_DRAWS)[CROP], module.FLIP, module.ERASE, *range(NUM_DRAWS)[module.ERASED]]
    assert sorted(columns) == list(range(NUM_DRAWS))
