import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binom

from hf_thinkingvit import EXIT_CRITERIA
from hf_thinkingvit.evaluation import (
    StageAnswers,
    calibrate_accuracy,
    calibrate_budget,
    calibrate_risk,
    measure_stage_milliseconds,
    stage_times,
)
from hf_thinkingvit.evaluation.calibration import _grid, _pareto_order, binomial_p_value, least_images, threshold_grid
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


def most_allowed(draws: int, delta: float, chance: float = 1e-4) -> int:
    """The number of broken promises in `draws` that is reached with probability `chance` if each breaks with δ."""
    return int(binom.isf(chance, draws, delta))


def best_on_these(answers: StageAnswers, grid: list[float], epsilon: float, risk: str) -> float:
    """An invalid method: the greatest τ whose risk on the calibration images themselves is at most ε."""
    right = answers.top1.T.gather(0, answers.exit_stages_of_each(grid))
    failed = ~right & answers.top1[:, -1] if risk == "accuracy_drop" else ~right
    return max((tau for tau, share in zip(grid, failed.double().mean(1).tolist()) if share <= epsilon), default=grid[0])


@pytest.mark.parametrize("risk, truth, epsilon", [("accuracy_drop", true_drop, 0.02), ("error", true_error, 0.14)])
def test_the_promise_holds_at_its_level(risk, truth, epsilon):
    """In at most δ of 500 calibration sets of 400 images the true risk is above ε; more with the invalid method."""
    delta, draws = 0.1, 500
    grid = np.linspace(0.0, math.log(10) * 1.01, 60).tolist()
    broken, cheated, chosen = 0, 0, []
    for seed in range(draws):
        answers = draw(400, seed)
        cheated += truth(best_on_these(answers, grid, epsilon, risk)) > epsilon
        try:
            found = calibrate_risk(answers, epsilon, delta, risk, candidates=grid)
        except ValueError:  # no promise possible
            continue
        broken += truth(found.threshold) > epsilon
        chosen.append(found.threshold)
    assert broken <= most_allowed(draws, delta) < cheated
    assert np.median(chosen) > 0.3 * math.log(10)  # the promise does not hold because nothing exits


def test_per_exit_promises_hold_where_a_cheat_breaks_them():
    """
    Three stages, of which the early ones are wrong on 22 % of images whatever they score. ε is 20 %, so that many pairs
    of τ have a risk just above it. Choosing the order of the tests on the images that are then tested favours τ whose
    risk these images underestimate, and breaks the promise more often than δ.
    """
    epsilon, harm, delta, draws, broken, cheated = 0.2, 0.22, 0.3, 150, 0, 0

    def true_risk(thresholds: list[float]) -> float:
        first, second = (min(threshold / math.log(10), 1.0) for threshold in thresholds)
        return harm * (first + (1 - first) * second)

    for seed in range(draws):
        generator = np.random.default_rng(seed)
        top1 = torch.tensor(generator.random((200, 3)) >= harm)
        top1[:, -1] = True
        scores = torch.tensor(generator.random((200, 3)) * math.log(10), dtype=torch.float32)
        answers = replace(draw(200, seed, num_stages=3), scores=scores, top1=top1, macs=(1, 2, 100))
        found = calibrate_risk(answers, epsilon, delta, per_exit=True)
        assert len(found.threshold) == 2 and found.images == 100
        broken += true_risk(found.threshold) > epsilon
        order = _pareto_order(answers, "accuracy_drop")
        cheated += true_risk(calibrate_risk(answers, epsilon, delta, candidates=order).threshold) > epsilon
    assert broken <= most_allowed(draws, delta) < cheated


def test_tests_end_at_the_first_that_fails():
    """After a failed test, further tests would exceed the level δ."""
    answers = draw(2000, 0)
    safe, harmful = 0.2, 2.4
    assert calibrate_risk(answers, 0.02, candidates=[0.0, safe]).threshold == safe
    assert calibrate_risk(answers, 0.02, candidates=[0.0, harmful, safe]).threshold == 0.0


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
    """All images have the same score at stage 0 and are wrong there: if τ lets one exit, all exit."""
    answers = draw(400, 0)
    answers.scores[:, 0] = 1.0
    answers.top1[:, 0] = False
    found = calibrate_risk(answers, 0.02)
    assert (answers.exit_stages(found.threshold) == 1).all() and found.achieved == 0.0
    assert "No τ at which an image exits early" in found.statement
    answers.top1[:, 0] = answers.top1[:, 1]  # stage 0 is now as accurate as the last
    found = calibrate_risk(answers, 0.02)
    assert (answers.exit_stages(found.threshold) == 0).all()
    assert "No τ at which an image exits early" not in found.statement


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
    criterion = EXIT_CRITERIA[criterion]
    limit = criterion.maximum(10, 10)
    steps = np.arange(1000 + 1 + criterion.exits_below) * limit / 1000  # beyond the range if it exits below τ
    np.testing.assert_allclose(grid, steps if criterion.exits_below else steps[::-1], atol=1e-9)


