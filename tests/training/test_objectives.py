"""Objectives and samplers are found by name: a new one is a class and an entry, without changes to the loop."""

import pytest
import torch
from torch.nn import functional as F

from hf_thinkingvit.models.configuration_staged import thinks_in_stages
from hf_thinkingvit.training import TrainingConfig, parse_config, train
from hf_thinkingvit.training.distillation import Teacher
from hf_thinkingvit.training.losses import TrainingLoss
from hf_thinkingvit.training.objectives import ADDED_OBJECTIVES, Objective, choose_objectives
from hf_thinkingvit.training.stage_samplers import STAGE_SAMPLERS, StageSampler
from tests.models.test_modeling_avit import lively_avit
from tests.models.test_modeling_early_exit_vit import lively_exits, lively_method
from tests.models.test_weights_from_vit import trained_vit
from tests.training.tiny_runs import flags, logged_scalars
from tests.utils import lively_model, random_images


class OneStage(StageSampler):
    """Each micro-batch trains one stage, in turn."""

    def stages(self, step, micro_batch):
        return [(step + micro_batch) % self.num_stages]


class Penalty(Objective):
    """Adds 100 to the loss of a step's first micro-batch, and logs it there only."""

    @classmethod
    def applies(cls, model_config, teacher):
        return True

    def __call__(self, batch):
        penalty = torch.tensor(0.0 if batch.micro_batch else 100.0)
        return penalty, {} if batch.micro_batch else {"penalty": penalty}


class TestChoice:
    def test_by_what_the_model_has(self):
        teacher = Teacher(trained_vit())

        def names(model, teacher=None):
            return [objective.__name__ for objective in choose_objectives(model.config, teacher)]

        assert names(lively_model()) == names(lively_model(), teacher) == ["StagesObjective"]
        assert names(lively_avit()) == names(lively_avit(), teacher) == ["HeadsObjective", "HaltingObjective"]
        distilled = lively_avit(distilled=True)
        assert names(distilled) == ["HeadsObjective", "HaltingObjective"]
        assert names(distilled, teacher) == ["DistillationHeadObjective", "HaltingObjective"]

        assert names(lively_exits()) == names(lively_method("pabee")) == ["StagesObjective"]
        assert {names(lively_method(method))[0] for method in ("act", "pondernet", "fastbert")} == {"ExitLossObjective"}

    def test_models_say_whether_they_think_in_stages(self):
        for model, expected in ((lively_model(), True), (lively_avit(), False), (trained_vit(), False)):
            assert thinks_in_stages(model) is thinks_in_stages(model.config) is expected
        assert "is_staged" not in lively_model().config.to_dict()


def test_halting_losses_need_labels():
    model = lively_avit().train()
    loss = TrainingLoss(TrainingConfig(), model.config)
    outputs = model(random_images(4), **loss.model_arguments(0, 0))
    with pytest.raises(ValueError, match="call it with `labels`"):
        loss(outputs, None, torch.eye(12)[:4], 0)


class TestExitLosses:
    @pytest.mark.parametrize("method", ["act", "pondernet", "fastbert"])
    def test_are_the_models_own(self, method):
        """With the run's label smoothing; one-hot targets, as mixup makes them, are the same as class indices."""
        model, labels = lively_method(method).train(), torch.tensor([3, 0, 11, 5])
        outputs = model(random_images(4), labels=labels)
        loss = TrainingLoss(TrainingConfig(label_smoothing=0.0), model.config)
        for targets in (labels, torch.eye(12)[labels]):
            total, parts = loss(outputs, None, targets, 0)
            torch.testing.assert_close(total, outputs.loss)
        assert list(parts) == [f"stage_{stage}_loss" for stage in range(4)]
        smoothed = TrainingLoss(TrainingConfig(label_smoothing=0.3), model.config)(outputs, None, labels, 0)[0]
        model.config.label_smoothing = 0.3
        torch.testing.assert_close(smoothed, model(random_images(4), labels=labels).loss)

    @pytest.mark.parametrize("setting", [{"stage_sampling": "sandwich"}, {"inplace_distillation": 0.5}])
    def test_leave_no_place_for_others(self, setting):
        with pytest.raises(ValueError, match="trains all stages by a loss of its own"):
            TrainingLoss(TrainingConfig(**setting), lively_method("act").config)


class TestNewOnes:
    def test_a_sampler_by_micro_batch(self, monkeypatch):
        monkeypatch.setitem(STAGE_SAMPLERS, "one", OneStage)
        model, labels = lively_model(), torch.tensor([3, 0, 11, 5])
        outputs = model.train()(random_images(4), labels=labels)
        loss = TrainingLoss(TrainingConfig(stage_sampling="one", label_smoothing=0.0), model.config)
        for step, micro_batch, stage in ((0, 0, 0), (0, 1, 1), (4, 1, 2)):
            expected = F.cross_entropy(outputs.stage_logits[stage], labels)
            torch.testing.assert_close(loss(outputs, None, labels, step, micro_batch)[0], expected)

    def test_train_in_a_run(self, images, tmp_path, monkeypatch):
        pytest.importorskip("tensorboard")
        monkeypatch.setitem(STAGE_SAMPLERS, "one", OneStage)
        monkeypatch.setitem(ADDED_OBJECTIVES, "penalty", Penalty)
        config = parse_config(flags(images, tmp_path, max_steps=2, gradient_accumulation_steps=2))
        config.stage_sampling, config.trackers = "one", ["tensorboard"]
        train(config)
        logged = logged_scalars(tmp_path)
        assert logged["train/penalty"] == {1: 100.0, 2: 100.0}
        assert all(50 < loss < 100 for loss in logged["train/loss"].values())
