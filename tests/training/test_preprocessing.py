"""Starting points and teachers get images preprocessed as their image processors do."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessorPil,
    EfficientNetImageProcessorPil,
    ViTImageProcessorPil,
)

from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.training import TrainingConfig, TrainingRun, parse_config, train
from hf_thinkingvit.training.preprocessing import load_image_processor, read_preprocessing, run_image_processor
from tests.models.test_weights_from_vit import trained_vit
from tests.training.tiny_runs import flags
from tests.utils import lively_model, tiny_config


GOOGLE = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": {"height": 32, "width": 32}}


def image(size: tuple[int, int] = (40, 36)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


def pixels(processor) -> torch.Tensor:
    return processor(image(), return_tensors="pt")["pixel_values"]


def prepared(config: TrainingConfig, model_config=None):
    said: list[str] = []
    processor, config = run_image_processor(config, model_config or tiny_config(), said.append)
    return processor, config, "\n".join(said)


@pytest.fixture
def vit_folder(tmp_path):
    """A folder with the preprocessing of Google's ViT: mean and deviation 0.5, no crop, bilinear."""
    trained_vit().save_pretrained(tmp_path)
    ViTImageProcessorPil(**GOOGLE).save_pretrained(tmp_path)
    return tmp_path


class TestReading:
    @pytest.mark.parametrize(
        "processor, mean, std, size",
        [
            (evaluation_image_processor(32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (32, 32)),
            (ViTImageProcessorPil(**GOOGLE), (0.5,) * 3, (0.5,) * 3, (32, 32)),
            (ViTImageProcessorPil(size={"height": 16, "width": 8}, do_normalize=False), (0,) * 3, (1,) * 3, (16, 8)),
            (ViTImageProcessorPil(**{**GOOGLE, "rescale_factor": 1 / 127.5}), (0.25,) * 3, (0.25,) * 3, (32, 32)),
            # Only the shorter side is given, so the size has the proportions of the image.
            (BitImageProcessorPil(size={"shortest_edge": 8}, do_center_crop=False), None, None, (8, 12)),
        ],
    )
    def test_measures_normalisation_and_size(self, processor, mean, std, size):
        read = read_preprocessing(processor, (32, 48) if size == (8, 12) else 32, "it")
        assert read.image_size == size
        if mean is not None:
            assert read.image_mean == pytest.approx(mean, abs=1e-6)
            assert read.image_std == pytest.approx(std, abs=1e-6)

    def test_reads_settings_of_its_own_kind(self):
        """Settings of EfficientNet's processor, which normalises twice."""
        processor = EfficientNetImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
        read = read_preprocessing(processor, 32, "it")
        mean, std = (torch.tensor(values)[:, None, None] for values in (read.image_mean, read.image_std))
        flat = Image.new("RGB", (32, 32), (10, 200, 90))
        expected = (torch.tensor([10, 200, 90])[:, None, None] / 255 - mean) / std
        given = processor(flat, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(given, expected.expand(3, 32, 32), atol=1e-3, rtol=1e-3)

    def test_refuses_what_is_more_than_a_normalisation(self):
        class Inverted(ViTImageProcessorPil):
            def __call__(self, images, **kwargs):
                return {"pixel_values": super().__call__(images, **kwargs)["pixel_values"] ** 2}

        with pytest.raises(ValueError, match="does more to colours"):
            read_preprocessing(Inverted(**GOOGLE), 32, "it")

    def test_no_processor_is_told_from_a_broken_one(self, tmp_path):
        assert load_image_processor(tmp_path) is None
        (tmp_path / "preprocessor_config.json").write_text("{")
        with pytest.raises((OSError, ValueError)):
            load_image_processor(tmp_path)


class TestOfARun:
    @pytest.mark.parametrize("attribute", ["from_vit", "from_pretrained"])
    def test_is_that_of_the_starting_point(self, vit_folder, attribute):
        processor, config, said = prepared(TrainingConfig(**{attribute: str(vit_folder)}))
        own = AutoImageProcessor.from_pretrained(vit_folder)
        assert torch.equal(pixels(processor), pixels(own))
        assert (config.image_mean, config.image_std, config.crop_pct) == ([0.5] * 3, [0.5] * 3, None)
        assert "mean [0.5, 0.5, 0.5]" in said
        assert "bilinear" in said

    def test_the_configuration_goes_before_it(self, vit_folder):
        processor, _, said = prepared(TrainingConfig(from_vit=str(vit_folder), image_mean=[0.1, 0.2, 0.3]))
        expected = ViTImageProcessorPil(**{**GOOGLE, "image_mean": [0.1, 0.2, 0.3]})
        torch.testing.assert_close(pixels(processor), pixels(expected), atol=2e-2, rtol=0)
        assert "`image_mean` as configured" in said
        processor, config, said = prepared(TrainingConfig(from_vit=str(vit_folder), crop_pct=0.5))
        expected = evaluation_image_processor(32, 0.5, [0.5] * 3, [0.5] * 3, Image.Resampling.BILINEAR)
        assert torch.equal(pixels(processor), pixels(expected))
        assert config.crop_pct == 0.5
        assert "`crop_pct` as configured" in said

    def test_so_does_the_interpolation(self, vit_folder):
        processor, config, said = prepared(TrainingConfig(from_vit=str(vit_folder)))
        assert (config.interpolation, "as configured" in said) == ("bilinear", False)
        processor, config, said = prepared(TrainingConfig(from_vit=str(vit_folder), interpolation="bicubic"))
        expected = ViTImageProcessorPil(**{**GOOGLE, "resample": Image.Resampling.BICUBIC})
        torch.testing.assert_close(pixels(processor), pixels(expected), atol=2e-2, rtol=0)
        assert (pixels(processor) - pixels(AutoImageProcessor.from_pretrained(vit_folder))).abs().max() > 0.1
        assert config.interpolation == "bicubic"
        assert "`interpolation` as configured" in said
        processor, config, _ = prepared(TrainingConfig(interpolation="bilinear"))
        assert torch.equal(
            pixels(processor), pixels(evaluation_image_processor(32, resample=Image.Resampling.BILINEAR))
        )
        with pytest.raises(ValueError, match=r"`interpolation` must be one of .*'bicubic'.*, got 'cubic'"):
            TrainingConfig(interpolation="cubic").check()

    def test_without_a_starting_point_is_imagenets(self, tmp_path):
        expected = evaluation_image_processor(32)
        processor, config, said = prepared(TrainingConfig())
        assert torch.equal(pixels(processor), pixels(expected))
        assert (config.image_mean, config.crop_pct) == (list(expected.image_mean), 0.9)
        assert said == ""
        trained_vit().save_pretrained(tmp_path)
        processor, _, said = prepared(TrainingConfig(from_vit=str(tmp_path)))
        assert torch.equal(pixels(processor), pixels(expected))
        assert "has no image processor: ImageNet's" in said

    def test_another_image_size_keeps_the_normalisation(self, vit_folder):
        processor, config, _ = prepared(TrainingConfig(from_pretrained=str(vit_folder)), tiny_config(image_size=16))
        expected = evaluation_image_processor(16, 0.9, [0.5] * 3, [0.5] * 3, Image.Resampling.BILINEAR)
        assert torch.equal(pixels(processor), pixels(expected))
        assert config.crop_pct == 0.9


def continued(folder, images, output, **overrides) -> list[str]:
    words = flags(images, output, from_pretrained=folder, epochs=2, **overrides)
    for name in [word for word in words if word.startswith("--model.")]:
        position = words.index(name)
        del words[position : position + 2]
    return words


def without_field(checkpoint, name: str) -> None:
    """Remove a field from a checkpoint, as if a version without it had saved the checkpoint."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for file in ("progress.json", "evaluated.json"):
        saved = json.loads((checkpoint / file).read_text())
        del saved["config"][name]
        (checkpoint / file).write_text(json.dumps(saved))
    written = (checkpoint / "progress.json").read_bytes()
    manifest["progress.json"] = {"size": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def start(tmp_path):
    lively_model(num_labels=3).save_pretrained(tmp_path / "start")
    ViTImageProcessorPil(**GOOGLE).save_pretrained(tmp_path / "start")
    return tmp_path / "start"


class TestTraining:
    def test_trains_on_and_saves_what_the_starting_point_expects(self, start, images, tmp_path):
        run = TrainingRun(parse_config(continued(start, images, tmp_path / "run", max_steps=2)))
        normalise = run.transform.transforms[-2]
        assert torch.equal(normalise.mean, torch.full((3,), 0.5))
        assert "bilinear" in str(run.transform)
        run.run()
        saved = AutoImageProcessor.from_pretrained(tmp_path / "run" / "last")
        assert torch.equal(pixels(saved), pixels(AutoImageProcessor.from_pretrained(start)))
        AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "last")

    def test_a_run_goes_on_as_it_was_begun(self, start, images, tmp_path):
        """With the normalisation of the starting point, and with one given by flags, as always in earlier versions."""
        train(parse_config(continued(start, images, tmp_path / "a", max_steps=1)))
        words = continued(start, images, tmp_path / "a", resume="auto")
        # The checkpoint holds the normalisation, so later changes of the source have no effect.
        ViTImageProcessorPil(**{**GOOGLE, "image_mean": [0.4] * 3}).save_pretrained(start)
        assert TrainingRun(parse_config(words)).config.image_mean == [0.5, 0.5, 0.5]
        told = ["--image_mean", "0.1", "0.2", "0.3", "--image_std", "1", "1", "1", "--crop_pct", "0.8"]
        train(parse_config([*continued(start, images, tmp_path / "b", max_steps=1), *told]))
        run = TrainingRun(parse_config(continued(start, images, tmp_path / "b", resume="auto")))
        assert (run.config.image_mean, run.config.crop_pct) == ([0.1, 0.2, 0.3], 0.8)
        with pytest.raises(ValueError, match=r"another run \(image_mean"):
            other = ["--image_mean", "0.3", "0.2", "0.1"]
            TrainingRun(parse_config([*continued(start, images, tmp_path / "b", resume="auto"), *other]))

    def test_a_run_of_a_version_that_always_interpolated_alike_goes_on_so(self, start, images, tmp_path):
        told = ["--image_mean", "0.5", "0.5", "0.5", "--image_std", "0.5", "0.5", "0.5", "--crop_pct", "0.9"]
        words = [*continued(start, images, tmp_path / "run", max_steps=1, save_steps=1), *told]
        train(parse_config([*words, "--interpolation", "bicubic"]))
        without_field(tmp_path / "run" / "checkpoints" / "step-00000001", "interpolation")
        run = TrainingRun(parse_config([*words, "--resume", "auto"]))
        assert (run.progress.step, run.config.interpolation) == (1, "bicubic")
        assert "bicubic" in str(run.transform)
        assert run.processor.resample == Image.Resampling.BICUBIC
        with pytest.raises(ValueError, match="interpolation: 'bicubic' then, 'bilinear' now"):
            TrainingRun(parse_config([*words, "--resume", "auto", "--interpolation", "bilinear"]))

    def test_a_run_keeps_its_interpolation(self, start, images, tmp_path):
        train(parse_config(continued(start, images, tmp_path / "run", max_steps=1)))
        ViTImageProcessorPil(**{**GOOGLE, "resample": Image.Resampling.BICUBIC}).save_pretrained(start)
        run = TrainingRun(parse_config(continued(start, images, tmp_path / "run", resume="auto")))
        assert "bilinear" in str(run.transform)
        assert run.processor.resample == Image.Resampling.BILINEAR
