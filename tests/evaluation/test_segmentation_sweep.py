"""Sweeps and calibration of segmentation models, whose images consist of windows."""

import argparse
import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from datasets import load_dataset
from PIL import Image

from hf_thinkingvit.commands.__main__ import main
from hf_thinkingvit.commands.evaluation import sides_of
from hf_thinkingvit.commands.options import add_sides
from hf_thinkingvit.evaluation import (
    StageConfusions,
    calibrate_budget,
    calibrate_risk,
    calibration_status,
    evaluate_segmentation,
    evaluate_segmentation_thresholds,
    segmentation,
    stage_macs,
)
from hf_thinkingvit.evaluation.calibration import binomial_p_value, hoeffding_bentkus_p_value, threshold_grid
from hf_thinkingvit.hub import model_card
from hf_thinkingvit.image_processing import segmentation_image_processor
from hf_thinkingvit.image_sizes import recorded_sides
from hf_thinkingvit.masks import MaskLabels, as_mask_split
from hf_thinkingvit.windows import WindowPlan, window_batches
from tests.models.segmentation_models import lively_segmenter
from tests.segmentation_data import picture, write_scenes


PROCESSOR = segmentation_image_processor(16)


@pytest.fixture(scope="module")
def model():
    return lively_segmenter(num_labels=3, image_size=16, patch_size=4)


@pytest.fixture(scope="module")
def answers(model, tmp_path_factory):
    scenes = write_scenes(tmp_path_factory.mktemp("scenes"), {"test": 30})
    found, _ = evaluate_segmentation_thresholds(model, str(scenes), PROCESSOR, batch_size=4, progress=False)
    return found


def test_costs_are_per_image_and_per_window(model, answers):
    """24 × 40 pixels in windows of 16 with a stride of 8: 2 rows of 4."""
    assert len(answers) == 30 and len(answers.scores) == 30 * 8
    first, *_, last = (sum(stage_macs(model.config)[: stage + 1]) / 1e9 for stage in range(3))
    for threshold, cost in ((0.0, last), (10.0, first)):
        row = answers.row(threshold)
        assert row["gmacs_per_window"] == pytest.approx(cost) and row["gmacs"] == pytest.approx(8 * cost)
    assert int(answers.confusions[:, 0].sum()) == 30 * 23 * 40  # the first row of each mask does not count


def test_losses_of_an_image_are_shares_of_its_pixels(answers):
    wrong = answers.losses("pixel_error")
    of_image = torch.zeros(30, 3, dtype=torch.float64).index_add_(0, answers.image, wrong)
    assert (of_image >= 0).all() and (of_image <= 1).all()
    for stage, row in enumerate(answers.stage_rows()):
        assert of_image[:, stage].mean().item() == pytest.approx(1 - row["overall_accuracy"])
    lost = answers.losses("pixels_lost")
    assert not lost[:, -1].any() and (lost <= wrong + 1e-12).all() and lost[:, 0].any()


def test_selected_images_keep_all_of_their_windows(answers):
    some = answers.select(torch.tensor([4, 7, 29]))
    assert len(some) == 3 and some.image.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert torch.equal(some.scores[8:16], answers.scores[56:64])


def test_calibration_bounds_the_pixels_that_are_lost(answers):
    risks = answers.means([10.0], answers.losses("pixels_lost"))
    found = calibrate_risk(answers, epsilon=0.6, delta=0.1)
    assert found.prepared == answers.prepared and "windows of 16 × 16 pixels" in found.prepared
    assert found.target == "pixels_lost" and found.achieved < 0.6 and found.top1 is None and found.mean_iou >= 0
    assert "60% of an image's pixels are right at the last stage and wrong where" in found.statement
    assert risks.item() >= 0
    with pytest.raises(ValueError, match="`risk` must be one of 'pixels_lost' or 'pixel_error'"):
        calibrate_risk(answers, 0.6, 0.1, risk="error")
    budget = calibrate_budget(answers, gmacs=answers.row(10.0)["gmacs"])
    assert budget.mean_iou == pytest.approx(answers.row(10.0)["mean_iou"])


