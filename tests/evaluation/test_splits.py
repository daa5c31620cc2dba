"""Which images a figure is of, and that no promise is made from training images."""

from dataclasses import replace

import datasets
import pytest

from hf_thinkingvit.evaluation import calibrate_budget, calibrate_risk, evaluate_thresholds
from hf_thinkingvit.evaluation.splits import evaluation_rows, is_training_split
from hf_thinkingvit.hub import model_card
from tests.evaluation.test_calibration import draw
from tests.evaluation.test_sweep import PROCESSOR, images, model
from tests.training.tiny_runs import encoded_image, write_images


def parquet(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    images([0, 1, 2]).to_parquet(path)
    return path


def test_training_images_must_be_asked_for(tmp_path):
    parquet(tmp_path / "train.parquet")
    for streaming in (False, True):
        with pytest.raises(ValueError, match="none of the splits validation, test, val, only train: name the one"):
            evaluation_rows(str(tmp_path), None, streaming)
    with pytest.raises(ValueError, match="none of the splits"):
        evaluate_thresholds(model(), str(tmp_path), PROCESSOR, progress=False)
    answers, _ = evaluate_thresholds(model(), str(tmp_path), PROCESSOR, split="train", progress=False)
    assert answers.split == answers.results([0.0])["split"] == "train"


def test_the_split_is_recorded(tmp_path):
    write_images(tmp_path, num_train=2, num_test=3)
    assert [evaluation_rows(str(tmp_path), split)[1] for split in (None, "test", "train")] == ["test", "test", "train"]
    with pytest.raises(ValueError, match="no split 'validation': it has"):
        evaluation_rows(str(tmp_path), "validation")
    parquet(tmp_path / "validation.parquet")
    assert evaluation_rows(str(tmp_path))[1] == "validation"


def test_data_without_splits_are_not_training_data(tmp_path):
    """`datasets` calls them "train", by convention only."""
    file = parquet(tmp_path / "photographs.parquet")
    folder = tmp_path / "animals"
    for place in ("cat/0.png", "dog/1.png"):
        (folder / place).parent.mkdir(parents=True)
        (folder / place).write_bytes(encoded_image(0))
    for path in (file, folder):
        for split in (None, "all"):
            rows, found = evaluation_rows(str(path), split)
            assert found == "all" and len(rows) == (3 if path == file else 2)
        assert evaluation_rows(str(path), "train")[1] == "train"  # as the user calls it


@pytest.mark.parametrize(
    "place", ["train/a.parquet", "set/train.parquet", "set/data-train-0.parquet", "set/training/a.parquet"]
)
def test_names_of_files_and_folders_tell_training_data(place, tmp_path):
    path = parquet(tmp_path / place)
    with pytest.raises(ValueError, match="name the one to evaluate on"):
        evaluation_rows(str(tmp_path / place.split("/")[0]))
    if "train" in path.name:
        with pytest.raises(ValueError, match="name the one to evaluate on"):
            evaluation_rows(str(path))


def test_objects_say_what_they_are_of():
    data = images([0, 1, 2, 3])
    assert evaluation_rows(data)[1] == "unknown"
    named = datasets.Dataset.from_dict({"a": [1, 2, 3]}, split="train")
    assert evaluation_rows(named)[1] == "train"
    held_out = named.train_test_split(1, seed=0)["test"]  # `datasets` still calls it "train"
    assert evaluation_rows(held_out, "held out")[1] == "held out"
    answers, _ = evaluate_thresholds(model(), data, PROCESSOR, progress=False)
    assert answers.split == "unknown"
    card = str(model_card(model(), answers.results([0.0]), name="animals"))
    assert "On 4 images of `the dataset` (split unknown), in float32." in card


@pytest.mark.parametrize(
    "split, training",
    [
        *((split, True) for split in ("train", "train[:10%]", "Training", "trainval", "test+train[5:]")),
        *((split, False) for split in ("test", "validation", "all", "unknown", "held out from train")),
    ],
)
def test_what_training_images_are(split, training):
    assert is_training_split(split) == training
    answers = replace(draw(2000, 0), split=split)
    assert calibrate_budget(answers, gmacs=1.5).split == split  # no promise, and so no question
    if not training:
        assert calibrate_risk(answers, 0.02).split == split
        return
    with pytest.raises(ValueError, match="are training images .* no promise follows"):
        calibrate_risk(answers, 0.02)
    found = calibrate_risk(answers, 0.02, allow_training_images=True)
    assert f"The calibration images are training images (split {split!r})" in found.statement


@pytest.mark.parametrize(
    "facts, sentence",
    [
        ({"split": "test", "selected_on": "test"}, "The best epoch was chosen on these images, so the figures are opt"),
        ({"split": "test", "selected_on": "validation"}, "The best epoch was chosen by its accuracy on `validation`."),
        ({"split": "test"}, None),
    ],
)
def test_cards_say_on_what_the_best_epoch_was_chosen(facts, sentence):
    results = {"dataset": "org/animals", "stages": [{"top1": 50.0}] * 3, **facts}
    text = str(model_card(model(), results, name="animals"))
    assert "`org/animals`, split `test`" in text
    assert (sentence or "The best epoch") in text if sentence else "best epoch" not in text.split("## Measured")[1]
