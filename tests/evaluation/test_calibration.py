import math

import numpy as np
import pytest
import torch

from hf_thinkingvit.evaluation import StageAnswers, calibrate_budget, calibrate_risk, measure_stage_milliseconds
from hf_thinkingvit.evaluation.calibration import binomial_p_value, least_images, threshold_grid
from tests.utils import lively_model, lively_swin, random_images


def draw(images: int, seed: int, num_stages: int = 2) -> StageAnswers:
    """
    Images whose scores are uniform over the range of the entropy of 10 classes. The last stage is right on 90 %; an
    earlier stage that scores u (as a share of the range) is wrong where the last is right with probability u² / 4.
    """
    generator = np.random.default_rng(seed)
    shares = generator.random((images, num_stages))
    last = generator.random(images) < 0.9
    harmed = generator.random((images, num_stages)) < shares**2 / 4
    top1 = last[:, None] & ~harmed
    top1[:, -1] = last
    return StageAnswers(
        scores=torch.tensor(shares * math.log(10), dtype=torch.float32),
        top1=torch.tensor(top1),
        top5=torch.ones(images, num_stages, dtype=torch.bool),
        macs=tuple(10**9 * (stage + 1) for stage in range(num_stages)),
        criterion="topk_entropy",
        entropy_top_k=10,
        num_labels=10,
        dataset="simulated",
    )


def true_drop(threshold: float) -> float:
    """P(last right, exit wrong): 0.9 · ∫₀ᵗ u²/4 du for t = τ / ln 10."""
    share = min(threshold / math.log(10), 1.0)
    return 0.9 * share**3 / 12


def true_error(threshold: float) -> float:
    return 0.1 + true_drop(threshold)


@pytest.mark.parametrize("risk, truth, epsilon", [("accuracy_drop", true_drop, 0.02), ("error", true_error, 0.14)])
def test_the_promise_holds_at_its_level(risk, truth, epsilon):
    """1 000 calibration sets of 400 images: the true risk is above ε in at most δ of them, within chance."""
    delta, draws = 0.1, 1000
    grid = np.linspace(0.0, math.log(10) * 1.01, 60).tolist()
    broken, chosen = 0, []
    for seed in range(draws):
        try:
            found = calibrate_risk(draw(400, seed), epsilon, delta, risk, candidates=grid)
        except ValueError:  # no τ: no promise
            continue
        broken += truth(found.threshold) > epsilon
        chosen.append(found.threshold)
    allowed = delta + 3 * math.sqrt(delta * (1 - delta) / draws)
    assert broken / draws <= allowed
    assert np.median(chosen) > 0.3 * math.log(10)  # and it is not kept by doing nothing


def test_per_exit_promises_hold_too():
    """Three stages, Pareto testing: the achieved risk on 100 000 fresh images."""
    fresh, broken = draw(100_000, 10**6, num_stages=3), 0
    for seed in range(40):
        found = calibrate_risk(draw(1500, seed, num_stages=3), 0.03, 0.1, per_exit=True)
        assert len(found.threshold) == 2
        harmed = fresh.top1[:, -1] & ~fresh.at(fresh.top1, fresh.exit_stages(found.threshold))
        broken += harmed.float().mean().item() > 0.03
    assert broken <= 0.1 * 40 + 3 * math.sqrt(0.1 * 0.9 * 40)


def test_p_values_are_binomial():
    for failures, images, epsilon in ((0, 100, 0.03), (7, 150, 0.1), (40, 1000, 0.05)):
        exact = sum(math.comb(images, k) * epsilon**k * (1 - epsilon) ** (images - k) for k in range(failures + 1))
        assert binomial_p_value(failures, images, epsilon) == pytest.approx(exact, rel=1e-9)
    assert binomial_p_value(50, 50, 0.1) == 1.0


def test_says_how_many_images_it_takes():
    assert least_images(0.01, 0.05) == 299  # 0.99^299 < 0.05 < 0.99^298
    with pytest.raises(ValueError, match="298 images are too few.*takes 299 at the least"):
        calibrate_risk(draw(298, 0), 0.01, 0.05)
    calibrate_risk(draw(299, 0), 0.01, 0.05)


