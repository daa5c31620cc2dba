"""The split that is evaluated, and that training images allow no promise."""

import os
from dataclasses import replace

import datasets
import pytest

from hf_thinkingvit.evaluation import calibrate_budget, calibrate_risk, evaluate_thresholds, splits
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
        with pytest.raises(ValueError, match="none of the splits validation, test, val, only train.*: name the one"):
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


def test_data_without_splits_are_all_of_them(tmp_path):
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
        assert evaluation_rows(str(path), "train")[1] == "train"  # as the user named it


@pytest.mark.parametrize(
    "place",
    [
        *("train/a.parquet", "set/train.parquet", "set/data-train-0.parquet", "set/training/a.parquet"),
        *(
            "Train/a.parquet",
            "TRAIN/a.parquet",
            "trainset/a.parquet",
            "traindata/a.parquet",
            "set/train_images/a.parquet",
        ),
        *(
            "set/data/Train-0.parquet",
            "pets_train/a.parquet",
            "set/cifar10-train.parquet",
            "set/Train2017/a.parquet",
            "set/images/Training/a.parquet",
        ),
        *(
            "set/train-00000-of-00002.parquet",
            "set/pets-train-0.parquet",
            "set/pets-train-00000-of-00001-0123456789abcdef.parquet",
        ),
    ],
)
def test_names_of_files_and_folders_tell(place, tmp_path):
    path = parquet(tmp_path / place)
    with pytest.raises(ValueError, match="only train .* says training images.*: name the one to evaluate on"):
        evaluation_rows(str(tmp_path / place.split("/")[0]))
    with pytest.raises(ValueError, match="name the one to evaluate on"):
        evaluation_rows(str(path))  # named after training by itself, or by a folder that holds it
    link = tmp_path / "link"
    link.symlink_to(path.parent)
    with pytest.raises(ValueError, match="name the one to evaluate on"):
        evaluation_rows(str(link))


@pytest.mark.parametrize(
    "place",
    [
        *("strain", "restrained", "constraints", "trains", "trainers", "Testing", "val_set"),
        *("Trainspotting", "trainstation", "toyTrain", "Training shoes", "Bullet Train"),
    ],
)
def test_other_words_tell_nothing(place, tmp_path):
    path = tmp_path / place / "photographs"
    parquet(path / "a.parquet")
    assert evaluation_rows(str(path))[1] == "all"


def test_who_asks_for_all_gets_all(tmp_path):
    path = parquet(tmp_path / "train" / "photographs" / "a.parquet").parent
    with pytest.raises(ValueError, match=r"'train' says training images.*`split=\"all\"` \(`--split all`\)"):
        evaluation_rows(str(path))
    assert evaluation_rows(str(path), "all")[1] == "all"
    file = parquet(tmp_path / "set" / "train.parquet")
    assert evaluation_rows(str(file), "all")[1] == evaluation_rows(str(file.parent), "all")[1] == "all"


@pytest.mark.parametrize(
    "place", ["in_training/val", "run/train_val_split/val", "training/x/y", "train/Testing", "train/val_images"]
)
def test_folders_further_up_and_above_held_out_images_tell_nothing(place, tmp_path):
    path = parquet(tmp_path / place / "a.parquet").parent
    assert evaluation_rows(str(path))[1] == "all"


@pytest.mark.parametrize(
    "classes",
    [
        ("Bullet Train", "Sports Car", "Test Tube"),
        ("Bullet Train", "Sports Car"),
        ("Trainspotting", "trainstation", "toyTrain", "Training shoes", "Evaluation board", "Valley", "Devil"),
    ],
)
def test_classes_are_no_splits(classes, tmp_path):
    for name in classes:
        (tmp_path / "things" / name).mkdir(parents=True)
        (tmp_path / "things" / name / "0.png").write_bytes(encoded_image(0))
    for split in (None, "all", "train"):
        rows, found = evaluation_rows(str(tmp_path / "things"), split)
        assert (len(rows), found) == (len(classes), split or "all")


@pytest.mark.parametrize("names", [("Training", "Testing"), ("Train", "Test", "Valid"), ("trainset", "testset")])
def test_splits_that_were_merged_are_refused(names, tmp_path):
    """`datasets` reads these as one split, which would be evaluated, and calibrated on, as a whole."""
    for name in names:
        for label in ("cat", "dog"):
            (tmp_path / name / label).mkdir(parents=True)
            (tmp_path / name / label / "0.png").write_bytes(encoded_image(0))
    rows, split = evaluation_rows(str(tmp_path), "all")  # as the user asked
    assert (len(rows), split) == (2 * len(names), "all")
    for split in (None, "train"):
        with pytest.raises(ValueError, match=rf"several splits \(.*{names[1]}.*\).* Give the one folder"):
            evaluation_rows(str(tmp_path), split)
    rows, split = evaluation_rows(str(tmp_path / names[1]))
    assert (len(rows), split) == (2, "all")


def test_folders_of_many_images_are_not_listed(tmp_path, monkeypatch):
    for index in range(200):
        path = tmp_path / "animals" / "cat" / "indoors" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded_image(0))
    seen = []
    scandir = os.scandir
    monkeypatch.setattr(splits.os, "scandir", lambda path: seen.append(str(path)) or scandir(path))
    assert splits._says_train(str(tmp_path / "animals")) is None
    assert seen == [str(tmp_path / "animals"), str(tmp_path / "animals" / "cat")]


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
    assert calibrate_budget(answers, gmacs=1.5).split == split  # a budget promises nothing, so any split is accepted
    if not training:
        found = calibrate_risk(answers, 0.02)
        assert found.split == split
        assumed = "provided that the model was not trained on them, nor its epoch chosen by them"
        assert (assumed in found.statement) == (split in ("all", "unknown"))
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
