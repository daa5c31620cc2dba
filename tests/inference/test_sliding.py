"""Sliding windows: the official predictions, overlaps, small images, exits of single windows, bounded memory."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from hf_thinkingvit.conversion.checkpoint import read_checkpoint
from hf_thinkingvit.conversion.convert import load_official
from hf_thinkingvit.inference import ImageView, ImageViews, SlidingWindowSegmenter, scaled_views, sliding
from hf_thinkingvit.inference.sliding import window_anchors
from tests.conversion.segmenter_files import write_official
from tests.models.segmentation_models import lively_segmenter
from tests.models.test_task_segmentation import LargestTensor
from tests.utils import FIXTURES, lively_model, random_images


@pytest.mark.parametrize("golden", ["seg_linear", "seg_mask"])
@pytest.mark.parametrize("band_bytes", [sliding.BAND_BYTES, 20_000])
def test_golden_predictions(golden, band_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(sliding, "BAND_BYTES", band_bytes)  # the second makes bands of a few rows
    settings = json.loads((FIXTURES / golden / "config.json").read_text())["sliding"]
    expected = load_file(FIXTURES / golden / "expected.safetensors")
    model = load_official(read_checkpoint(write_official(golden, tmp_path)))
    segment = SlidingWindowSegmenter(
        model,
        window_size=settings["window_size"],
        stride=settings["window_stride"],
        threshold=settings["threshold"],
        return_probabilities=True,
        batch_size=4,
    )
    views = [
        ImageView(expected[f"sliding.pixel_values.{number}"][0], is_flipped)
        for number, is_flipped in enumerate(settings["flip"])
    ]
    (result,) = segment([ImageViews(views, tuple(settings["ori_shape"]))])
    torch.testing.assert_close(result.probabilities, expected["sliding.probs"], atol=1e-4, rtol=0)
    assert torch.equal(result.labels, expected["sliding.probs"].argmax(dim=0))
    stages = torch.tensor([window.exit_stage for window in result.windows])
    assert torch.equal(torch.bincount(stages, minlength=2), expected["sliding.stage_counts"])
    assert segment.stats.exits == expected["sliding.stage_counts"].tolist()


def test_anchors_end_at_the_border():
    assert window_anchors(70, 32, 20) == [0, 20, 38]
    assert window_anchors(72, 32, 20) == [0, 20, 40]
    assert window_anchors(32, 32, 20) == [0]
    assert window_anchors(33, 32, 32) == [0, 1]


@pytest.fixture
def images():
    return [random_images(1, size, seed)[0] for seed, size in enumerate([(32, 32), (40, 57), (64, 33), (90, 41)])]


@torch.no_grad()
def reference(model, image, window, stride):
    """Sums of the pixel logits of every window by itself, divided by the number of windows over each pixel."""
    height, width = image.shape[1:]
    total, cover, stages = torch.zeros(model.config.num_labels, height, width), torch.zeros(height, width), []
    for top in window_anchors(height, window, stride):
        for left in window_anchors(width, window, stride):
            outputs = model(image[None, :, top : top + window, left : left + window])
            pixels = F.interpolate(outputs.logits, size=(window, window), mode="bilinear", align_corners=False)[0]
            total[:, top : top + window, left : left + window] += pixels
            cover[top : top + window, left : left + window] += 1
            stages.append(outputs.exit_stage.item())
    return (total / cover).softmax(dim=0), stages


def test_windows_of_many_images_leave_each_at_its_own_stage(images):
    model = lively_segmenter()
    entropies = model(torch.cat([i[None, :, :32, :32] for i in images]), max_stages=1).entropy.sort().values
    model.config.threshold = [entropies[1:3].mean().item(), 0.0]
    segment = SlidingWindowSegmenter(model, window_size=32, stride=24, return_probabilities=True, batch_size=5)
    results = list(segment(images))
    assert [result.index for result in results] == [0, 1, 2, 3]
    exits = []
    for image, result in zip(images, results):
        probabilities, stages = reference(model, image, 32, 24)
        torch.testing.assert_close(result.probabilities, probabilities, atol=1e-5, rtol=1e-4)
        assert [window.exit_stage for window in result.windows] == stages
        exits += stages
    assert {0, 2} <= set(exits)
    assert segment.stats.rows == [len(exits), sum(s > 0 for s in exits), sum(s > 1 for s in exits)]


def test_small_images_are_enlarged_and_answers_have_the_size_of_the_image():
    image = random_images(1, (20, 30))[0]
    model = lively_segmenter()
    (result,) = SlidingWindowSegmenter(model, window_size=32, stride=16, return_probabilities=True)([image])
    enlarged = F.interpolate(image[None], size=(32, 48), mode="bilinear", align_corners=False)[0]
    (large,) = SlidingWindowSegmenter(model, window_size=32, stride=16)([ImageViews([ImageView(enlarged)], (20, 30))])
    assert result.labels.shape == (20, 30) and torch.equal(result.labels, large.labels)


def test_views_of_several_scales_and_their_mirror_images():
    image = random_images(1, (40, 60))[0]
    views = scaled_views(image, 32, (1.0, 1.5), flip=True)
    assert views.size == (40, 60)
    assert [tuple(view.pixel_values.shape[1:]) for view in views.views] == [(32, 48), (32, 48), (48, 72), (48, 72)]
    assert [view.is_flipped for view in views.views] == [False, True, False, True]
    assert torch.equal(views.views[1].pixel_values, views.views[0].pixel_values.flip(-1))
    segment = SlidingWindowSegmenter(lively_segmenter(), window_size=32, stride=16, return_probabilities=True)
    parts = list(segment([ImageViews([view], views.size) for view in views.views]))
    (together,) = segment([views])
    expected = torch.stack([part.probabilities for part in parts]).mean(dim=0)
    torch.testing.assert_close(together.probabilities, expected, atol=1e-5, rtol=1e-4)


def test_no_map_of_all_pixels_and_classes_is_made(monkeypatch):
    monkeypatch.setattr(sliding, "BAND_BYTES", 20_000)
    image = random_images(1, (256, 256))[0]
    with LargestTensor() as largest:
        (result,) = SlidingWindowSegmenter(lively_segmenter(), window_size=64, stride=32, batch_size=2)([image])
    assert result.labels.shape == (256, 256)
    assert largest.numel <= image.numel()  # the map would have 7 numbers for each pixel instead of 3


def test_the_progress_bar_counts_images(images, capsys):
    list(SlidingWindowSegmenter(lively_segmenter(), window_size=32, stride=32, progress=True)(images))
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 30}, "`window_size` must be a multiple of the patch size"),
        ({"window_size": 0}, "`window_size` must be an integer"),
        ({"stride": 40}, "pixels would be left out"),
        ({"stride": 0}, "`stride` must be an integer"),
        ({"threshold": -1.0}, "`threshold` must be a number of at least 0"),
        ({"threshold": math.nan}, "`threshold` must be a number of at least 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SlidingWindowSegmenter(lively_segmenter(), **options)


def test_only_segmentation_models_are_taken():
    with pytest.raises(ValueError, match="Expected a segmentation model"):
        SlidingWindowSegmenter(lively_model())


@pytest.mark.parametrize("broken", [torch.zeros(32, 32), torch.zeros(1, 32, 32), torch.zeros(3, 0, 32), "a.png"])
def test_an_input_that_is_no_image_is_refused_after_those_before_it(images, broken):
    results = SlidingWindowSegmenter(lively_segmenter())([images[0], broken])
    assert next(results).index == 0
    with pytest.raises(ValueError, match="Input 1 must"):
        next(results)
