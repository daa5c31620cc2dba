"""
Plots of the results of a sweep. Series differ in line style and marker as well as in colour, with Okabe and Ito's
palette for the colour-blind, so that they can be read in grey too. Needs matplotlib.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..public_names import public_name
from .segmentation import StageConfusions
from .splits import ALL, UNKNOWN
from .sweep import StageAnswers
from .wording import distinct_labels


BLUE, ORANGE, GREEN, PURPLE, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"
STYLES = [(BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, "-.", "^"), (PURPLE, ":", "D"), (BLACK, "-", "v")]


def _figure(**options) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot, which needs a window system and has global state

    figure = Figure(figsize=(6.4, 4.4), layout="constrained", **options)
    axes = figure.add_subplot()
    axes.grid(color="0.88", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Any, path: Path) -> list[Path]:
    """Write the figure as PNG and as SVG, beside each other under the name of `path`. Returns both paths."""
    files = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=150)
    return files


def plot_accuracy_against_macs(
    answers: StageAnswers, rows: Sequence[dict[str, Any]], marked: Sequence[float] = ()
) -> Any:
    """
    Plot accuracy over mean cost as τ varies, with a mark for each row, and each stage alone for comparison.

    Args:
        answers (`StageAnswers`): of the sweep.
        rows (`list[dict]`): of the sweep, each with one τ; in any order.
        marked (`list[float]`): values of τ to label; by default at most six, evenly spread in cost.

    Returns:
        A matplotlib `Figure`.
    """
    figure, axes = _figure()
    (scale, unit), (measure, words, percent) = _unit(answers), _measure(answers)
    rows = sorted(rows, key=lambda row: (row["gmacs"], row[measure]))
    costs, accuracies = [row["gmacs"] * scale for row in rows], [percent * row[measure] for row in rows]
    axes.plot(costs, accuracies, "-o", color=BLUE, linewidth=2, markersize=4, label="τ varies")
    labelled = [row for row in rows if row["threshold"] in marked] if marked else _spread_in_cost(rows, 6)
    for row, label in zip(labelled, distinct_labels([row["threshold"] for row in labelled], 2)):
        point = row["gmacs"] * scale, percent * row[measure]
        axes.plot(*point, "o", color=BLUE, markersize=7)
        axes.annotate(f"τ = {label}", point, xytext=(6, -13), textcoords="offset points", fontsize=9)
    for stage, row in enumerate(answers.stage_rows()):
        color, _, marker = STYLES[(stage + 1) % len(STYLES)]
        point = row["gmacs"] * scale, percent * row[measure]
        label = f"stage {stage} for every image"
        axes.plot(*point, marker, color=color, markersize=9, markeredgecolor=BLACK, linestyle="none", label=label)
    axes.set_xlabel(f"mean {unit} per image")
    axes.set_ylabel(f"{words} (%)")
    axes.set_title(_title(answers), fontsize=10)
    axes.margins(x=0.1, y=0.12)
    axes.legend(loc="lower right", frameon=False)
    return figure


def _spread_in_cost(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most `count` of rows in order of cost, the nearest to evenly spread costs, none of them twice."""
    if not rows:
        return []
    low, high = rows[0]["gmacs"], rows[-1]["gmacs"]
    goals = [low + (high - low) * part / (count - 1) for part in range(count)]
    nearest = [min(range(len(rows)), key=lambda index: abs(rows[index]["gmacs"] - goal)) for goal in goals]
    chosen: list[int] = []
    for index in sorted(set(nearest)):
        # Labels of points that lie closer than half of the even distance would cover each other.
        if not chosen or rows[index]["gmacs"] - rows[chosen[-1]]["gmacs"] > (high - low) / (2 * (count - 1)):
            chosen.append(index)
    return [rows[index] for index in chosen]


def plot_score_histogram(answers: StageAnswers, stage: int = 0, bins: int = 40) -> Any:
    """Plot the histogram of a stage's exit scores, for right and for wrong answers. Returns a matplotlib `Figure`."""
    figure, axes = _figure()
    scores, right = answers.scores[:, stage].numpy(), answers.top1[:, stage].numpy()
    limits = (float(scores.min()), max(float(scores.max()), float(scores.min()) + 1e-6))
    axes.hist(scores[right], bins=bins, range=limits, color=BLUE, alpha=0.55, label="right")
    axes.hist(
        scores[~right],
        bins=bins,
        range=limits,
        histtype="step",
        hatch="////",
        color=ORANGE,
        linewidth=1.5,
        label="wrong",
    )
    axes.set_xlabel(f"{answers.criterion} of stage {stage}")
    axes.set_ylabel("images")
    axes.set_title(_title(answers), fontsize=10)
    axes.legend(frameon=False)
    return figure


def plot_exit_shares(answers: StageAnswers, rows: Sequence[dict[str, Any]]) -> Any:
    """
    Plot the share of images that exit at each stage over τ, for the rows with one τ for all exits. Returns a matplotlib
    `Figure`.
    """
    figure, axes = _figure()
    rows = [row for row in rows if not isinstance(row["threshold"], Sequence)]
    rows = sorted(rows, key=lambda row: row["threshold"])
    for stage in range(answers.num_stages):
        color, line, marker = STYLES[stage % len(STYLES)]
        shares = [100 * row["exit_shares"][stage] for row in rows]
        options = {"marker": marker, "markevery": max(1, len(rows) // 10), "linewidth": 2, "color": color}
        axes.plot([row["threshold"] for row in rows], shares, line, label=f"leave after stage {stage}", **options)
    axes.set_xlabel("τ")
    axes.set_ylabel(f"share of {'windows' if isinstance(answers, StageConfusions) else 'images'} (%)")
    axes.set_ylim(-2, 102)
    axes.set_title(_title(answers), fontsize=10)
    axes.legend(frameon=False)
    return figure


def _title(answers: StageAnswers) -> str:
    split = "" if answers.split in (ALL, UNKNOWN) else f", split {answers.split}"
    return f"{public_name(answers.dataset)}{split}, {len(answers)} images"


def _measure(answers: StageAnswers | StageConfusions) -> tuple[str, str, float]:
    """Name of what is plotted, in words, and what it is multiplied by for percentages."""
    return ("mean_iou", "mean IoU", 100.0) if isinstance(answers, StageConfusions) else ("top1", "top-1 accuracy", 1.0)


def _unit(answers: StageAnswers) -> tuple[float, str]:
    return (1.0, "GMACs") if answers.macs[-1] >= 1e8 else (1e3, "MMACs")
