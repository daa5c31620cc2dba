"""Images recorded as used to make a model are not evaluated on by default, and allow no promise."""

import datasets
import pytest
from transformers import AutoModelForImageClassification

from hf_thinkingvit.evaluation import calibrate_budget, calibrate_risk, calibration_status, evaluate_thresholds
from hf_thinkingvit.evaluation.splits import same_data, why_not_new
from hf_thinkingvit.hub import model_card
from tests.evaluation.test_calibration import draw
from tests.evaluation.test_conditions import PROMISE, answers_of, calibrated, card
from tests.evaluation.test_sweep import PROCESSOR, images, model


def record(selected_on: str, dataset: str = "org/animals") -> dict[str, str]:
    return {"dataset": dataset, "split": "train", "selected_on": selected_on}


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "animals"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        images([0, 1, 2]).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.mark.parametrize(
    "recorded, default",
    [
        (None, "validation"),
        (record("validation"), "test"),
        (record("test"), "validation"),
        (record("held out from train"), "validation"),
        (record("validation", dataset="org/plants"), "validation"),
    ],
)
def test_by_default_images_that_are_new_to_the_model(animals, recorded, default):
    network = model()
    if recorded:
        network.config.training_data = recorded
    answers, _ = evaluate_thresholds(network, str(animals), PROCESSOR, progress=False)
    assert (answers.split, answers.seen) == (default, None)


def test_images_that_chose_the_epoch_are_remembered(animals):
    network = model()
    network.config.training_data = record("validation")
    answers, _ = evaluate_thresholds(network, str(animals), PROCESSOR, split="validation", progress=False)
    assert answers.select(answers.top1[:, 0] | True).seen == answers.seen
    assert answers.seen == "the best epoch of the model was chosen by split 'validation' of data called `org/animals`"
    (animals / "test.parquet").rename(animals.parent / "test.parquet")
    try:  # there is no other split to evaluate on
        assert evaluate_thresholds(network, str(animals), PROCESSOR, progress=False)[0].seen == answers.seen
    finally:
        (animals.parent / "test.parquet").rename(animals / "test.parquet")


@pytest.mark.parametrize(
    "split, part",
    [
        *((split, "chosen by") for split in ("validation", "validation[:50%]", "test+Validation[10:]")),
        *((split, "trained on") for split in ("train", "train[:9]", "all", "unknown", "test+train")),
        *((split, None) for split in ("test", "val", "test[:50%]")),
    ],
)
def test_which_images_are_not_new(split, part):
    for dataset in ("org/animals", "/data/animals", "other/Animals"):
        seen = why_not_new(record("validation"), dataset, split)
        assert (seen is None) == (part is None) and (seen is None or part in seen)
    assert why_not_new(record("validation"), "org/plants", split) is None
    assert why_not_new(None, "org/animals", split) is None


@pytest.mark.parametrize(
    "recorded, dataset, same",
    [
        *(("собаки", "/data/кошки", False), ("собаки", "/data/собаки", True), ("org/animals", "动物", False)),
        *(("—", "/data/…", False), ("—", "/data/—", False)),
        # Generic names: a path of the same name matches, but not a Hub id that ends in it.
        *(("images", "/other/images", True), ("data", "data", True), ("data", "org/data", False)),
        *(("imagefolder", "/a/imagefolder", True), ("org/data", "/a/data", False), ("org/data", "ada/data", False)),
        *(("org/data", "org/data", True), ("train.parquet", "/a/train.parquet", True)),
        *(("test_images", "/a/other_images", False), ("animals", "/a/Animals", True), ("testudo", "/a/testudo", True)),
    ],
)
def test_names_that_tell_data_apart(recorded, dataset, same):
    assert same_data(recorded, dataset) == same


def test_objects_are_known_by_what_they_were_loaded_from(animals):
    loaded = datasets.load_dataset(str(animals), split="validation")
    network = model()
    network.config.training_data = record("validation")
    assert "chosen by" in evaluate_thresholds(network, loaded, PROCESSOR, progress=False)[0].seen
    unnamed = images([0, 1])
    assert evaluate_thresholds(network, unnamed, PROCESSOR, progress=False)[0].seen is None


def test_no_promise_from_images_that_chose_the_epoch():
    seen = why_not_new(record("validation"), "org/animals", "validation")
    answers = type(draw(9, 0))(**{**vars(draw(2000, 0)), "split": "validation", "seen": seen})
    assert calibrate_budget(answers, gmacs=1.5).seen == seen  # a budget promises nothing, so any images are accepted
    with pytest.raises(ValueError, match="not new to the model: the best epoch of the model was chosen .* pass `allow"):
        calibrate_risk(answers, 0.02)
    found = calibrate_risk(answers, 0.02, allow_training_images=True)
    assert f"not new to the model ({seen}); for others this promises nothing." in found.statement
    assert found.to_dict()["seen"] == seen


def test_the_record_is_no_condition(tmp_path):
    network = calibrated()
    network.config.training_data = record("test")
    network.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.training_data == record("test")
    assert calibration_status(loaded, loaded.config.calibration).holds and PROMISE in card(loaded)


@pytest.mark.parametrize("said_by", ["configuration", "results", "calibration"])
def test_cards_promise_nothing_from_images_that_chose_the_epoch(said_by):
    network = calibrated()  # on split "validation" of org/animals
    results = {"dataset": "org/animals", "split": "validation", "stages": [{"top1": 50.0}] * 2}
    if said_by == "configuration":
        network.config.training_data = record("validation")
    elif said_by == "results":
        results["selected_on"] = "validation"
    else:
        network.config.calibration["seen"] = "the best epoch of the model was chosen by split 'validation'"
    text = str(model_card(network, results, name="animals"))
    assert PROMISE not in text and "This holds if" not in text
    assert "not new to the model: the best epoch of the model was chosen by split 'validation'" in text
    assert ("The best epoch was chosen on these images" in text) == (said_by != "calibration")
    assert "\n\n\n" not in text
    other = {**results, "selected_on": "test", "split": "test"}
    assert (PROMISE in str(model_card(calibrated(), other, name="animals"))) and answers_of(network).seen is None
