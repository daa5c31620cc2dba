import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.training import TrainingRun, parse_config, train
from hf_thinkingvit.training.checkpoints import list_checkpoints
from hf_thinkingvit.training.loop import TrainingDivergedError
from hf_thinkingvit.training.starting_point import build_model
from tests.models.test_weights_from_swin import trained_swin
from tests.training.test_checkpoints import damage_by_cutting
from tests.training.test_config import CONFIGS
from tests.training.tiny_runs import LABELS, SCRIPT, finish, flags, launch, write_images


# What is random in a run: mixup, augmentation, stochastic depth. Two accumulated parts, and a moving average.
LIVELY = {"mixup": 0.8, "cutmix": 1.0, "model.drop_path_rate": 0.2, "gradient_accumulation_steps": 2, "save_steps": 2}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint: the weights themselves and their moving average."""
    checkpoint = list_checkpoints(folder / "checkpoints")[0]
    found = load_file(checkpoint / "model.safetensors")
    average = checkpoint / "ema.safetensors"
    return {**found, **(load_file(average) if average.exists() else {})}


def assert_same(one: dict, other: dict, tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=tolerance, rtol=0, msg=name)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    results = train(parse_config(flags(images, folder, model_license="apache-2.0")))
    return folder, results


class TestOutcome:
    def test_measures_every_stage_of_weights_and_average(self, run):
        folder, results = run
        assert results == json.loads((folder / "results.json").read_text())
        assert [entry["epoch"] for entry in results["history"]] == [1, 2, 3]
        for measured in results["history"][-1]["results"].values():
            assert measured["images"] == 10
            assert len(measured["top1"]) == len(measured["top5"]) == 2
            assert measured["top5"] == [100.0, 100.0]  # three labels

    def test_saved_models_work_and_say_what_was_measured(self, run):
        folder, results = run
        best = max(max(m["top1"][-1] for m in entry["results"].values()) for entry in results["history"])
        for name in ("last", "best"):
            classifier = pipeline("image-classification", model=str(folder / name))
            assert classifier.model.config.id2label == dict(enumerate(LABELS))
            card = (folder / name / "README.md").read_text()
            assert "license: apache-2.0" in card
        assert f"| stage 1 | {best:.2f} | 100.00 |" in (folder / "best" / "README.md").read_text()

    def test_evaluation_is_that_of_the_saved_model(self, run, images):
        folder, results = run
        last = results["history"][-1]
        model = AutoModelForImageClassification.from_pretrained(folder / "last")
        data = TrainingRun(parse_config(flags(images, folder, resume="auto"))).evaluation
        with torch.no_grad():
            hits = [
                (model(batch["pixel_values"], threshold=0.0).logits.argmax(-1) == batch["labels"]).float()
                for batch in data
            ]
        assert 100 * torch.cat(hits).mean().item() == pytest.approx(last["results"][last["chosen"]]["top1"][-1])

    def test_never_writes_over_a_run(self, run, images):
        with pytest.raises(ValueError, match="continue it with `--resume auto`"):
            TrainingRun(parse_config(flags(images, run[0])))

    def test_refuses_to_continue_as_another_run(self, run, images):
        with pytest.raises(ValueError, match=r"belongs to another run \(seed: 0 then, 1 now\)"):
            TrainingRun(parse_config(flags(images, run[0], seed=1, resume="auto")))


def test_mixup_trains_every_stage_without_a_warning(images, tmp_path):
    """Targets are mixed, so that the model is called without labels."""
    logging.warning_once.cache_clear()
    with CaptureLogger(logging.get_logger("hf_thinkingvit.models.module_arguments")) as captured:
        train(parse_config(flags(images, tmp_path, mixup=0.8, max_steps=1)))
    assert captured.out == ""


def test_learns(images, tmp_path):
    """24 images by heart."""
    words = flags(images, tmp_path, epochs=30, horizontal_flip=0, random_erasing=0, auto_augment="none", color_jitter=0)
    words += ["--crop_scale", "1", "1", "--crop_ratio", "1", "1", "--eval_split", "train", "--eval_epochs", "30"]
    words += ["--image_mean", "0.5", "0.5", "0.5", "--image_std", "0.5", "0.5", "0.5", "--crop_pct", "1"]
    words += ["--learning_rate", "0.3", "--model.hidden_size", "32", "--ema_decay", "0"]
    top1 = train(parse_config(words))["history"][-1]["results"]["weights"]["top1"]
    assert min(top1) > 90


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The weights of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    train(parse_config(flags(images, folder, **LIVELY)))
    return weights(folder)


class TestResuming:
    def test_killed_and_resumed_is_bit_identical(self, images, tmp_path, whole):
        words = flags(images, tmp_path, resume="auto", **LIVELY)
        process = self.started(words, until=5)  # of 9 steps
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        train(parse_config(words))
        assert_same(weights(tmp_path), whole)

    def test_ctrl_c_saves_first(self, images, tmp_path, whole):
        """A terminal sends it to every process of its group, data workers included."""
        words = flags(images, tmp_path, resume="auto", num_workers=2, **LIVELY)
        process = self.started(words, until=2)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1, errors
        assert "SIGINT: saving" in errors
        newest = list_checkpoints(tmp_path / "checkpoints")[0]
        assert f"stopped by SIGINT; continue with --resume auto from {newest}" in errors
        assert "Traceback" not in errors
        train(parse_config(words))
        assert_same(weights(tmp_path), whole)

    @staticmethod
    def started(words: list[str], until: int) -> subprocess.Popen:
        """A run in a process group of its own, as soon as it has a checkpoint of step `until`."""
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *words],
            start_new_session=True,
            # Whoever runs the tests in the background may ignore it.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        checkpoints = Path(words[words.index("--output_dir") + 1]) / "checkpoints"
        while process.poll() is None and not any(int(p.name[5:]) >= until for p in list_checkpoints(checkpoints)):
            time.sleep(0.005)
        return process

    def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(self, images, tmp_path, whole):
        train(parse_config(flags(images, tmp_path, max_steps=4, **LIVELY)))
        newest, before = list_checkpoints(tmp_path / "checkpoints")
        damage_by_cutting(newest)
        run = TrainingRun(parse_config(flags(images, tmp_path, resume="auto", **LIVELY)))
        assert run.progress.step == int(before.name[5:]) == 3
        run.run()
        assert_same(weights(tmp_path), whole)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_sigterm_saves_first(self, images, tmp_path, whole, streaming):
        words = flags(images, tmp_path, resume="auto", **{**LIVELY, "save_steps": 1000})
        if streaming:
            words += ["--streaming", "--images_per_epoch", "24", "--shuffle_buffer", "8"]
        run = TrainingRun(parse_config(words))
        finish_step = run.finish_step

        def finish_and_signal() -> None:
            finish_step()
            if run.progress.step == 4:  # in the middle of the second epoch
                os.kill(os.getpid(), signal.SIGTERM)

        run.finish_step = finish_and_signal
        with pytest.raises(SystemExit, match="step-00000004"):
            run.run()
        train(parse_config(words))
        if streaming:
            train(parse_config([*words, "--output_dir", str(tmp_path / "undisturbed")]))
            whole = weights(tmp_path / "undisturbed")
        assert_same(weights(tmp_path), whole)


@pytest.mark.parametrize(
    "save_steps, message",
    [
        (1000, r"the loss was nan at step 5 .*last good checkpoint is .*step-00000003"),
        # The step that breaks the weights has a loss that is fine: such weights are not saved.
        (1, r"the weights are no longer finite at step 4.*last good checkpoint is .*step-00000003"),
    ],
)
def test_divergence_stops_the_run(images, tmp_path, save_steps, message):
    run = TrainingRun(parse_config(flags(images, tmp_path, save_steps=save_steps)))
    finish_step = run.finish_step

    def finish_and_break() -> None:
        finish_step()
        if run.progress.step == 4:
            next(run.model.parameters()).data.fill_(float("nan"))

    run.finish_step = finish_and_break
    with pytest.raises(TrainingDivergedError, match=message):
        run.run()
    assert not any(torch.isnan(tensor).any() for tensor in weights(tmp_path).values())


def test_streaming_equals_map_style(images, tmp_path):
    for name, words in (("map", []), ("stream", ["--streaming", "--images_per_epoch", "24"])):
        train(parse_config([*flags(images, tmp_path / name, **LIVELY), "--no_shuffle", *words]))
    assert_same(weights(tmp_path / "map"), weights(tmp_path / "stream"))


@pytest.mark.parametrize("streaming", [False, True])
def test_two_processes_give_the_weights_of_one(images, tmp_path, streaming):
    words = ["--epochs", "2", "--clip_grad", "1.0"]
    if streaming:  # a file per process, so that each reads its own; in order, so that one process reads the same
        words += ["--streaming", "--images_per_epoch", "24", "--no_shuffle", "--batch_size", "24"]
        words += ["--crop_scale", "1", "1", "--crop_ratio", "1", "1", "--horizontal_flip", "0", "--random_erasing", "0"]
        words += ["--auto_augment", "none", "--color_jitter", "0"]
    else:  # images held out of train choose, and test is measured at the end; one process begins, two go on
        words += ["--eval_split", "none", "--validation_fraction", "0.25"]
        train(parse_config([*flags(images, tmp_path / "two"), *words, "--max_steps", "2"]))
        words += ["--resume", "auto"]
    process = launch([*flags(images, tmp_path / "two"), *words], processes=2)
    output = finish(process)
    assert process.returncode == 0, output
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert results["processes"] == 2
    train(parse_config([*flags(images, tmp_path / "one"), *words]))
    assert_same(weights(tmp_path / "two"), weights(tmp_path / "one"), tolerance=1e-5)
    alone = json.loads((tmp_path / "one" / "results.json").read_text())
    assert results["history"][-1]["results"] == alone["history"][-1]["results"]  # padded images counted once
    assert results["test"] == alone["test"]
    assert (results["test"] is None) == streaming


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Plain models to start from: three heads, one layer, 32 × 32 pixels; a teacher; the data's labels."""
    folder = tmp_path_factory.mktemp("sources")
    fields = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 1, "intermediate_size": 96}
    fields |= {"image_size": 32, "patch_size": 16, "num_labels": 5}  # other labels than the data, as with ImageNet's
    ViTForImageClassification(ViTConfig(**fields)).save_pretrained(folder / "vit")
    DeiTForImageClassificationWithTeacher(DeiTConfig(**fields)).save_pretrained(folder / "deit")
    ViTForImageClassification(ViTConfig(**{**fields, "num_labels": 3})).save_pretrained(folder / "teacher")
    evaluation_image_processor(32).save_pretrained(folder / "teacher")
    return folder


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_run(path, images, sources, tmp_path):
    words = ["--config", str(path), "--output_dir", str(tmp_path), "--dataset", str(images), "--cpu"]
    words += ["--batch_size", "4", "--max_steps", "2", "--num_workers", "0"]
    config = parse_config(words)
    if config.teacher:
        words += ["--teacher", str(sources / "teacher")]
    if config.from_vit:
        words += ["--from_vit", str(sources / ("deit" if "distilled" in config.from_vit else "vit"))]
    else:
        with torch.device("meta"):  # at its own size
            assert build_model(config, dict(enumerate(LABELS))).config.num_labels == 3
    if path.stem == "thinking_swin_s_imagenet":
        words += ["--model.embed_dim", "24", "--model.depths", "1", "1", "1", "1", "--model.image_size", "32"]
    results = train(parse_config(words))
    assert results["step"] == 2
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "last")
    assert model.config.model_type == config.model_type
    assert model.config.num_labels == 3


