"""Fine-tuning in one call, on a tiny model and random images."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    pipeline,
)

from hf_thinkingvit.evaluation import calibration_status, evaluate_thresholds
from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.training import TrainingConfig, finetune
from hf_thinkingvit.training.finetuning import choose_model
from hf_thinkingvit.training.finetuning_plan import find_source, settings_for
from hf_thinkingvit.training.loop import TrainingRun
from tests.utils import lively_model


SHORT = {"epochs": 2, "cpu": True, "num_workers": 0}
ONE_EPOCH = {**SHORT, "epochs": 1}
LABELS = ["blue", "red"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    lively_model(thinking_stages=[1, 2], hidden_size=16, num_hidden_layers=1).save_pretrained(folder)
    evaluation_image_processor(32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder a label, of reddish and bluish noise."""
    folder, draw = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for label, channel in (("red", 0), ("blue", 2)):
        (folder / label).mkdir(parents=True)
        for index in range(20):
            pixels = draw.integers(0, 128, (20, 24, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(folder / label / f"{index:02d}.png")
    (folder / "red" / ".hidden.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def done(photos, source, tmp_path_factory):
    return finetune(photos, source, tmp_path_factory.mktemp("run") / "out", seed=3, **SHORT)


def test_the_folder_is_a_calibrated_model_with_its_reports(done):
    model = AutoModelForImageClassification.from_pretrained(done.folder)
    assert list(model.config.id2label.values()) == LABELS
    assert model.config.threshold == done.calibration.threshold
    assert calibration_status(model, model.config.calibration).holds
    results = json.loads((done.folder / "results.json").read_text())
    assert len(results["stages"]) == 2 and results["images"] == 4
    shares = [row["exit_shares"] for row in results["sweep"]]
    assert all(one != other for one, other in pairwise(shares))
    assert results["at_threshold"] in results["sweep"]  # at the τ that is shipped
    card = (done.folder / "README.md").read_text()
    assert "4 images of `photos`" in card and "the other half of the images held out from train" in card
    assert "too few" not in card and "With probability" not in card  # 4 images promise nothing
    assert "(as configured)" in card
    assert f"τ = {done.calibration.threshold:.4g} was chosen on these images or some of them" in card
    assert "τ is the one of greatest accuracy on 8 images" in card and "promises nothing for others" in card
    assert "They are not new to the model either: half of them chose its best epoch" in card
    assert (
        "promises nothing for others" in done.summary
        and "τ was chosen on these images" in done.summary
        and str(done.folder) in done.summary
    )
    image = Image.new("RGB", (24, 20), (200, 0, 0))
    assert pipeline("image-classification", model=str(done.folder))(image)[0]["label"] in LABELS


def test_held_out_images_are_recorded_and_not_trained_on(done, photos, source, tmp_path):
    record = json.loads((done.folder / "splits.json").read_text())
    held_out = record["selects"] + record["calibrates"]
    assert len(set(held_out)) == 8 and all((photos / name).is_file() for name in held_out)
    assert sum(name.startswith("red/") for name in record["calibrates"]) == 2  # stratified
    assert sum(name.startswith("red/") for name in record["selects"]) == 2
    again = finetune(photos, source, tmp_path / "out", **{**SHORT, "epochs": 1, "seed": 4})
    assert json.loads((again.folder / "splits.json").read_text()) == record  # whatever the seed
    facts = again.model.config.training_data
    assert facts["split"] == "train" and facts["selected_on"] == record["selected_on"]


def test_a_promise_where_there_are_enough_images(photos, source, tmp_path):
    """And data as objects, with a test split, which is what is reported."""
    rows = datasets.load_dataset("imagefolder", data_dir=str(photos), split="train")
    splits = rows.train_test_split(0.25, seed=0, stratify_by_column="label")
    done = finetune(splits, source, tmp_path, held_out=0.4, max_drop=0.5, delta=0.1, **ONE_EPOCH)
    assert done.calibration.epsilon == 0.5 and done.calibration.images == 6
    assert "With probability at least 90%" in done.summary
    assert done.results["split"] == "test" and done.results["images"] == 10
    assert "was chosen on these images" not in (tmp_path / "README.md").read_text() + done.summary
    assert json.loads((tmp_path / "splits.json").read_text())["selects"][0].startswith("sha256:")


def test_images_that_the_source_was_trained_on_promise_nothing(photos, source, tmp_path):
    finetune(photos, source, tmp_path / "once", **ONE_EPOCH)
    options = {**SHORT, "epochs": 1, "held_out": 0.4, "max_drop": 0.5, "delta": 0.1}
    done = finetune(photos, tmp_path / "once", tmp_path / "again", **options)
    assert "With probability" not in done.summary and "of the source, the model was trained on" in done.summary


def test_splits_that_share_images_are_refused(photos, source, tmp_path):
    with pytest.raises(ValueError, match="images are both in 'train' and in 'train', which is trained on"):
        finetune(photos, source, tmp_path / "out", eval_split="train")
    assert not (tmp_path / "out").exists()


def test_a_run_that_goes_on_must_hold_out_the_same_images(photos, source, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    finetune(folder, source, tmp_path / "out", **ONE_EPOCH)
    record = (tmp_path / "out" / "splits.json").read_text()
    for name in json.loads(record)["selects"]:
        (folder / name).rename((folder / name).with_suffix(".PNG.png"))
    with pytest.raises(ValueError, match="The images have changed since this run began"):
        finetune(folder, source, tmp_path / "out", **{**SHORT, "epochs": 1, "resume": "auto"})
    assert (tmp_path / "out" / "splits.json").read_text() == record


def test_a_plain_vit_becomes_the_last_stage(photos, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64}
    vit = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=16, num_labels=7))
    vit.save_pretrained(tmp_path / "vit")
    evaluation_image_processor(32).save_pretrained(tmp_path / "vit")
    done = finetune(photos, tmp_path / "vit", tmp_path / "out", **ONE_EPOCH)
    assert list(done.model.config.thinking_stages) == [2, 4] and done.model.config.hidden_size == 32


def test_a_model_without_stages_has_no_threshold(photos, tmp_path):
    folder = "tests/fixtures/saved_models/avit"
    source = AutoModelForImageClassification.from_pretrained(folder)
    source.save_pretrained(tmp_path / "avit")
    evaluation_image_processor(source.config.image_size).save_pretrained(tmp_path / "avit")
    done = finetune(photos, tmp_path / "avit", tmp_path / "out", **ONE_EPOCH)
    assert done.calibration is None and 0 <= done.results["top1"] <= 100


def test_what_cannot_be_used_is_said_before_anything_is_trained(photos, source, tmp_path):
    with pytest.raises(ValueError, match="no argument `epoch`"):
        finetune(photos, source, tmp_path / "out", epoch=3)
    with pytest.raises(ValueError, match="no argument `from_vit`"):
        finetune(photos, source, tmp_path / "out", from_vit="x")
    with pytest.raises(ValueError, match="`held_out` must be above 0"):
        finetune(photos, source, tmp_path / "out", held_out=1.0)
    with pytest.raises(ValueError, match="no such file or folder"):
        finetune(tmp_path / "absent", source, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no file or folder here"):
        finetune(photos, tmp_path / "absent", tmp_path / "out")
    shutil.copytree(source, tmp_path / "run" / "best")
    with pytest.raises(FileNotFoundError, match="Did you mean `.*best`"):
        finetune(photos, tmp_path / "run", tmp_path / "out")
    with pytest.raises(ValueError, match="have no labels: put them into folders, one a label"):
        finetune(photos / "red", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "best, last, images, chosen",
    [
        (90, 85, 20, "last"),
        (90, 85, 2000, "best"),
        (90, 90, 2000, "last"),
        (100, 75, 4, "last"),
        (100, 95, 20, "last"),
        (100, 75, 20, "best"),
    ],
)
def test_an_earlier_epoch_must_be_clearly_better(best, last, images, chosen, tmp_path):
    (tmp_path / "best").mkdir()
    entries = ((1, best), (2, last))
    history = [
        {"step": step, "chosen": "ema", "results": {"ema": {"top1": [0.0, top1], "images": images}}}
        for step, top1 in entries
    ]
    run = SimpleNamespace(history=history, progress=SimpleNamespace(best_step=1), output_dir=tmp_path)
    assert choose_model(run) == chosen


def test_official_checkpoints_are_converted(tmp_path):
    fields = find_source("tests/fixtures/thinkingvit_2stage", tmp_path / "converted")
    assert fields == {"model_type": "thinkingvit", "from_pretrained": str(tmp_path / "converted")}
    assert (tmp_path / "converted" / "config.json").is_file()


@pytest.mark.parametrize("num_images", [50, 160, 1000, 5000, 50_000])
@pytest.mark.parametrize("model_type", ["thinkingvit", "avit"])
def test_settings_for_few_and_many_images(num_images, model_type):
    settings = settings_for(num_images, model_type, False, {})
    TrainingConfig(**settings, model_type=model_type).check()
    assert settings["batch_size"] <= num_images / 4 and settings["warmup_epochs"] <= 0.2 * settings["epochs"]
    steps = settings["epochs"] * (num_images // settings["batch_size"])
    assert 100 <= steps < 5000
    assert 1 / (1 - settings["ema_decay"]) == pytest.approx(steps / 10, rel=0.01)


def test_settings_follow_those_that_are_given():
    settings = settings_for(1000, "thinkingvit", False, {"epochs": 2, "batch_size": 100})
    assert "epochs" not in settings and settings["warmup_epochs"] == 0.2 and settings["learning_rate_batch"] == 100
    assert settings["ema_decay"] == 0.5  # 20 steps


def test_images_that_cannot_be_read_are_left_out_before_training(photos, source, tmp_path, capsys):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    record = json.loads((finetune(folder, source, tmp_path / "whole", **ONE_EPOCH).folder / "splits.json").read_text())
    broken = [record["selects"][0], record["calibrates"][0]]
    for name in broken:
        (folder / name).write_bytes(b"no image")
    capsys.readouterr()
    done = finetune(folder, source, tmp_path / "out", **ONE_EPOCH)
    started = capsys.readouterr().out
    assert "left out      2 images that cannot be decoded" in started and Path(broken[0]).name in started
    assert "left out      2 images" in done.summary and done.results["images"] == 3
    left = json.loads((done.folder / "splits.json").read_text())
    assert set(left["selects"] + left["calibrates"]) == set(record["selects"] + record["calibrates"]) - set(broken)


def test_a_finished_run_is_not_lost_when_its_evaluation_fails(photos, source, tmp_path):
    """Here an image becomes unreadable during the training, and is restored afterwards."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    finetune(folder, source, tmp_path / "first", **ONE_EPOCH)
    name = json.loads((tmp_path / "first" / "splits.json").read_text())["calibrates"][0]
    content, train = (folder / name).read_bytes(), TrainingRun.run

    def run(self):
        results = train(self)
        (folder / name).write_bytes(b"no image")
        return results

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainingRun, "run", run)
        with pytest.raises(ValueError, match="What was trained is not lost: .* `resume='auto'` goes on"):
            finetune(folder, source, tmp_path / "out", **ONE_EPOCH)
    (folder / name).write_bytes(content)
    done = finetune(folder, source, tmp_path / "out", resume="auto", **ONE_EPOCH)
    assert done.results["images"] == 4 and (done.folder / "model.safetensors").is_file()


def test_what_is_said_of_the_images_at_the_start(photos, source, tmp_path, capsys):
    finetune(photos, source, tmp_path, **ONE_EPOCH)
    printed = capsys.readouterr().out
    half, other = (f"{which} of the images held out from train" for which in ("one half", "the other half"))
    assert f"the best epoch is chosen by `{half}`; `{other}` is measured once, at the end" in printed
    assert f"chosen by     {half} (4 images)" in printed and f"τ by          {other} (4 images)" in printed


def test_runs_of_one_process_may_differ_in_precision(photos, source, tmp_path):
    finetune(photos, source, tmp_path / "bf16", mixed_precision="bf16", **ONE_EPOCH)
    done = finetune(photos, source, tmp_path / "float32", **ONE_EPOCH)
    evaluate_thresholds(done.model, str(photos), done.processor, split="train", progress=False)
    finetune(photos, source, tmp_path / "again", mixed_precision="bf16", **ONE_EPOCH)
    Accelerator(cpu=True)  # of somebody else, who goes on with it
    try:
        with pytest.raises(ValueError, match="one precision for a process.*restart the kernel"):
            finetune(photos, source, tmp_path / "refused", mixed_precision="bf16", **ONE_EPOCH)
        assert AcceleratorState().mixed_precision == "no"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("kind", [ViTModel, SwinModel])
def test_a_backbone_without_classifier_gets_one(kind, photos, tmp_path):
    torch.manual_seed(0)
    sizes = {
        ViTModel: {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64},
        SwinModel: {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2},
    }[kind]
    backbone = kind(kind.config_class(**sizes, image_size=32, patch_size=8))
    backbone.save_pretrained(tmp_path / "backbone")
    done = finetune(photos, tmp_path / "backbone", tmp_path / "out", **ONE_EPOCH)
    assert list(done.model.config.id2label.values()) == LABELS
