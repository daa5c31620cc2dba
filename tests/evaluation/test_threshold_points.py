"""The τ of a sweep: where exits change, no two alike; and the labels of its plot."""

from itertools import pairwise

import pytest
import torch

from hf_thinkingvit.evaluation import StageAnswers
from hf_thinkingvit.evaluation.plots import plot_accuracy_against_macs
from hf_thinkingvit.evaluation.threshold_points import distinct_thresholds
from hf_thinkingvit.evaluation.wording import distinct_labels


def answers(scores: list[list[float]], criterion: str = "topk_entropy", **options) -> StageAnswers:
    scores = torch.tensor(scores)
    right = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    return StageAnswers(
        scores, right, right, tuple(range(10, 10 * scores.shape[1] + 1, 10)), criterion, 10, 10, "data", **options
    )


@pytest.mark.parametrize("exit_at_threshold", [False, True])
@pytest.mark.parametrize("criterion", ["topk_entropy", "max_probability", "margin"])
@pytest.mark.parametrize("num_stages", [2, 3])
def test_no_two_rows_are_equal_and_both_ends_are_there(criterion, num_stages, exit_at_threshold):
    """Scores that crowd in a small part of the criterion's range, as those of good models do."""
    scores = 0.9 + 0.001 * torch.rand(300, num_stages, generator=torch.Generator().manual_seed(1))
    measured = answers(scores.tolist(), criterion, exit_at_threshold=exit_at_threshold)
    rows = [measured.row(threshold) for threshold in distinct_thresholds(measured, 12)]
    assert 8 <= len(rows) <= 12
    costs = [row["gmacs"] for row in rows]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == len(costs)
    assert rows[0]["exit_shares"][-1] == 1 and rows[-1]["exit_shares"][0] == 1
    assert max(one - other for one, other in pairwise(costs)) < 0.35 * (costs[0] - costs[-1])


def test_equal_scores_are_one_step():
    thresholds = distinct_thresholds(answers([[0.5, 0.0]] * 20 + [[1.5, 0.0]] * 20), 12)
    assert len(thresholds) == 3
    assert thresholds[0] == 0 and 0.5 < thresholds[1] < 1.5 < thresholds[2]
    assert len(f"{thresholds[1]:g}") <= 3  # a number that can be read


def test_labels_do_not_repeat():
    assert distinct_labels([1.131, 1.134, 2.0]) == ["1.131", "1.134", "2"]
    assert distinct_labels([0.5, 1.0]) == ["0.5", "1"]
    pytest.importorskip("matplotlib")
    measured = answers((0.9 + 0.001 * torch.rand(300, 2)).tolist())
    rows = [measured.row(threshold) for threshold in distinct_thresholds(measured)]
    axes = plot_accuracy_against_macs(measured, rows).axes[0]
    labels = [text.get_text() for text in axes.texts]
    assert 4 <= len(labels) == len(set(labels))
    assert len(axes.lines[0].get_xdata()) == len(rows)  # the points of the table


def test_the_models_own_threshold_is_one_of_the_points():
    """In its place, and instead of one that gives the same exits."""
    measured = answers([[score, 0.0] for score in torch.linspace(0.05, 1.95, 39).tolist()])
    points = distinct_thresholds(measured, 12)
    for own in (0.0, 0.777, [1.234], 2.2):
        shown = distinct_thresholds(measured, 12, own)
        assert own in shown and len(shown) <= 13
        shares = [measured.row(threshold)["exit_shares"][0] for threshold in shown]
        assert shares == sorted(set(shares))
    assert distinct_thresholds(measured, 12, 0.777) != points


def test_labels_tell_thresholds_apart():
    assert distinct_labels([1.2345678, 1.2345699, 2.0]) == ["1.234568", "1.23457", "2"]
    assert distinct_labels([[0.123456, 1.0], [0.12345, 1.0]]) == ["0.12346, 1", "0.12345, 1"]
    assert distinct_labels([0.5, 0.5]) == ["0.5", "0.5"]
