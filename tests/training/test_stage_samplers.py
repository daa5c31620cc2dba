"""Which stages a step trains, and with which weights."""

import pytest
import torch

from hf_thinkingvit.training import TrainingConfig
from hf_thinkingvit.training.stage_samplers import STAGE_SAMPLERS, build_stage_sampler
from tests.utils import lively_model


def test_sandwich_takes_the_first_the_last_and_some_between():
    model = lively_model(thinking_stages=[1, 2, 2, 3, 4], num_attention_heads=4)
    sampler = build_stage_sampler(TrainingConfig(stage_sampling="sandwich"), model.config)
    drawn = [sampler.weights(step, 0) for step in range(40)]
    assert all(weights[0] > 0 and weights[-1] > 0 for weights in drawn)
    assert all(sum(weight > 0 for weight in weights[1:-1]) == 1 for weights in drawn)
    assert {tuple(weights).index(max(weights[1:-1]), 1) for weights in drawn} == {1, 2, 3}
    assert all(sum(weights) == pytest.approx(1.0) for weights in drawn)
    # One draw for a step: its micro-batches train the same stages.
    assert drawn[7] == sampler.weights(7, 0) == sampler.weights(7, 1)
    assert all(sampler.weights(step, 3) == weights for step, weights in enumerate(drawn))


def test_sandwich_keeps_the_sum_and_the_proportions_of_the_weights():
    model = lively_model(stage_loss_weights=[0.5, 1.0, 2.0, 1.5], thinking_stages=[1, 2, 3, 4], num_attention_heads=4)
    sampler = build_stage_sampler(TrainingConfig(stage_sampling="sandwich"), model.config)
    first, *between, last = sampler.weights(0, 0)
    assert first + sum(between) + last == pytest.approx(5.0)
    assert last / first == pytest.approx(3.0)


@pytest.mark.parametrize("name", STAGE_SAMPLERS)
def test_stages_are_those_with_a_weight(name):
    model = lively_model(thinking_stages=[1, 2, 3, 4], num_attention_heads=4)
    sampler = build_stage_sampler(TrainingConfig(stage_sampling=name), model.config)
    for step in range(8):
        weights = sampler.weights(step, 0)
        assert sampler.stages(step, 0) == [stage for stage, weight in enumerate(weights) if weight]


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0]])
def test_all_gives_each_stage_its_own_weight(weights):
    sampler = build_stage_sampler(TrainingConfig(), lively_model(stage_loss_weights=weights).config)
    assert sampler.weights(3, 0) == (weights or [1 / 3] * 3)


def test_a_single_stage_has_weight_one():
    model = lively_model(thinking_stages=[2], stage_loss_weights=[0.25])
    assert build_stage_sampler(TrainingConfig(), model.config).weights(0, 0) == [1.0]


def test_refuses_steps_without_a_weight():
    model = lively_model(thinking_stages=[1, 2, 3, 4], num_attention_heads=4, stage_loss_weights=[0.0, 0.0, 1.0, 0.0])
    sampler = build_stage_sampler(TrainingConfig(stage_sampling="sandwich"), model.config)
    without = next(step for step in range(20) if 2 not in sampler.stages(step, 0))
    with pytest.raises(ValueError, match=rf"is 0 for all of the stages \[0, 1, 3\].* in step {without}"):
        sampler.weights(without, 0)


def test_refuses_unknown_names():
    with pytest.raises(
        ValueError, match=r"`stage_sampling` must be one of \['all', 'sandwich', 'one', 'accumulate'\], got 'random'"
    ):
        build_stage_sampler(TrainingConfig(stage_sampling="random"), lively_model().config)


def test_one_stage_per_step_or_per_micro_batch():
    """As often as their weights say, the same in every process and resumed run."""
    config = TrainingConfig(stage_sampling="one")
    sampler = STAGE_SAMPLERS["one"]([0.2, 0.3, 0.5], config)
    drawn = [sampler.stages(step, 0)[0] for step in range(1000)]
    assert drawn == [sampler.stages(step, 1)[0] for step in range(1000)]
    shares = torch.bincount(torch.tensor(drawn)) / 1000
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.3, 0.5]), atol=0.06, rtol=0)
    assert sampler.weights(0, 0) == [float(index == drawn[0]) for index in range(3)]
    several = STAGE_SAMPLERS["accumulate"]([0.2, 0.3, 0.5], config)
    assert len({several.stages(7, micro_batch)[0] for micro_batch in range(20)}) == 3
    assert several.stages(7, 3) == several.stages(7, 3)
