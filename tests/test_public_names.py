"""Shared files contain no paths, users or names of the machine they were made on (ONNX: tests/inference)."""

import getpass
import json
import os
import runpy
import shutil
import socket
import sys
from pathlib import Path

import pytest

from hf_thinkingvit.conversion import convert_checkpoint
from hf_thinkingvit.evaluation import calibrate_budget, evaluate_thresholds
from hf_thinkingvit.evaluation.plots import plot_accuracy_against_macs, save_figure
from hf_thinkingvit.hub import push
from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.public_names import public_name, public_text
from tests.training.tiny_runs import LABELS, flags, write_images
from tests.utils import FIXTURES, lively_model


EXAMPLES = Path(__file__).parents[1] / "examples"
FOLDER = "secret-place"  # in the path of everything that is read and written here


@pytest.mark.parametrize(
    "dataset, name",
    [
        ("uoft-cs/cifar10", "uoft-cs/cifar10"),
        ("cifar10", "cifar10"),
        ("sklearn-digits", "sklearn-digits"),
        ("/home/ada/data/cifar10", "cifar10"),
        ("/home/ada/data/cifar10/", "cifar10"),
        ("./cifar10", "cifar10"),
        ("../data/cifar10", "cifar10"),
        ("~/data/cifar10", "cifar10"),
        ("~ada/cifar10", "cifar10"),
        ("data/of/mine.parquet", "mine.parquet"),
        (Path("data/mine.parquet"), "mine.parquet"),
        (r"C:\Users\ada\cifar10", "cifar10"),
        ("C:/Users/ada/cifar10/", "cifar10"),
        (r"\\server\share\cifar10", "cifar10"),
        (r".\cifar10", "cifar10"),
        ("file:///home/ada/cifar10/", "cifar10"),
        ("hf://datasets/org/name@main/data/train.parquet", "org/name"),
        ("https://huggingface.co/datasets/org/name/resolve/main/x.parquet", "org/name"),
        ("https://ada:hf_token@example.org/data/mine.parquet?token=hf_token#x", "mine.parquet"),
        ("zip://inner.csv::https://ada:pw@example.org/all.zip?key=1", "all.zip"),
        ("s3://bucket/key/mine.parquet", "mine.parquet"),
        *((home, "the dataset") for home in ("~", "~/", "/home/ada", "/Users/ada/", r"C:\Users\ada", "/", "C:\\")),
        ("https://ada:pw@example.org", "the dataset"),
        *(
            (home, "the dataset")
            for home in ("/mnt/c/Users/ada", "/export/home/ada/", "/homes/ada", "//server/Users/ada")
        ),
        *(
            (home, "the dataset")
            for home in (r"\\server\Users\ada", r"\\server\share\home\ada", "s3://bucket/home/ada")
        ),
        ("/mnt/c/Users/ada/cifar10", "cifar10"),
    ],
)
def test_a_name_that_may_be_shared(dataset, name):
    assert public_name(dataset) == name
    assert public_name(name) == name


def test_what_exists_here_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert public_name("ada/cifar10") == "ada/cifar10"
    (tmp_path / "ada" / "cifar10").mkdir(parents=True)
    assert public_name("ada/cifar10") == "cifar10"
    monkeypatch.chdir(tmp_path / "ada")
    assert public_name(".") == "ada"
    monkeypatch.setenv("HOME", str(tmp_path / "ada"))
    assert public_name(".") == public_name(str(tmp_path / "ada")) == "the dataset"