def test_starting_points(sources, images, tmp_path):
    """The leading channels of a run that starts from a ViT are the ViT's; a model of this package continues whole."""
    words = flags(images, tmp_path / "a", from_vit=sources / "vit", max_steps=1, **{"model.thinking_stages": "[3, 6]"})
    for name in ("hidden_size", "num_hidden_layers", "image_size", "patch_size"):
        position = words.index(f"--model.{name}")
        del words[position : position + 2]
    run = TrainingRun(parse_config(words))
    vit = ViTForImageClassification.from_pretrained(sources / "vit")
    position = run.accelerator.unwrap_model(run.model).thinkingvit.embeddings.position_embeddings
    assert torch.equal(position[..., :24], vit.vit.embeddings.position_embeddings)
    with pytest.raises(ValueError, match=r"`model.patch_size` is 8, but starting from .* it is 16"):
        TrainingRun(parse_config([*words, "--model.patch_size", "8"]))


def test_starting_from_swin(images, tmp_path):
    swin = trained_swin(image_size=16, patch_size=2)
    swin.save_pretrained(tmp_path / "swin")
    words = ["--dataset", str(images), "--output_dir", str(tmp_path / "run"), "--model_type", "thinking_swin", "--cpu"]
    words += ["--batch_size", "4", "--num_workers", "0", "--from_vit", str(tmp_path / "swin")]
    run = TrainingRun(parse_config([*words, "--model.drop_path_rate", "0.1", "--model.depths", "2", "2"]))
    model = run.accelerator.unwrap_model(run.model)
    assert (model.config.head_rounds, model.config.drop_path_rate) == ([[2, 2], [2, 4]], 0.1)
    weight = model.thinking_swin.embeddings.patch_embeddings.weight
    assert torch.equal(weight, swin.swin.embeddings.patch_embeddings.projection.weight)
    with pytest.raises(ValueError, match=r"`model.mlp_ratio` is 2, but starting from .* it is 4.0"):
        TrainingRun(parse_config([*words, "--model.mlp_ratio", "2"]))


