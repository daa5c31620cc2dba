"""Slices and sums of splits, missing data, and warnings of evaluation on training images."""

import datasets
import pytest

from hf_thinkingvit.data import find_split, load_splits, num_shared_rows
from hf_thinkingvit.evaluation import evaluate_thresholds
from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.public_names import is_missing_path
from hf_thinkingvit.training import parse_config
from tests.training.tiny_runs import flags, write_images
from tests.utils import lively_model


SPLITS = {
    "train": datasets.Dataset.from_dict({"row": list(range(10))}),
    "test": datasets.Dataset.from_dict({"row": list(range(100, 104))}),
}


@pytest.mark.parametrize(
    "name, rows",
    [
        ("train[:80%]", range(8)),
        ("train[80%:]", (8, 9)),
        ("train[2:4]", (2, 3)),
        ("test+train[:1]", (100, 101, 102, 103, 0)),
        ("test", range(100, 104)),
    ],
)
def test_slices(name, rows):
    assert find_split(SPLITS, name, "data")["row"][:] == list(rows)


@pytest.mark.parametrize("name", ["validation[:10%]", "train[:many]", "train[", "val"])
def test_slices_that_do_not_exist(name):
    with pytest.raises(ValueError, match=r"has no split .*: it has \['train', 'test'\]"):
        find_split(SPLITS, name, "data")


def test_a_stream_cannot_be_sliced():
    streams = {name: rows.to_iterable_dataset() for name, rows in SPLITS.items()}
    assert find_split(streams, "test", "data") is streams["test"]
    with pytest.raises(ValueError, match="download the data instead"):
        find_split(streams, "train[:80%]", "data")


def test_shared_rows():
    assert num_shared_rows(SPLITS, "train[:80%]", "train[80%:]") == 0
    assert num_shared_rows(SPLITS, "train[:80%]", "train[70%:]+test") == 1
    assert num_shared_rows(SPLITS, "train", "test") == 0


def test_missing_paths_are_not_looked_up_on_the_hub(tmp_path):
    for name in ("./photos", "photos/", "~/photos", "a/b/photos", str(tmp_path / "photos")):
        assert is_missing_path(name)
    assert not any(map(is_missing_path, ("uoft-cs/cifar10", "photos", str(tmp_path), "hf://datasets/org/name")))
    with pytest.raises(ValueError, match="no such file or folder"):
        load_splits(str(tmp_path / "photos"))
    with pytest.raises(ValueError, match="is empty"):
        load_splits(str(tmp_path))


def test_evaluation_on_training_images_warns(tmp_path, caplog):
    images = write_images(tmp_path, num_train=4, num_test=4)
    names = {"id2label": dict(enumerate(["cat", "dog", "owl"])), "label2id": {"cat": 0, "dog": 1, "owl": 2}}
    model = lively_model(num_labels=3, **names)
    arguments = (model, str(images), evaluation_image_processor(32))
    evaluate_thresholds(*arguments, split="test", progress=False)
    assert not caplog.messages
    answers, _ = evaluate_thresholds(*arguments, split="train[:75%]", progress=False)
    assert len(answers) == 3
    assert "are not new to the model (they are called training images)" in caplog.text


def test_a_run_that_is_evaluated_on_what_it_is_trained_on_warns(tmp_path, caplog):
    pytest.importorskip("timm")
    from hf_thinkingvit.training.data import load_data

    images = write_images(tmp_path, num_train=20, num_test=4)
    words = flags(images, tmp_path / "run", train_split="train[:80%]")
    data = load_data(parse_config([*words, "--eval_split", "train[80%:]"]))
    assert (len(data.train.rows), len(data.evaluation.rows)) == (16, 4) and not caplog.messages
    load_data(parse_config([*words, "--eval_split", "train[75%:]"]))
    assert "1 images are both in 'train[:80%]'" in caplog.text