def test_images_of_which_no_pixel_counts_promise_nothing(answers):
    """Their loss would be 0, as if they were segmented rightly."""
    empty = torch.arange(30) >= 20
    confusions = answers.confusions.clone()
    confusions[empty[answers.image]] = 0
    lost = answers.lost * ~empty[answers.image, None]
    partly = replace(answers, confusions=confusions, lost=lost)
    found = calibrate_risk(partly, epsilon=0.6, delta=0.1)
    assert found.images == 20 and found.to_dict() == calibrate_risk(answers.select(~empty), 0.6, 0.1).to_dict()
    with pytest.raises(ValueError, match="None of the calibration images has a pixel that counts"):
        calibrate_risk(replace(answers, confusions=torch.zeros_like(confusions)), epsilon=0.6, delta=0.1)


def test_the_p_value_of_bounded_losses():
    """The smaller of both bounds; above the exact one where losses are 0 or 1, which it holds for as well."""
    for failures, images, epsilon in ((0, 40, 0.1), (3, 100, 0.1), (10, 400, 0.05)):
        p_value = hoeffding_bentkus_p_value(failures / images, images, epsilon)
        exact = binomial_p_value(failures, images, epsilon)
        assert exact - 1e-11 <= p_value <= math.e * exact + 1e-11  # both are rounded to the safe side
    assert hoeffding_bentkus_p_value(0.0, 40, 0.1) == pytest.approx(0.9**40)
    assert hoeffding_bentkus_p_value(0.1, 40, 0.1) == 1.0
    assert hoeffding_bentkus_p_value(0.021, 100, 0.1) > hoeffding_bentkus_p_value(0.02, 100, 0.1)


def test_the_card_has_the_sweep(model, answers):
    card = str(model_card(model, answers.results([0.0, 0.5]), name="scenes"))
    assert "type: mean_iou" in card and "GMACs per window" in card and "mean IoU (%)" in card


def test_a_promise_is_of_one_size_of_images(model, tmp_path):
    """The card claims it beside figures of that size only; the configuration records the size."""
    scenes = str(write_scenes(tmp_path, {"test": 30}))
    model = copy.deepcopy(model)

    def sweep(**sides):
        return evaluate_segmentation_thresholds(model, scenes, PROCESSOR, batch_size=8, progress=False, **sides)[0]

    measured, larger = sweep(short_side=20, long_side=36), sweep()
    calibrate_risk(measured, epsilon=0.6, delta=0.1).apply(model)
    expected = {"window": [16, 16], "stride": [8, 8], "short_side": 20, "long_side": 36}
    assert measured.results([0.5])["preprocessing"] == expected
    assert model.config.calibration["conditions"]["preprocessing"] == expected
    assert recorded_sides(model.config) == (20, 36)
    same, other = (str(model_card(model, each.results([0.5]), name="scenes")) for each in (measured, larger))
    assert "With probability at least" in same and "hf-thinkingvit segment --model" in same
    assert (
        "With probability at least" not in other
        and "how images are resized and cut (long_side 36, short_side 20 then" in other
    )
    assert calibration_status(model, model.config.calibration).holds
    without = {**model.config.calibration, "conditions": dict(model.config.calibration["conditions"])}
    del without["conditions"]["preprocessing"]
    assert "cannot be verified" in str(calibration_status(model, without, expected))


def test_sweep_calibrate_and_segment_follow_each_other(model, tmp_path, capsys):
    """Each command says the next one, which resizes images as it did."""
    scenes = write_scenes(tmp_path, {"test": 30})
    Image.fromarray(picture(0)[0]).save(tmp_path / "a.png")
    model.save_pretrained(tmp_path / "model")
    PROCESSOR.save_pretrained(tmp_path / "model")
    words = ["--dataset", str(scenes / "test.parquet"), "--batch-size", "30"]
    sides = ["--short-side", "20", "--long-side", "36"]
    out = ["--output-dir", str(tmp_path / "sweep")]
    main(["sweep", "--model", str(tmp_path / "model"), *words, *sides, *out, "--points", "3"])
    said = capsys.readouterr().out
    assert "--short-side 20 --long-side 36\n" in said and "30 images are too few for a promise" in said
    results = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert results["preprocessing"]["short_side"] == 20
    out = ["--output-dir", str(tmp_path / "calibrated")]
    main(["calibrate", "--model", str(tmp_path / "model"), *words, *sides, *out, "--gmacs", "1", "--check", "0"])
    assert f"hf-thinkingvit segment --model {tmp_path / 'calibrated'} --dataset FOLDER\n" in capsys.readouterr().out
    out = ["--output-dir", str(tmp_path / "segmented")]
    main(["segment", "--model", str(tmp_path / "calibrated"), "--dataset", str(tmp_path), *out])
    said = capsys.readouterr().out
    assert "shorter side 20, longer at most 36" in said and "calibration   holds" in said


