"""Chooses the few τ that a table or plot of a sweep shows: where the exits of the measured images change."""

import numpy as np
import torch

from .calibration import threshold_grid
from .sweep import StageAnswers, Threshold


POINTS = 12  # as many as a table of a card shows


def distinct_thresholds(
    answers: StageAnswers, count: int = POINTS, including: Threshold | None = None
) -> list[Threshold]:
    """
    At most `count` values of τ (one for all exits) at quantiles of the scores, no two of which give the same exits,
    from one at which no image exits early to one at which all do, if there are such. Each is a decimal number with the
    fewest digits that give its exits.

    Args:
        answers (`StageAnswers`): of the images.
        count (`int`): at least 2.
        including (`float` or `list[float]`, *optional*): one more τ, such as the model's own, in the place of one that
            gives the same exits.

    Returns:
        `list`: ordered so that more and more images exit early.
    """
    grid = threshold_grid(answers)
    strict, loose = float(np.float32(grid[0])), float(np.float32(grid[-1]))  # no image exits early, all do
    scores = answers.scores[:, :-1].flatten()
    values, counts = scores[scores.isfinite()].unique(return_counts=True)
    if strict > loose:
        values, counts = values.flip(0), counts.flip(0)
    # τ can lie between two different scores; the cumulative counts say which share of all scores is on its one side.
    below = counts.cumsum(0)
    goals = torch.linspace(0, 1, count)[1:] * int(counts.sum())
    steps = (below[:, None] - goals).abs().argmin(dim=0).unique().tolist() if len(below) else []
    values = [*values.tolist(), loose]
    between = [shortest_between(values[step], values[step + 1]) for step in steps]
    candidates = [strict, *(threshold for threshold in between if threshold is not None)]
    exits = answers.exit_stages_of_each(candidates)
    chosen: list[int] = []
    for index in range(len(candidates)):
        if not chosen or not torch.equal(exits[index], exits[chosen[-1]]):
            chosen.append(index)
    thresholds: list[Threshold] = [candidates[index] for index in chosen]
    return thresholds if including is None else _with_another(answers, thresholds, including)


def _with_another(answers: StageAnswers, thresholds: list[Threshold], another: Threshold) -> list[Threshold]:
    """The thresholds with `another` where the mean exit is as early as at it, and without those of the same exits."""
    *exits, its_exits = answers.exit_stages_of_each([*thresholds, another])
    others = [
        (threshold, each.double().mean().item())
        for threshold, each in zip(thresholds, exits)
        if not torch.equal(each, its_exits)
    ]
    place = sum(mean >= its_exits.double().mean().item() for _, mean in others)
    ordered = [threshold for threshold, _ in others]
    return [*ordered[:place], another, *ordered[place:]]


def shortest_between(one: float, other: float) -> float | None:
    """A decimal number of few digits strictly between two float32, also as a float32; `None` if there is none."""
    low, high = min(one, other), max(one, other)
    for digits in range(1, 12):
        scale = 10.0**digits
        middle = round((low + high) / 2 * scale) / scale
        if low < float(np.float32(middle)) < high:
            return middle
    return None