def assert_nothing_leaks(folder: Path) -> set[str]:
    """Assert that no file under `folder` contains the path, this user or this machine; returns the file names."""
    secrets = [FOLDER, str(Path.home()), socket.gethostname(), os.environ.get("USER", ""), _user()]
    secrets = [secret.encode() for secret in secrets if len(secret) > 3 and secret not in ("root", "/root")]
    secrets += [secret.replace(b"/", rb"\/") for secret in secrets]
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        content = path.read_bytes()
        for secret in secrets:
            assert secret not in content, f"{path.name} holds {secret.decode()}"
    return {path.name for path in files}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name
        return ""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images, a model and all outputs in a folder whose name no file may contain."""
    place = tmp_path_factory.mktemp("leaks") / FOLDER
    (place / "images").mkdir(parents=True)
    write_images(place / "images", num_train=16, num_test=12)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: index for index, label in enumerate(LABELS)}}
    lively_model(thinking_stages=[1, 4], num_hidden_layers=1, num_labels=3, **names).save_pretrained(place / "model")
    evaluation_image_processor(32).save_pretrained(place / "model")
    return place


def run(script: str, monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def test_from_the_sweep_to_the_hub(place, monkeypatch):
    pytest.importorskip("matplotlib")
    common = ["--dataset", f"{place / 'images'}/"]
    run("sweep_thresholds.py", monkeypatch, "--model", place / "model", "--output-dir", place / "sweep", *common)
    words = ["--model", place / "model", "--gmacs", "0.0002", "--output-dir", place / "calibrated", *common]
    run("calibrate.py", monkeypatch, *words)
    results = json.loads((place / "sweep" / "results.json").read_text())
    results["calibration"] = json.loads((place / "calibrated" / "calibration.json").read_text())
    (place / "sweep" / "results.json").write_text(json.dumps(results))
    words = ["--model", place / "calibrated", "--repo-id", "org/name", "--results", place / "sweep" / "results.json"]
    words += ["--datasets", place / "images", "--dry-run", place / "push"]
    run("push_to_hub.py", monkeypatch, *words)
    assert "calibration.json" in assert_nothing_leaks(place / "calibrated")
    assert "sweep.svg" in assert_nothing_leaks(place / "sweep")
    assert {"README.md", "config.json", "results.json", "sweep.png"} <= assert_nothing_leaks(place / "push")
    card = (place / "push" / "README.md").read_text(encoding="utf-8")
    assert "12 images of `images`, split `test`, in float32" in card and "within 0.0002" in card
    assert results["dtype"] == results["calibration"]["conditions"]["dtype"] == "float32"


def test_what_former_versions_wrote_is_mended(place, tmp_path):
    """Their configurations and results contain paths of datasets."""
    model = lively_model(thinking_stages=[2, 4], threshold=0.5)
    old = {"threshold": 0.5, "dataset": str(place / "images"), "statement": "On 3 images.", "images": 3}
    model.config.calibration = old
    results = {"dataset": str(place / "images"), "calibration": old, "stages": [{"top1": 1.0}, {"top1": 2.0}]}
    push(model, evaluation_image_processor(32), "org/name", results=results, dry_run=tmp_path / "push")
    assert "results.json" in assert_nothing_leaks(tmp_path / "push")


@pytest.mark.parametrize(
    "text, public",
    [
        ("/home/ada/val", "val"),
        ("/home/ada/my data/val", "val"),
        ("~/val", "val"),
        (r"C:\Users\ada\val", "val"),
        ("`/home/ada/imagenet`, split `train`, 12 images", "`imagenet`, split `train`, 12 images"),
        ("distilled from /home/ada/teacher, 3 epochs", "distilled from teacher, 3 epochs"),
        ("see file:///home/ada/log and https://ada:pw@example.org/x", "see log and x"),
        ("https://example.org/x?token=hf_x", "x"),
        *(
            (text, text)
            for text in (
                *("test", "train[:10%]", "images/s", "3 of 3, 12 optimizer steps", "0.1 / 2", "org/teacher", "and/or"),
                *("https://arxiv.org/abs/2012.12877", "see https://example.org/a/b for more", "τ = 0.5: on 3 images."),
            )
        ),
    ],
)
def test_a_text_that_may_be_shared(text, public):
    assert public_text(text) == public == public_text(public)


def test_paths_in_results_are_not_published(place, tmp_path):
    """In any field: the split, the description of the training, and the user's own fields."""
    model = lively_model(thinking_stages=[2, 4])
    here = str(place / "images")
    results = {
        "dataset": here,
        "split": f"{here}/val",
        "selected_on": here,
        "stages": [{"top1": 1.0}, {"top1": 2.0}],
        "training": {"data": here, "teacher": place / "model", "notes": [f"from {here}, twice"], "epochs": 3},
        "environment": {"log": f"{place}/log.txt"},
    }
    push(model, evaluation_image_processor(32), "org/name", results=results, dry_run=tmp_path / "push")
    assert "results.json" in assert_nothing_leaks(tmp_path / "push")
    published = json.loads((tmp_path / "push" / "results.json").read_text(encoding="utf-8"))
    told = {"data": "images", "teacher": "model", "notes": ["from images, twice"], "epochs": 3}
    assert (published["split"], published["training"]) == ("val", told)


def test_names_given_by_hand(place, tmp_path):
    """Calibrations and results that are built without the scripts follow the same rule."""
    model = lively_model(thinking_stages=[1, 4], num_labels=3)
    processor = evaluation_image_processor(32)
    answers, rows = evaluate_thresholds(
        model, str(place / "images"), processor, [0.0, 1.0], label_map="index", progress=False
    )
    assert answers.dataset == "images"
    pytest.importorskip("matplotlib")
    save_figure(plot_accuracy_against_macs(answers, rows), tmp_path / "plot.png")
    calibrate_budget(answers, gmacs=1.0).apply(model)
    model.save_pretrained(tmp_path / "model")
    assert {"plot.svg", "config.json"} <= assert_nothing_leaks(tmp_path)


def test_training(place):
    pytest.importorskip("timm")
    from hf_thinkingvit.training import parse_config, train

    train(parse_config(flags(place / "images", place / "run", epochs=1, warmup_epochs=0)))
    for folder in ("best", "last"):
        assert {"README.md", "config.json"} <= assert_nothing_leaks(place / "run" / folder)
    assert "`images`, split `train`, " in (place / "run" / "best" / "README.md").read_text(encoding="utf-8")


def test_conversion(place):
    shutil.copytree(FIXTURES / "thinkingvit_2stage", place / "source")
    convert_checkpoint(place / "source", place / "converted")
    assert "config.json" in assert_nothing_leaks(place / "converted")