def test_budgets():
    answers = draw(3000, 0)
    found = calibrate_budget(answers, gmacs=1.5)
    assert found.gmacs == found.achieved <= 1.5
    assert found.top1 == pytest.approx(answers.row(found.threshold)["top1"])
    finer = [answers.row(threshold) for threshold in np.linspace(0, 2.4, 4000)]
    assert found.top1 >= max(row["top1"] for row in finer if row["gmacs"] <= 1.5) - 0.1
    in_time = calibrate_budget(answers, milliseconds=1.5, stage_milliseconds=[1.0, 2.0])
    assert in_time.threshold == found.threshold
    with pytest.raises(ValueError, match="the cheapest takes 1 GMACs"):
        calibrate_budget(answers, gmacs=0.9)
    with pytest.raises(ValueError, match="Give one budget"):
        calibrate_budget(answers)
    with pytest.raises(ValueError, match="needs `stage_milliseconds`, 2 of them"):
        calibrate_budget(answers, milliseconds=1.5)


@pytest.mark.parametrize("cost", [0.05, 0.07, 1.1, 3.97])
def test_a_budget_of_just_what_a_stage_takes_is_kept(cost):
    """These costs are rounded up in float32, and their float64 means over many images round either way."""
    answers = replace(draw(997, 0), macs=(round(cost * 1e9), round(4 * cost * 1e9)))
    for budget, stage in ((cost, 0), (4 * cost, 1)):
        alone = 100 * answers.top1[:, stage].double().mean().item()
        times = [cost, 4 * cost]
        for found in (
            calibrate_budget(answers, gmacs=budget),
            calibrate_budget(answers, milliseconds=budget, stage_milliseconds=times),
        ):
            assert found.achieved <= budget * (1 + 1e-9) and found.top1 >= alone - 1e-9


@pytest.mark.parametrize("num_stages, per_exit", [(2, False), (2, True), (3, False), (3, True)])
def test_one_threshold_unless_exits_are_to_have_their_own(num_stages, per_exit):
    answers = draw(500, 1, num_stages)
    for found in (
        calibrate_budget(answers, gmacs=1.7, per_exit=per_exit),
        calibrate_risk(answers, 0.1, per_exit=per_exit),
    ):
        assert np.shape(found.threshold) == ((2,) if per_exit and num_stages == 3 else ())


@pytest.mark.parametrize("num_stages", [3, 4, 5, 6])
def test_the_combinations_of_thresholds_stay_few(num_stages):
    """However many exits there are, because each combination is evaluated on every image."""
    grid = _grid(draw(10, 0, num_stages), per_exit=True, levels=24)
    assert 500 < len(grid) < 35_000 and {len(thresholds) for thresholds in grid} == {num_stages - 1}
    assert all(0.0 in column and max(column) > math.log(10) for column in zip(*grid))


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
def test_times_of_stages(make, monkeypatch):
    """With a clock that only stages advance: by 1, 2 and 4 s, more during warm-up, and once far more."""
    model, now, calls = make(threshold=99.0).train(), [0.0], [0, 0, 0]  # at this τ every image would exit at stage 0
    run_stage = model.run_stage

    def slow_stage(stage_index, state, *args, **kwargs):
        calls[stage_index] += 1
        rounds = calls[2]  # calls of the last stage
        now[0] += 2.0**stage_index + (500.0 if rounds < 2 or calls[stage_index] == 9 else 0.0)
        return run_stage(stage_index, state, *args, **kwargs)

    model.run_stage = slow_stage
    monkeypatch.setattr(stage_times, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    times = measure_stage_milliseconds(model, random_images(2), repeats=5)
    assert times == [500.0, 1500.0, 3500.0]  # per image of a batch of two
    assert calls == [21, 14, 7]  # stage 0 in each of the three passes of each round, two of them to warm up
    assert model.training


def test_without_limit_and_budget_the_most_accurate_threshold_is_the_cheapest_of_such():
    answers = draw(200, seed=0)
    found = calibrate_accuracy(answers)
    rows = [answers.row(threshold) for threshold in threshold_grid(answers)]
    best = max(row["top1"] for row in rows)
    assert found.top1 == best and found.gmacs == min(row["gmacs"] for row in rows if row["top1"] == best)
    assert found.achieved == best / 100 and f"on 200 images ({best:.2f} %)" in found.statement
    assert found.statement.endswith("promises nothing for others.")
    assert calibrate_budget(answers, gmacs=1.5).statement.endswith("promises nothing for others.")