def test_commands_read_the_same_size(model):
    config = copy.deepcopy(model.config)
    parser = argparse.ArgumentParser()
    add_sides(parser)

    def sides(*words):
        return sides_of(parser.parse_args(words), config)

    assert sides() == (None, None)
    config.training_data = {"dataset": "scenes", "preprocessing": {"short_side": 64, "long_side": None}}
    assert sides() == (64, None) and sides("--short-side", "0") == (None, None)
    config.calibration = {"conditions": {"preprocessing": {"short_side": 20, "long_side": 36}}}
    assert sides() == (20, 36) and sides("--short-side", "30") == (30, None)
    for words in (("--long-side", "30"), ("--short-side", "-1")):
        with pytest.raises(ValueError, match="_side`"):
            sides(*words)


def test_rows_of_a_dataset_are_the_same(model, answers, tmp_path):
    scenes = write_scenes(tmp_path, {"test": 30})
    rows = load_dataset(str(scenes), split="test")
    again, _ = evaluate_segmentation_thresholds(model, rows, PROCESSOR, batch_size=7, progress=False)
    torch.testing.assert_close(again.scores, answers.scores)
    assert torch.equal(again.confusions, answers.confusions) and torch.equal(again.image, answers.image)


def forward_sizes(model, run):
    """Windows in each forward pass while `run()` runs, and the most whose logits became pixels at once."""
    sizes, enlarged = [], []
    resize = segmentation.resize_logits

    embeddings = next(module for name, module in model.named_modules() if name.endswith("patch_embeddings"))
    hook = embeddings.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    segmentation.resize_logits = lambda logits, *rest: enlarged.append(len(logits)) or resize(logits, *rest)
    try:
        run()
    finally:
        hook.remove()
        segmentation.resize_logits = resize
    return sizes, max(enlarged)


def test_windows_in_a_forward_pass_are_bounded(model, tmp_path):
    """Images of 8 windows, of which a batch of 3 images runs 3 at a time; logits become pixels one window at a time."""
    scenes, found = write_scenes(tmp_path, {"test": 4}), []
    labels = MaskLabels(names=("a", "b", "c"), values=(0, 1, 2), ignored=(255,), ignore_index=255)
    split = as_mask_split(load_dataset(str(scenes), split="test"), "scenes", labels)
    batches = window_batches(split, PROCESSOR, WindowPlan((16, 16)), batch_size=3)
    for evaluate in (
        lambda: evaluate_segmentation_thresholds(model, str(scenes), PROCESSOR, batch_size=3, progress=False)[0],
        lambda: evaluate_segmentation(Accelerator(cpu=True), {"model": model}, batches),
    ):
        sizes, enlarged = forward_sizes(model, lambda: found.append(evaluate()))
        assert max(sizes) == 3 and sum(sizes) % 32 == 0 and enlarged == 1
    sweep, training = found
    assert sweep.image.tolist() == [image for image in range(4) for _ in range(8)]
    assert training["model"]["mean_iou"] == pytest.approx([row["mean_iou"] for row in sweep.stage_rows()])


def test_qualities_read_only_windows_that_move(answers, monkeypatch):
    grid, read, sum_at = threshold_grid(answers), [], StageConfusions.sum_at
    monkeypatch.setattr(
        StageConfusions, "sum_at", lambda self, rows, stages: read.append(len(rows)) or sum_at(self, rows, stages)
    )
    found = answers.qualities(grid)
    assert sum(read) <= len(answers.scores) * (1 + 2 * (answers.num_stages - 1))
    assert len({*found}) > 3
    for index in (0, 400, 700, 1001):
        assert found[index] == answers.row(grid[index])["mean_iou"]
    assert answers.qualities([grid[900], grid[10], grid[600]]) == [found[900], found[10], found[600]]


def test_images_that_are_not_new_are_warned_of(model, tmp_path, caplog):
    scenes = write_scenes(tmp_path)
    evaluate_segmentation_thresholds(model, str(scenes), PROCESSOR, split="train", max_samples=1, progress=False)
    assert "are not new to the model (they are called training images)" in caplog.text