def test_frozen_parameters_stay(images, tmp_path):
    train(parse_config(flags(images, tmp_path, freeze=["*.alpha"])))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "last")
    assert all(parameter.item() == 0 for name, parameter in model.named_parameters() if name.endswith("alpha"))
    with pytest.raises(ValueError, match="no parameter is called '\\*beta'"):
        TrainingRun(parse_config(flags(images, tmp_path / "b", freeze=["*beta"])))


def test_logs_to_trackers(images, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(parse_config(flags(images, tmp_path, trackers=["tensorboard"])))
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents.*")).parent)).Reload()
    assert {"train/loss", "train/stage_0_loss", "train/learning_rate", "eval/ema/top1_stage_1"} <= set(
        events.Tags()["scalars"]
    )
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 10))


def test_counts_broken_images(tmp_path):
    folder = write_images(tmp_path / "images", broken={"train": [2, 5]})
    results = train(parse_config(flags(folder, tmp_path / "run", epochs=2, warmup_epochs=0)))
    assert results["skipped_images"] >= 4


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"batch_size": 9, "gradient_accumulation_steps": 2}, r"`batch_size` \(9\) must be a multiple of 2"),
        ({"batch_size": 64}, r"more than there are images \(24\)"),
        ({"batch_size": 6, "gradient_accumulation_steps": 2, "mixup": 1}, "pair images"),
    ],
)
def test_refuses_batches_that_cannot_be(images, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        TrainingRun(parse_config(flags(images, tmp_path, **overrides)))
