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
from transformers import (
    AutoModelForImageClassification,
    pipeline,
)
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from hf_thinkingvit.training import TrainingRun, parse_config, train
from hf_thinkingvit.training.checkpoints import list_checkpoints
from tests.training.test_checkpoints import damage_by_cutting
from tests.training.tiny_runs import LABELS, LIVELY, SCRIPT, assert_same, finish, flags, launch, weights


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
    """Targets are mixed, so the model is called without labels."""
    logging.warning_once.cache_clear()
    with CaptureLogger(logging.get_logger("hf_thinkingvit.models.module_arguments")) as captured:
        train(parse_config(flags(images, tmp_path, mixup=0.8, max_steps=1)))
    assert captured.out == ""


def test_learns(images, tmp_path):
    """It memorises 24 images."""
    words = flags(images, tmp_path, epochs=30, horizontal_flip=0, random_erasing=0, auto_augment="none", color_jitter=0)
    words += ["--crop_scale", "1", "1", "--crop_ratio", "1", "1", "--eval_split", "train", "--eval_epochs", "30"]
    words += ["--image_mean", "0.5", "0.5", "0.5", "--image_std", "0.5", "0.5", "0.5", "--crop_pct", "1"]
    words += ["--learning_rate", "0.3", "--model.hidden_size", "32", "--ema_decay", "0"]
    top1 = train(parse_config(words))["history"][-1]["results"]["weights"]["top1"]
    assert min(top1) > 90


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The weights of a run that was not interrupted."""
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
        """A terminal sends SIGINT to every process of its group, including data workers."""
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
        """A run in its own process group, returned as soon as it has a checkpoint of step `until`."""
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *words],
            start_new_session=True,
            # SIGINT may be ignored if the tests run in the background.
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


def test_streaming_equals_map_style(images, tmp_path):
    for name, words in (("map", []), ("stream", ["--streaming", "--images_per_epoch", "24"])):
        train(parse_config([*flags(images, tmp_path / name, **LIVELY), "--no_shuffle", *words]))
    assert_same(weights(tmp_path / "map"), weights(tmp_path / "stream"))


@pytest.mark.parametrize("streaming", [False, True])
def test_two_processes_give_the_weights_of_one(images, tmp_path, streaming):
    words = ["--epochs", "2", "--clip_grad", "1.0"]
    if streaming:  # a file per process, so that each reads its own; unshuffled, so that one process reads the same
        words += ["--streaming", "--images_per_epoch", "24", "--no_shuffle", "--batch_size", "24"]
        words += ["--crop_scale", "1", "1", "--crop_ratio", "1", "1", "--horizontal_flip", "0", "--random_erasing", "0"]
        words += ["--auto_augment", "none", "--color_jitter", "0"]
    else:  # epochs are chosen on images held out of train, test is measured last; one process starts, two continue
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
    assert results["history"][-1]["results"] == alone["history"][-1]["results"]  # repeated images count once
    assert results["test"] == alone["test"]
    assert (results["test"] is None) == streaming
