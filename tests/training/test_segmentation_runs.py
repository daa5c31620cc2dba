"""Segmentation models are trained by the same loop: measured, resumed, shared out, started from other models."""

import json

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForSemanticSegmentation, pipeline

from hf_thinkingvit import ThinkingViTForImageClassification
from hf_thinkingvit.training import TrainingRun, parse_config, train
from hf_thinkingvit.training.checkpoints import list_checkpoints
from hf_thinkingvit.training.tasks import training_task
from tests.segmentation_data import CLASSES, encoded, picture, write_scenes
from tests.training.tiny_runs import assert_same, finish, flags, launch, logged_scalars, measured, weights
from tests.utils import tiny_config


TINY = {
    "task": "image-segmentation",
    "label_names": CLASSES,
    "eval_split": "validation",
    "model.decoder_type": "linear",
    "model.position_interpolation": "bilinear",
    "model.hidden_size": 16,
    "model.patch_size": 4,
    "batch_size": 4,
    "learning_rate_batch": 4,
    "learning_rate": 3e-3,
    "label_smoothing": 0,
    "scale_jitter": [0.8, 1.5],
    "eval_batch_size": 2,
}


def words(scenes, folder, **overrides):
    return flags(scenes, folder, **{**TINY, **overrides})


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = words(scenes, folder, epochs=4, images_per_epoch=48, trackers="tensorboard", learning_rate=1e-2)
    return folder, train(parse_config(config))


class TestOutcome:
    def test_learns_and_measures_every_stage(self, run):
        folder, results = run
        assert results == json.loads((folder / "results.json").read_text())
        first, last = (entry["results"]["weights"] for entry in (results["history"][0], results["history"][-1]))
        assert last["mean_iou"][-1] > max(first["mean_iou"][-1], 0.5)
        assert last["images"] == 4 and results["test"]["best"]["images"] == 5
        for measure in ("mean_iou", "overall_accuracy", "per_category_iou"):
            assert len(last[measure]) == 2
        assert len(last["per_category_iou"][0]) == 3

    def test_the_best_epoch_is_that_of_the_greatest_mean_iou(self, run):
        _, results = run
        scores = {entry["step"]: entry["results"][entry["chosen"]]["mean_iou"][-1] for entry in results["history"]}
        assert results["test"]["best"]["step"] == max(scores, key=scores.get)

    def test_is_tracked(self, run):
        folder, results = run
        logged = logged_scalars(folder)
        last = results["history"][-1]
        measured = last["results"]["weights"]["mean_iou"][1]
        assert logged["eval/weights/mean_iou_stage_1"][last["step"]] == pytest.approx(measured)

    def test_evaluation_is_that_of_the_saved_model(self, run, scenes):
        folder, results = run
        last = results["history"][-1]
        model = AutoModelForSemanticSegmentation.from_pretrained(folder / "last")
        again = TrainingRun(
            parse_config(words(scenes, folder, epochs=4, images_per_epoch=48, learning_rate=1e-2, resume="auto"))
        )
        measured = training_task("image-segmentation").evaluate(
            Accelerator(cpu=True), {"model": model}, again.evaluation
        )["model"]
        assert measured["mean_iou"] == pytest.approx(last["results"][last["chosen"]]["mean_iou"])

    def test_the_card_and_the_pipeline(self, run, scenes):
        folder, results = run
        card = (folder / "best" / "README.md").read_text()
        assert "pipeline_tag: image-segmentation" in card and "AutoModelForSemanticSegmentation" in card
        assert "type: mean_iou" in card and "image-classification" not in card
        measured = results["test"]["best"]["mean_iou"][-1]
        assert f"| {100 * measured:.2f} |" in card
        segment = pipeline("image-segmentation", model=str(folder / "best"))
        sides = segment.model.config.training_data["preprocessing"]  # commands resize images alike by default
        assert sides == {"short_side": None, "long_side": None}
        image = datasets.load_dataset(str(scenes), split="test")[0]["image"]
        assert {entry["label"] for entry in segment(image)} <= set(CLASSES)


@pytest.mark.parametrize("stopped_at", [2, 4], ids=["within an epoch", "in the second pass over the data"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(scenes, tmp_path, stopped_at):
    lively = {"epochs": 2, "images_per_epoch": 24, "save_steps": 2, "model.drop_path_rate": 0.2}
    lively |= {"gradient_accumulation_steps": 2, "keep_checkpoints": 9, "warmup_epochs": 0}
    whole = train(parse_config(words(scenes, tmp_path / "whole", **lively)))
    again = tmp_path / "whole" / "checkpoints" / f"step-{stopped_at:08d}"
    assert again in list_checkpoints(tmp_path / "whole" / "checkpoints")
    resumed = train(parse_config(words(scenes, tmp_path / "resumed", resume=again, **lively)))
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "resumed"))
    assert measured(resumed) == measured(whole) and resumed["test"] == whole["test"]


