"""examples/segment_images.py, run as a user runs it."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from hf_thinkingvit.evaluation import model_conditions
from hf_thinkingvit.image_processing import segmentation_image_processor
from hf_thinkingvit.inference import SlidingWindowSegmenter, scaled_views
from hf_thinkingvit.windows import WindowPlan
from tests.models.segmentation_models import lively_segmenter
from tests.test_scripts import run_here


SCRIPT = Path(__file__).parents[1] / "examples" / "segment_images.py"


def run(*words) -> subprocess.CompletedProcess:
    return run_here([str(SCRIPT), *map(str, words)])


@pytest.fixture
def folders(tmp_path):
    model = lively_segmenter()
    model.save_pretrained(tmp_path / "model")
    segmentation_image_processor(32).save_pretrained(tmp_path / "model")
    (tmp_path / "images" / "more").mkdir(parents=True)
    for name, size in (("a.png", (60, 90, 3)), ("more/b.jpg", (50, 40, 3))):
        pixels = np.random.default_rng(len(name)).integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    return tmp_path


def test_label_maps_overlays_and_windows(folders):
    words = ("--images", folders / "images", "--output", folders / "out", "--threshold", 10)
    words += ("--short-side", 32)
    completed = run("--model", folders / "model", *words)
    assert completed.returncode == 0, completed.stderr
    assert "skipped" in completed.stderr and "broken.png" in completed.stderr
    assert "left at each stage: [4, 0, 0]" in completed.stdout  # both images are two windows wide or high
    segmenter = SlidingWindowSegmenter(lively_segmenter(), threshold=10.0)
    processor = AutoImageProcessor.from_pretrained(folders / "model")
    image = Image.open(folders / "images" / "a.png")
    pixel_values = processor(image, do_resize=False, return_tensors="pt")["pixel_values"][0]
    (expected,) = segmenter([scaled_views(pixel_values, 32)])
    labels = Image.open(folders / "out" / "a.png.labels.png")
    assert labels.mode == "P" and torch.equal(torch.from_numpy(np.array(labels)).long(), expected.labels)
    for name, size in (("a.png", (90, 60)), ("more/b.jpg", (40, 50))):
        for kind in ("labels", "overlay", "windows"):
            assert Image.open(folders / "out" / f"{name}.{kind}.png").size == size


def test_sizes_are_those_of_the_calibration(folders):
    """By default as they are; with a calibration, as it records, and any other size is said not to be covered."""
    words = ("--model", folders / "model", "--images", folders / "images", "--output", folders / "out")
    plain = run(*words)
    assert "as they are, windows 32" in plain.stdout and "calibration " not in plain.stdout, plain.stderr
    model = lively_segmenter()
    plan = WindowPlan((32, 32), short_side=40, long_side=50)
    conditions = model_conditions(model) | {"preprocessing": plan.facts()}
    model.config.calibration = {"threshold": model.config.threshold, "conditions": conditions}
    model.save_pretrained(folders / "model")
    calibrated = run(*words)
    assert "shorter side 40, longer at most 50" in calibrated.stdout, calibrated.stderr
    assert "calibration   holds" in calibrated.stdout
    other = run(*words, "--short-side", 36)
    assert "how images are resized and cut (long_side 50, short_side 40 then, long_side None, short_side 36 now)" in (
        other.stdout
    ), other.stderr
    assert "how images are resized and cut" in run(*words, "--flip").stdout
    assert "give both" in run(*words, "--long-side", 36).stderr


def test_pictures_of_an_earlier_run_are_no_input(folders):
    words = ("--model", folders / "model", "--dataset", folders / "images", "--output-dir", folders / "images" / "out")
    for _ in range(2):
        completed = run(*words)
        assert completed.returncode == 0 and "3 in " in completed.stdout, completed.stderr


def test_settings_that_cannot_work_are_one_line(folders):
    completed = run("--model", folders / "model", "--images", folders / "images", "--window", 30)
    assert completed.returncode == 2 and "must be a multiple of the patch size" in completed.stderr
    (folders / "empty").mkdir()
    completed = run("--model", folders / "model", "--images", folders / "empty")
    assert completed.returncode == 2 and "no images in" in completed.stderr
