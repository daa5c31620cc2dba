import math

import pytest
import torch

from hf_thinkingvit.models.token_halting import HaltingState, halt, halting_scores
from hf_thinkingvit.models.token_halting_loss import depth_prior, prior_loss


def one_token(scores: list[float], epsilon: float) -> tuple[list[float], float, int]:
    """Plain computation for one token: weights of its outputs, ρ and depth. The last layer's score counts as 1."""
    cumulative, remainder, weights, ponder, depth = 0.0, 1.0, [], 0.0, 0
    for score in [*scores[:-1], 1.0]:
        cumulative, ponder, depth = cumulative + score, ponder + 1, depth + 1
        if cumulative >= 1 - epsilon:
            return [*weights, remainder], ponder + remainder, depth
        weights.append(score)
        remainder -= score


@pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.3])
def test_equals_the_definition_token_by_token(epsilon):
    scores = torch.rand(6, 3, 50, generator=torch.Generator().manual_seed(0)) ** 3
    state = HaltingState.start((3, 50), scores.device)
    active = torch.ones(3, 50, dtype=torch.bool)
    weights, ponder, depth = [], torch.zeros(3, 50), torch.zeros(3, 50)
    for layer in range(6):
        last = torch.ones_like(scores[layer]) if layer == 5 else scores[layer]
        step, state = halt(state, last, epsilon, active)
        weights.append(step.weight)
        ponder, depth = ponder + active + torch.where(step.halts, step.weight, 0.0), depth + active
        active = active & ~step.halts
    assert not active.any()
    weights = torch.stack(weights)
    torch.testing.assert_close(weights.sum(0), torch.ones(3, 50))
    for image in range(3):
        for token in range(50):
            expected, expected_ponder, expected_depth = one_token(scores[:, image, token].tolist(), epsilon)
            assert depth[image, token] == expected_depth
            assert ponder[image, token].item() == pytest.approx(expected_ponder, abs=1e-5)
            padded = expected + [0.0] * (6 - len(expected))
            assert weights[:, image, token].tolist() == pytest.approx(padded, abs=1e-5)


def test_scores_are_float32_of_the_gate_channel():
    tokens = torch.randn(4, 5, 8, dtype=torch.bfloat16)
    scores = halting_scores(tokens, scale=3.0, center=1.0, channel=2)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.sigmoid(3.0 * tokens[..., 2].float() - 1.0))


def test_prior_is_the_published_one():
    prior = depth_prior(12, target_depth=8, std=1.0)
    expected = [1.6475e-14, 2.9788e-11, 1.9813e-08, 4.8481e-06, 4.3641e-04, 0.014452, 0.17606, 0.789047]
    torch.testing.assert_close(prior[:8], torch.tensor(expected), atol=1e-6, rtol=1e-3)
    assert prior[:8].sum().item() == pytest.approx(0.98)
    assert prior[8].item() == pytest.approx(1.300918)


@pytest.mark.parametrize("target_depth, counted", [(0, 1), (0.5, 1), (1, 1), (2.5, 2), (3, 3), (6, 6)])
def test_prior_sums_to_its_mass_before_the_target(target_depth, counted):
    """At least one layer counts, also for a target below 1."""
    prior = depth_prior(6, target_depth, std=1.5)
    assert prior[:counted].sum().item() == pytest.approx(0.98)
    density = [math.exp(-0.5 * ((layer - target_depth) / 1.5) ** 2) for layer in range(6)]
    assert (prior / prior[0]).tolist() == pytest.approx([value / density[0] for value in density], rel=1e-5)


@pytest.mark.parametrize("size", [0.01, 1.0, 3.0])
def test_prior_loss_is_the_definition(size):
    """It depends on the layers' shares of the scores, not on their sum."""
    target, scores = depth_prior(6, 3, 1.0), size * torch.tensor([0.5, 0.2, 0.05, 0.0, 0.2, 0.05])
    share = (scores / scores.sum()).clamp(0.01, 0.99)
    expected = (target * (target.log() - share.log())).sum() / 6
    torch.testing.assert_close(prior_loss(scores, target), expected)


def test_prior_loss_is_finite_when_no_token_halts():
    scores = torch.zeros(6, requires_grad=True)
    loss = prior_loss(scores, depth_prior(6, 3, 1.0))
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all()
