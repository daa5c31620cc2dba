"""The models that a run saves and reports, also if its folders are copied, moved or incomplete."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_thinkingvit.training import TrainingRun, parse_config, train
from hf_thinkingvit.training.checkpoints import list_checkpoints
from tests.training.test_splits import write
from tests.training.tiny_runs import flags, measured


# The label that the model predicts after each epoch: half of the images have label 0, a quarter 1, a quarter 2.
ANSWERS = {4: 1, 8: 0, 12: 2, 16: 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    labels = [0, 1, 0, 2]
    return write(tmp_path_factory.mktemp("data"), {"train": labels * 8, "validation": labels * 2, "test": labels * 4})


def words_of(data, folder, **overrides) -> list[str]:
    return flags(data, folder, eval_split="validation", ema_decay=0, epochs=4, keep_checkpoints=9, **overrides)


def steered(words: list[str]) -> dict:
    """The results of a run whose second epoch is its best, because the model predicts the most frequent label."""
    run = TrainingRun(parse_config(words))
    finish_step = run.finish_step

    @torch.no_grad()
    def finish_and_steer() -> None:
        finish_step()
        if run.progress.step in ANSWERS:
            classifier = run.accelerator.unwrap_model(run.model).classifier
            classifier.weight.zero_()
            classifier.bias.copy_(torch.eye(3)[ANSWERS[run.progress.step]])

    run.finish_step = finish_and_steer
    return run.run()


def answer(folder) -> int:
    """The label that a saved model always predicts."""
    return AutoModelForImageClassification.from_pretrained(folder).classifier.bias.argmax().item()


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, steered(words_of(data, folder))


def figures(results: dict) -> dict:
    return {name: (entry["step"], entry["top1"][-1]) for name, entry in results["test"].items()}


def without_steps(folder):
    """The folder of a run by a version that did not record the steps of saved models."""
    for name in ("best", "last"):
        (folder / name / "training_step.json").unlink()
    return folder


def test_the_best_epoch_is_saved_and_reported(whole):
    folder, results = whole
    chosen = [entry["results"][entry["chosen"]]["top1"][-1] for entry in results["history"]]
    assert chosen == [25.0, 50.0, 25.0, 25.0]
    assert figures(results) == {"best": (8, 50.0), "last": (16, 25.0)}
    assert (answer(folder / "best"), answer(folder / "last")) == (0, 1)
    assert "| stage 1 | 50.00 |" in (folder / "best" / "README.md").read_text()


class TestAnotherFolder:
    def test_of_a_finished_run(self, data, whole, tmp_path):
        results = train(parse_config(words_of(data, tmp_path, resume=whole[0])))
        assert results["test"] == whole[1]["test"]
        assert measured(results) == measured(whole[1])
        assert (answer(tmp_path / "best"), answer(tmp_path / "last")) == (0, 1)

    def test_of_a_run_after_its_best_epoch(self, data, tmp_path):
        steered(words_of(data, tmp_path / "a", max_steps=9))
        results = steered(words_of(data, tmp_path / "b", resume=tmp_path / "a"))
        assert figures(results) == {"best": (8, 50.0), "last": (16, 25.0)}
        assert answer(tmp_path / "b" / "best") == 0

    def test_a_later_best_model_is_not_taken(self, data, whole, tmp_path):
        """A run that resumes from a checkpoint before the other folder's best epoch does not take its best model."""
        checkpoint = whole[0] / "checkpoints" / "step-00000004"
        results = train(parse_config(words_of(data, tmp_path, resume=checkpoint, max_steps=4)))
        assert figures(results) == {"best": (4, 25.0), "last": (4, 25.0)}
        assert (answer(tmp_path / "best"), answer(tmp_path / "last")) == (1, 1)

    def test_without_the_models(self, data, whole, tmp_path, capsys):
        folder = shutil.copytree(whole[0], tmp_path / "a")
        for name in ("best", "last"):
            shutil.rmtree(folder / name)
        results = train(parse_config(words_of(data, tmp_path / "b", resume=folder)))
        assert figures(results) == {"best": (16, 25.0), "last": (16, 25.0)}
        assert "the best model (of step 8) is not there any more" in capsys.readouterr().out
        again = train(parse_config(words_of(data, tmp_path / "b", resume="auto")))
        assert again["test"] == results["test"]
        assert "the model of step 8 was more accurate" in capsys.readouterr().out

    @pytest.mark.parametrize("step", [4, 16])
    def test_of_a_version_that_recorded_no_steps(self, data, whole, tmp_path, step):
        """Its models are taken, unless that run continued after the checkpoint and replaced them."""
        folder = without_steps(shutil.copytree(whole[0], tmp_path / "a"))
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        results = train(parse_config(words_of(data, tmp_path / "b", resume=checkpoint, max_steps=step)))
        expected = {4: {"best": (4, 25.0), "last": (4, 25.0)}, 16: figures(whole[1])}[step]
        assert figures(results) == expected
        assert answer(tmp_path / "b" / "best") == ANSWERS[expected["best"][0]]

    def test_which_holds_models_of_another_run(self, data, whole, tmp_path):
        """The other run's models have the same steps, but other accuracies."""
        folder, other = (shutil.copytree(whole[0], tmp_path / name) for name in "ab")
        for name in ("best", "last"):
            shutil.rmtree(folder / name)
        saved = json.loads((other / "results.json").read_text())
        for entry in saved["history"]:
            entry["results"][entry["chosen"]]["top1"][-1] += 1
        (other / "results.json").write_text(json.dumps(saved))
        results = train(parse_config(words_of(data, other, resume=folder)))
        assert figures(results) == {"best": (16, 25.0), "last": (16, 25.0)}
        assert answer(other / "best") == 1