def test_two_processes_are_one(scenes, tmp_path):
    """Five test images are an odd number for two processes, of which none may count twice."""
    fields = {"epochs": 1, "images_per_epoch": 8, "warmup_epochs": 0, "eval_batch_size": 1}
    output = finish(launch(words(scenes, tmp_path / "two", **fields), processes=2))
    assert (tmp_path / "two" / "results.json").exists(), output
    one = train(parse_config(words(scenes, tmp_path / "one", **fields)))
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["processes"] == 2
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "two"), tolerance=1e-5)
    assert two["test"]["last"]["images"] == 5
    assert two["test"]["last"]["mean_iou"] == pytest.approx(one["test"]["last"]["mean_iou"], abs=5e-3)


def test_a_mask_in_which_nothing_counts_is_no_loss(tmp_path):
    scenes = write_scenes(tmp_path / "data", {"train": 4, "validation": 1})
    rows = {"image": [encoded(picture(0)[0])] * 4, "annotation": [encoded(np.full((24, 40), 255, np.uint8))] * 4}
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(scenes / "train.parquet")
    run = TrainingRun(parse_config(words(scenes, tmp_path / "run", epochs=1, warmup_epochs=0)))
    batch = next(iter(run.batches()))
    outputs = run.model.train()(batch["pixel_values"])
    loss, parts = run.loss(outputs, batch["pixel_values"], batch["labels"], 0)
    assert loss.item() == 0.0 and all(part.item() == 0.0 for part in parts.values())
    loss.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in run.model.parameters())


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_wrong_mask_is_named(tmp_path, split):
    scenes = write_scenes(tmp_path / "data", {"train": 4, "validation": 2})
    image, mask = picture(0)
    mask[3, 5] = 77
    rows = {"image": [encoded(image) | {"path": "street.png"}] * 4, "annotation": [encoded(mask)] * 4}
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(scenes / f"{split}.parquet")
    with pytest.raises(
        ValueError, match=r"mask of image street.png .*\[77\] in 1 pixels, the first at row 3, column 5"
    ):
        train(parse_config(words(scenes, tmp_path / "run", epochs=1, warmup_epochs=0)))


def test_starts_from_a_classifier_and_from_itself(scenes, tmp_path):
    sizes = {"thinking_stages": [1, 2], "hidden_size": 16, "num_hidden_layers": 2, "patch_size": 4, "num_labels": 3}
    classifier = ThinkingViTForImageClassification(tiny_config(**sizes))
    classifier.save_pretrained(tmp_path / "classifier")

    def start(source, **overrides):
        fields = {"task": "image-segmentation", "model.image_size": 16, **overrides}
        line = ["--dataset", str(scenes), "--output_dir", str(tmp_path / "run"), "--cpu", "--batch_size", "4"]
        line += ["--mixup", "0", "--cutmix", "0", "--num_workers", "0", "--from_pretrained", str(source)]
        line += ["--label_names", *CLASSES]
        for name, value in fields.items():
            line += [f"--{name}", str(value)]
        run = TrainingRun(parse_config(line))
        return run.accelerator.unwrap_model(run.model)

    model = start(tmp_path / "classifier", **{"model.decoder_type": "linear"})
    layer = "layers.0.attention.o_proj.weight"
    names = [name for name, _ in classifier.thinkingvit.named_parameters() if name.startswith("layers.0")]
    for name in names or [layer]:
        assert torch.equal(model.thinkingvit.get_parameter(name), classifier.thinkingvit.get_parameter(name))
    assert model.config.image_size == 16 and model.config.id2label == dict(enumerate(CLASSES))
    model.save_pretrained(tmp_path / "segmenter")
    assert_same(model.state_dict(), start(tmp_path / "segmenter").state_dict())


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"label_names": []}, "set `label_names`"),
        ({"mask_values": ["1-2"]}, "3 classes, but 2 values"),
        ({"interpolation": "bicubic"}, "resizes images bilinearly"),
        ({"streaming": True}, "must not be a stream"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(scenes, tmp_path, overrides, message):
    line = words(scenes, tmp_path / "run", **{name: value for name, value in overrides.items() if value})
    config = parse_config(line)
    config.label_names = overrides.get("label_names", config.label_names)
    with pytest.raises(ValueError, match=message):
        TrainingRun(config)
    assert not (tmp_path / "run").exists()


def test_settings_of_classification_are_refused(scenes, tmp_path, capsys):
    for name, value, said in (
        ("mixup", "0.5", "`--mixup`, `--cutmix`, `--probe-images` and `--teacher` are of image-classification"),
        ("model_type", "avit", "A-ViT"),
    ):
        with pytest.raises(SystemExit):
            parse_config([*words(scenes, tmp_path), f"--{name}", value])
        assert said in capsys.readouterr().err
