"""Runs that are stopped, killed and continued lose and repeat no work, and name mistakes in their errors."""

import json
import os
import re
import shutil
import signal

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_thinkingvit.training import TrainingRun, parse_config, train
from hf_thinkingvit.training.checkpoints import list_checkpoints
from hf_thinkingvit.training.stop_signals import ignore_stop_signals
from tests.training import tiny_runs
from tests.training.tiny_runs import LIVELY, assert_same, finish, flags, launch, measured, weights, write_images


def number_of_optimizer_steps(folder) -> int:
    state = torch.load(list_checkpoints(folder / "checkpoints")[0] / "optimizer.bin")["state"]
    (count,) = {int(entry["step"]) for entry in state.values()}
    return count


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A run of 9 steps that was not interrupted, without randomness that depends on the parts of a step."""
    folder = tmp_path_factory.mktemp("whole")
    results = train(parse_config(flags(images, folder)))
    return folder, results


class TestAnotherAccumulation:
    @pytest.mark.parametrize("before, after", [(1, 2), (2, 4)])
    def test_resumes_at_the_same_steps(self, images, tmp_path, whole, before, after):
        train(parse_config(flags(images, tmp_path, gradient_accumulation_steps=before, max_steps=5)))
        words = flags(images, tmp_path, resume="auto", gradient_accumulation_steps=after)
        assert train(parse_config(words))["step"] == number_of_optimizer_steps(tmp_path) == 9
        assert_same(weights(tmp_path), weights(whole[0]), tolerance=1e-5)

    def test_the_environment_has_no_say(self, images, tmp_path, whole, monkeypatch):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
        train(parse_config(flags(images, tmp_path)))
        assert_same(weights(tmp_path), weights(whole[0]))

    def test_two_processes_stop_at_once_and_one_goes_on(self, tmp_path):
        """
        Before anything is logged, saved or evaluated, and with data workers, which get the launcher's signal as well.
        """
        images, folder = write_images(tmp_path / "images", num_train=1600), tmp_path / "stopped"
        long = {"log_steps": 1000, "save_steps": 1000, "warmup_epochs": 0, "epochs": 1}  # 200 steps
        process = launch(flags(images, folder, num_workers=1, **long), processes=2)
        output = ""
        while not re.search(r"\| [1-9]\d*/200", output):  # the progress bar after a step
            output += (read := process.stdout.read(1))
            assert read, output
        process.send_signal(signal.SIGTERM)
        output = finish(process, timeout=60)
        assert output.count("stopped by SIGTERM; continue with --resume auto from") == 1, output
        stopped = int(list_checkpoints(folder / "checkpoints")[0].name[5:])
        assert stopped < 200
        long["max_steps"] = stopped + 2
        train(parse_config(flags(images, folder, resume="auto", gradient_accumulation_steps=2, **long)))
        train(parse_config(flags(images, tmp_path / "alone", **long)))
        assert number_of_optimizer_steps(folder) == stopped + 2
        assert_same(weights(folder), weights(tmp_path / "alone"), tolerance=1e-4)


class Interrupted:
    """Evaluation batches that call `interruption` before the third batch of the second evaluation."""

    def __init__(self, batches, interruption):
        self.batches, self.interruption, self.evaluation, self.seen = batches, interruption, 0, 0

    def __iter__(self):
        self.evaluation, self.seen = self.evaluation + 1, 0
        for batch in self.batches:
            self.seen += 1
            if (self.evaluation, self.seen) == (2, 3):
                self.interruption()
            yield batch


def killed() -> None:
    raise RuntimeError("killed")


class TestEvaluation:
    @pytest.mark.parametrize(
        "interruption, error, message",
        [
            (lambda: os.kill(os.getpid(), signal.SIGTERM), SystemExit, "stopped by SIGTERM.* from .*step-00000006"),
            (killed, RuntimeError, "killed"),
        ],
    )
    def test_interrupted_ones_lose_nothing_and_are_made_up_for(
        self, images, tmp_path, whole, interruption, error, message
    ):
        run = TrainingRun(parse_config(flags(images, tmp_path, eval_batch_size=2)))
        assert run.evaluation.worker_init_fn is ignore_stop_signals
        run.evaluation = Interrupted(run.evaluation, interruption)
        with pytest.raises(error, match=message):
            run.run()
        assert run.evaluation.seen == 3  # of 5 batches
        assert list_checkpoints(tmp_path / "checkpoints")[0].name == "step-00000006"
        resumed = train(parse_config(flags(images, tmp_path, eval_batch_size=2, resume="auto")))
        assert measured(resumed) == measured(whole[1])
        assert_same(weights(tmp_path), weights(whole[0]))

    @pytest.mark.parametrize("lost", [False, True])
    def test_finished_ones_are_not_repeated_unless_their_record_is_lost(self, images, tmp_path, whole, lost):
        train(parse_config(flags(images, tmp_path, max_steps=3)))
        if lost:
            (tmp_path / "checkpoints" / "step-00000003" / "evaluated.json").write_text('{"progress": {')
        run = TrainingRun(parse_config(flags(images, tmp_path, resume="auto")))
        assert [entry["step"] for entry in run.history] == ([] if lost else [3])
        assert measured(run.run()) == measured(whole[1])


class TestFolders:
    def test_what_was_set_aside_comes_back(self, images, tmp_path, whole):
        """A folder that was set aside by a kill between the two renames of a replacement is restored."""
        folder = shutil.copytree(whole[0], tmp_path / "run")
        for path in (folder / "best", folder / "last", list_checkpoints(folder / "checkpoints")[0]):
            path.rename(path.with_name(f".{path.name}.old"))
        run = TrainingRun(parse_config(flags(images, folder, resume="auto")))
        assert run.progress.step == 9
        for name in ("best", "last"):
            AutoModelForImageClassification.from_pretrained(folder / name)

    def test_a_run_starts_from_a_model_that_was_set_aside(self, images, tmp_path, whole):
        shutil.copytree(whole[0] / "best", tmp_path / ".best.old")
        TrainingRun(parse_config(flags(images, tmp_path / "run", from_pretrained=tmp_path / "best")))

    def test_a_run_starts_from_the_folder_it_is_started_in(self, images, tmp_path, whole, monkeypatch):
        monkeypatch.chdir(whole[0] / "best")
        TrainingRun(parse_config(flags(images, tmp_path / "run", from_pretrained=".")))

    @pytest.mark.parametrize("folder", ["", "checkpoints", "checkpoints/step-00000009"])
    def test_what_a_run_has_filled_in_is_found_from_each_of_its_folders(self, images, tmp_path, whole, folder):
        first = tmp_path / "first"
        told = ["--image_mean", "0.1", "0.2", "0.3", "--crop_pct", "0.8"]
        train(parse_config([*flags(images, first, max_steps=9), *told]))
        run = TrainingRun(parse_config(flags(images, tmp_path / "second", resume=first / folder)))
        assert run.progress.step == 9
        assert (run.config.image_mean, run.config.crop_pct) == ([0.1, 0.2, 0.3], 0.8)

    def test_a_run_may_go_on_from_another_folder(self, images, tmp_path, whole):
        first = train(parse_config(flags(images, tmp_path / "first", max_steps=5)))
        moved = flags(images, tmp_path / "second", resume=tmp_path / "first", max_steps=5)
        assert measured(train(parse_config(moved))) == measured(first)
        assert [path.name for path in list_checkpoints(tmp_path / "second" / "checkpoints")] == ["step-00000005"]
        train(parse_config(flags(images, tmp_path / "second", resume="auto")))
        assert_same(weights(tmp_path / "second"), weights(whole[0]))


def test_the_losses_of_an_epoch_are_those_of_all_its_steps(images, tmp_path, whole):
    """Also where it was interrupted between two evaluations."""
    words = {"save_steps": 4, "keep_checkpoints": 9, "log_steps": 2}
    train(parse_config(flags(images, tmp_path, **words)))
    for folder in list_checkpoints(tmp_path / "checkpoints"):
        if int(re.search(r"\d+", folder.name)[0]) > 4:
            shutil.rmtree(folder)
    resumed = train(parse_config(flags(images, tmp_path, resume="auto", **words)))
    for one, other in zip(resumed["history"], whole[1]["history"], strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-5)
        assert one["losses"]["loss"] > 0


def test_half_a_step_is_never_saved(images, tmp_path):
    run = TrainingRun(parse_config(flags(images, tmp_path / "broken", **LIVELY)))
    loss, calls = run.loss, []

    def interrupted(outputs, pixel_values, targets, step, micro_batch):
        calls.append(step)
        if calls.count(4) == 2:  # the second micro-batch of the step after the fourth
            raise KeyboardInterrupt
        return loss(outputs, pixel_values, targets, step, micro_batch)

    interrupted.model_arguments = loss.model_arguments
    run.loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        run.run()
    with pytest.raises(RuntimeError, match="not finished cannot be saved"):
        run.save()
    with pytest.raises(RuntimeError, match="make another with `resume='auto'`"):
        run.run()
    assert list_checkpoints(tmp_path / "broken" / "checkpoints")[0].name == "step-00000004"
    train(parse_config(flags(images, tmp_path / "broken", resume="auto", **LIVELY)))
    train(parse_config(flags(images, tmp_path / "unbroken", **LIVELY)))
    assert_same(weights(tmp_path / "broken"), weights(tmp_path / "unbroken"))


class TestMistakes:
    def test_other_fields_of_the_model(self, images, whole):
        words = flags(images, whole[0], resume="auto", **{"model.thinking_stages": "[1, 2, 4]"})
        with pytest.raises(ValueError, match=r"another run \(model.thinking_stages: \[1, 2\] then, \[1, 2, 4\] now\)"):
            TrainingRun(parse_config(words))

    def test_other_labels_in_the_same_place(self, tmp_path, monkeypatch):
        images = write_images(tmp_path / "images")
        train(parse_config(flags(images, tmp_path / "run", max_steps=1)))
        monkeypatch.setattr(tiny_runs, "LABELS", [*tiny_runs.LABELS, "emu"])
        write_images(images)
        with pytest.raises(ValueError, match="do not fit this model.* labels of the data .* have changed"):
            TrainingRun(parse_config(flags(images, tmp_path / "run", resume="auto")))

    def test_fields_that_the_checkpoint_does_not_know_had_their_default(self, images, tmp_path, whole):
        folder = shutil.copytree(whole[0], tmp_path / "run")
        path = list_checkpoints(folder / "checkpoints")[0] / "evaluated.json"
        saved = json.loads(path.read_text())
        del saved["config"]["color_jitter"]
        path.write_text(json.dumps(saved))
        assert TrainingRun(parse_config(flags(images, folder, resume="auto"))).progress.step == 9
        with pytest.raises(ValueError, match=r"color_jitter: 0.3 then, 0.1 now"):
            TrainingRun(parse_config(flags(images, folder, resume="auto", color_jitter=0.1)))

    def test_another_reading_of_a_stream(self, images, tmp_path, caplog):
        stream = ["--streaming", "--images_per_epoch", "24"]
        train(parse_config([*flags(images, tmp_path, max_steps=4), *stream]))
        again = [*flags(images, tmp_path, resume="auto", gradient_accumulation_steps=2), *stream]
        TrainingRun(parse_config(again))
        assert "images may be seen twice or not at all" in caplog.text

    @pytest.mark.parametrize(
        "variable, name",
        [
            ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
            ("ACCELERATE_USE_FSDP", "FSDP"),
            ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
            ("ACCELERATE_USE_PARALLELISM_CONFIG", "tensor, context or sequence parallelism"),
        ],
    )
    def test_divided_models(self, images, tmp_path, monkeypatch, variable, name):
        monkeypatch.setenv(variable, "true")
        with pytest.raises(ValueError, match=rf"{name}.* is not supported.*accelerate launch --multi_gpu"):
            TrainingRun(parse_config(flags(images, tmp_path / "run")))
        assert not (tmp_path / "run").exists()