class TestTheSameFolder:
    @pytest.mark.parametrize("recorded", [True, False])
    @pytest.mark.parametrize("place", ["linked", "copied"])
    def test_a_checkpoint_that_lies_elsewhere(self, data, whole, tmp_path, capsys, place, recorded):
        """The folder of checkpoints is a link to another disk, or the checkpoint is a copy."""
        folder = shutil.copytree(whole[0], tmp_path / "a")
        if not recorded:
            without_steps(folder)
        elsewhere, resume = tmp_path / "disk" / "of" / "checkpoints", "auto"
        shutil.copytree(folder / "checkpoints", elsewhere)
        if place == "linked":
            shutil.rmtree(folder / "checkpoints")
            (folder / "checkpoints").symlink_to(elsewhere)
        else:
            resume = elsewhere / "step-00000016"
        results = train(parse_config(words_of(data, folder, resume=resume)))
        assert results["test"] == whole[1]["test"]
        assert "not there any more" not in capsys.readouterr().out
        assert (answer(folder / "best"), answer(folder / "last")) == (0, 1)

    @pytest.mark.parametrize("name", ["best", "last"])
    def test_a_deleted_model_is_made_anew(self, data, whole, tmp_path, name):
        folder = shutil.copytree(whole[0], tmp_path / "a")
        shutil.rmtree(folder / name)
        for _ in range(2):
            results = train(parse_config(words_of(data, folder, resume="auto")))
            assert figures(results) == {"best": (8, 50.0) if name == "last" else (16, 25.0), "last": (16, 25.0)}
            assert answer(folder / name) == 1
            assert [entry["step"] for entry in results["history"]] == [4, 8, 12, 16]

    def test_a_model_deleted_during_the_run_is_not_reported(self, data, whole, tmp_path, capsys):
        folder = shutil.copytree(whole[0], tmp_path / "a")
        run = TrainingRun(parse_config(words_of(data, folder, resume="auto")))
        evaluate_if_due = run._evaluate_if_due
        run._evaluate_if_due = lambda: (evaluate_if_due(), shutil.rmtree(folder / "best"))
        assert list(run.run()["test"]) == ["last"]
        assert "the best model (of step 8) is not reported: there is no folder" in capsys.readouterr().out

    def test_a_run_of_a_version_that_recorded_no_steps(self, data, whole, tmp_path):
        folder = without_steps(shutil.copytree(whole[0], tmp_path / "a"))
        path = list_checkpoints(folder / "checkpoints")[0] / "evaluated.json"
        saved = json.loads(path.read_text())
        del saved["progress"]["best_step"]
        path.write_text(json.dumps(saved))
        assert train(parse_config(words_of(data, folder, resume="auto")))["test"] == whole[1]["test"]