def test_says_when_only_the_last_stage_keeps_the_promise():
    answers = draw(400, 0)
    answers.top1[:, 0] = False  # every early exit of a right image harms
    found = calibrate_risk(answers, 0.02)
    assert answers.exit_stages(found.threshold).min() == 1 or found.achieved <= 0.02
    assert "No τ at which an image exits early" in calibrate_risk(answers, 0.02, candidates=[0.0, 2.3]).statement


def test_says_when_not_even_that_does():
    with pytest.raises(ValueError, match="not even the last stage"):
        calibrate_risk(draw(400, 0), 0.05, risk="error")


def test_criteria_that_exit_above():
    answers = draw(2000, 0)
    above = StageAnswers(
        scores=1 - answers.scores / math.log(10), top1=answers.top1, top5=answers.top5, macs=answers.macs,
        criterion="max_probability", entropy_top_k=10, num_labels=10, dataset="simulated",
    )  # fmt: skip
    below, found = calibrate_risk(answers, 0.02), calibrate_risk(above, 0.02)
    assert found.gmacs == pytest.approx(below.gmacs, rel=0.02)
    assert 0 < found.threshold < 1


def test_the_grid_covers_the_range_of_its_criterion():
    answers = StageAnswers(**{**vars(draw(50, 0)), "criterion": "mean_binary_entropy"})
    grid = threshold_grid(answers, steps=100)
    assert grid[0] == 0.0 and grid[-2] == pytest.approx(math.log(2)) and grid[-1] > math.log(2)


@pytest.mark.parametrize("criterion", ["topk_entropy", "entropy", "max_probability", "margin"])
def test_the_grid_goes_from_no_exit_to_all(criterion):
    answers = StageAnswers(
        **{**vars(draw(50, 0)), "criterion": criterion, "scores": torch.rand(50, 2) * 0.98 + 0.01},
    )
    grid = threshold_grid(answers)
    assert (answers.exit_stages(grid[0]) == 1).all()
    assert (answers.exit_stages(grid[-1]) == 0).all()


def test_budgets():
    answers = draw(3000, 0)
    found = calibrate_budget(answers, gmacs=1.5)
    assert found.gmacs == found.achieved <= 1.5
    finer = [answers.row(threshold) for threshold in np.linspace(0, 2.4, 4000)]
    assert found.top1 >= max(row["top1"] for row in finer if row["gmacs"] <= 1.5) - 0.1
    in_time = calibrate_budget(answers, milliseconds=1.5, stage_milliseconds=[1.0, 2.0])
    assert in_time.threshold == found.threshold
    with pytest.raises(ValueError, match="first stage alone takes 1 GMACs"):
        calibrate_budget(answers, gmacs=0.9)
    with pytest.raises(ValueError, match="Give one budget"):
        calibrate_budget(answers)
    with pytest.raises(ValueError, match="needs `stage_milliseconds`, 2 of them"):
        calibrate_budget(answers, milliseconds=1.5)


def test_per_exit_budgets_are_no_worse():
    answers = draw(2000, 1, num_stages=3)
    assert calibrate_budget(answers, gmacs=2.0, per_exit=True).top1 >= calibrate_budget(answers, gmacs=2.0).top1 - 0.3


@pytest.mark.parametrize("name, value", [("epsilon", 0.0), ("epsilon", 1.0), ("delta", float("nan"))])
def test_refuses_what_is_no_probability(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be above 0 and below 1"):
        calibrate_risk(draw(400, 0), **{"epsilon": 0.1, name: value})


def test_is_saved_with_the_model(tmp_path):
    model = lively_model(thinking_stages=[2, 4])
    found = calibrate_risk(draw(2000, 0), 0.02)
    found.apply(model)
    model.save_pretrained(tmp_path)
    config = type(model).from_pretrained(tmp_path).config
    assert config.threshold == found.threshold
    facts = config.calibration
    assert (facts["epsilon"], facts["delta"], facts["images"], facts["dataset"]) == (0.02, 0.05, 2000, "simulated")


@pytest.mark.parametrize("make", [lively_model, lively_swin], ids=["vit", "swin"])
def test_times_of_stages(make):
    model = make()
    times = measure_stage_milliseconds(model, random_images(2), repeats=3)
    assert len(times) == 3
    assert all(time > 0 for time in times)
