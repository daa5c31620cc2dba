"""`exit_at_threshold`: a score equal to τ exits, in everything that compares scores with τ."""

import dataclasses

import numpy as np
import pytest
import torch

from hf_thinkingvit import EXIT_CRITERIA, ExitRule, ThinkingViTConfig
from hf_thinkingvit.evaluation import measure_stage_milliseconds
from hf_thinkingvit.evaluation.calibration import threshold_grid
from hf_thinkingvit.evaluation.sweep import StageAnswers
from hf_thinkingvit.inference import AdaptiveEngine
from hf_thinkingvit.inference.export import export_stages
from tests.utils import lively_model, random_images, tiny_config


@pytest.fixture
def model():
    return lively_model(thinking_stages=[2, 4], exit_criterion="entropy", exit_at_threshold=True)


@torch.no_grad()
def third_score(model, images) -> float:
    """One of the scores at the first exit, with one lower and others higher."""
    logits = model(images, max_stages=1).logits
    return EXIT_CRITERIA[model.config.exit_criterion].score(logits, 10).sort().values[2].item()


@pytest.mark.parametrize("criterion", sorted(EXIT_CRITERIA))
def test_both_comparisons_at_equality(criterion):
    scores = torch.tensor([0.2, 0.5, 0.8, float("nan")])
    strict = ExitRule(criterion, (0.5,), 10)
    inclusive = dataclasses.replace(strict, exit_at_threshold=True)
    below = EXIT_CRITERIA[criterion].exits_below
    assert strict.exits(0, scores).tolist() == [below, False, not below, False]
    assert inclusive.exits(0, scores).tolist() == [below, True, not below, False]


@torch.no_grad()
def test_forward_engine_and_programs_agree(model):
    images = random_images(8)
    threshold = third_score(model, images)
    expected = model(images, threshold=threshold)
    assert (expected.exit_stage == 0).sum() == 3
    results = list(AdaptiveEngine(model, batch_size=8, threshold=threshold)(images))
    assert [result.exit_stage for result in results] == expected.exit_stage.tolist()
    exits = export_stages(model)[0].module()({"pixel_values": images}, torch.tensor([threshold]))["exits"]
    assert torch.equal(exits, expected.exit_stage == 0)
    model.config.exit_at_threshold = False
    assert (model(images, threshold=threshold).exit_stage == 0).sum() == 2


@pytest.mark.parametrize("criterion, maximum", [("entropy", np.log(10)), ("max_probability", 1.0)])
def test_a_sweep_compares_in_the_same_way(criterion, maximum):
    scores = torch.tensor([[0.25, 0.0], [0.5, 0.0], [maximum, 0.0]], dtype=torch.float32)
    right = torch.ones(3, 2, dtype=torch.bool)
    answers = StageAnswers(scores, right, right, (1, 2), criterion, 10, 10, "simulated", exit_at_threshold=True)
    exits = {"entropy": [0, 0, 1], "max_probability": [1, 0, 0]}[criterion]
    assert answers.exit_stages(0.5).tolist() == exits
    grid = threshold_grid(answers)
    assert (answers.exit_stages(grid[0]) == 1).all() and (answers.exit_stages(grid[-1]) == 0).all()


def test_configurations_say_strict_unless_told():
    saved = tiny_config().to_dict()
    del saved["exit_at_threshold"]
    assert ThinkingViTConfig.from_dict(saved).exit_at_threshold is False
    assert ThinkingViTConfig.from_dict(saved, exit_at_threshold=True).exit_at_threshold is True


@pytest.mark.parametrize("value", [1, "yes", None])
def test_bad_values(value):
    with pytest.raises(ValueError, match="`exit_at_threshold` must be true or false"):
        tiny_config(exit_at_threshold=value)


def test_regression_is_refused():
    """Its score is 0 for every image, which equals the only τ that it may have."""
    with pytest.raises(ValueError, match="`exit_at_threshold` lets every image of a regression exit"):
        tiny_config(num_labels=1, exit_at_threshold=True)


@torch.no_grad()
def test_times_are_of_every_stage(model):
    """Also where every answer is certain beyond what float32 can tell, so that an image exits even at τ = 0."""
    model.classifier.weight.mul_(1e4)
    images, ran = random_images(2), []
    assert model(images, threshold=0.0).exit_stage.tolist() == [0, 0]
    run_stage = model.run_stage

    def counted(stage_index, *args, **kwargs):
        ran.append(stage_index)
        return run_stage(stage_index, *args, **kwargs)

    model.run_stage = counted
    assert len(measure_stage_milliseconds(model, images, repeats=1)) == 2
    assert ran == 3 * [0, 0, 1]
