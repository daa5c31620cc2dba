"""
Pictures of a model's answers image by image: classes that gain and lose, histograms of entropy, and the images that are
easiest and hardest. Needs matplotlib.
"""

import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .image_answers import ImageAnswers
from .plots import BLUE, ORANGE
from .stages import Threshold


SHOWN_CLASSES = 15  # at each end of a ranking
GRID_COLUMNS = 6
LONGEST_NAME = 28  # characters
TITLE_CHARACTERS = 11  # in an inch


def plot_classes(rows: Sequence[dict[str, Any]], title: str) -> Any:
    """
    The rows of a table by class (`class_table`) as bars, greatest first: of `gain`, or else of an A-ViT's `depth`, or
    else of `top1`. Of many classes, those at both ends. Returns a matplotlib `Figure`.
    """
    words = {
        "gain": "gain (percentage points)",
        "depth": "mean layers of a token",
        "top1": "top-1 accuracy (%)",
        "iou": "IoU (%)",
    }
    key = next(name for name in words if name in rows[0])
    rows = sorted(rows, key=lambda row: row[key])
    names, values = [_short(row["class"]) for row in rows], [row[key] for row in rows]
    if len(rows) > 2 * SHOWN_CLASSES:
        names = [*names[:SHOWN_CLASSES], "…", *names[-SHOWN_CLASSES:]]
        values = [*values[:SHOWN_CLASSES], np.nan, *values[-SHOWN_CLASSES:]]
    figure = _new_figure(7.0, 1.2 + 0.26 * len(names))
    axes = figure.add_subplot()
    bars = axes.barh(range(len(names)), values, color=[ORANGE if value < 0 else BLUE for value in values])
    form = "+.1f" if key == "gain" else ".1f"
    axes.bar_label(bars, ["" if np.isnan(value) else f"{value:{form}}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=9, parse_math=False)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set_xlabel(words[key])
    _set_title(figure, title)
    axes.margins(x=0.12)
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.grid(axis="x", color="0.88", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_histograms(
    rows: Sequence[dict[str, Any]], title: str, kind: str = "stage", thresholds: Sequence[float] = ()
) -> Any:
    """
    The rows of `entropy_histogram`, one panel for each answer, with right and wrong answers apart. `kind` is what the
    answers are of; `thresholds` are the τ to mark, where τ is on the scale of the entropy. Returns a `Figure`.
    """
    answers = sorted({row["answer"] for row in rows})
    names = [name for name in ("right", "wrong", "count") if name in rows[0]]
    figure = _new_figure(6.6, 1.0 + 2.1 * len(answers))
    panels = figure.subplots(len(answers), 1, sharex=True, squeeze=False)[:, 0]
    styles = {
        "right": {"color": BLUE, "alpha": 0.55},
        "wrong": {"color": ORANGE, "fill": False, "hatch": "////", "linewidth": 1.5},
        "count": {"color": BLUE, "alpha": 0.55},
    }
    for answer, axes in zip(answers, panels):
        shown = [row for row in rows if row["answer"] == answer]
        edges = [row["low"] for row in shown] + [shown[-1]["high"]]
        for name in names:
            counts = [row[name] for row in shown]
            label = None if name == "count" else f"{name} ({sum(counts)})"
            axes.stairs(counts, edges, **({"fill": True} | styles[name]), label=label, **_edge(styles[name]))
        if answer < len(thresholds):
            axes.axvline(thresholds[answer], color="0.2", linestyle=":", label=f"τ = {thresholds[answer]:.3g}")
        axes.set_title("all answers" if kind == "model" else f"{kind} {answer}", fontsize=10, loc="left")
        axes.set_ylabel("windows" if names == ["count"] else "images")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("entropy of the answer (nats)")
    _set_title(figure, title)
    return figure


def plot_examples(answers: ImageAnswers, count: int, title: str, threshold: Threshold | None = None) -> Any:
    """
    The `count` easiest and the `count` hardest images, with their answers up to the accepted one under τ: by the
    entropy of the first answer, or for an A-ViT by the mean depth of the tokens. All classes have their turn: of each,
    as few images as fill the places. Returns a matplotlib `Figure`.
    """
    by_depth = answers.depths is not None
    order = hardness(answers).argsort(stable=True).tolist()
    count = min(count, max(len(order) // 2, 1))
    labels = answers.labels.tolist()
    groups = [extremes(order, labels, count), extremes(order[::-1], labels, count)[::-1]]
    most = max(Counter(labels[index] for index in group).most_common(1)[0][1] for group in groups)
    columns = min(count, GRID_COLUMNS)
    lines = 1 + answers.num_answers if answers.stages is not None else 3
    figure_rows = -(-count // columns)
    figure = _new_figure(1.85 * columns, 2 * figure_rows * (1.55 + 0.19 * lines) + 1.1)
    _set_title(figure, title)
    accepted = answers.accepted(threshold)
    kinds = ("the fewest layers a token", "the most layers a token") if by_depth else ("most certain", "least certain")
    for part, indices, kind in zip(figure.subfigures(2, 1), groups, kinds):
        first = "" if by_depth or answers.num_answers == 1 else f" after {answers.kind} 0"
        part.suptitle(f"{kind}{first} (at most {most} of a class)", fontsize=10, x=0.02, ha="left", fontweight="bold")
        axes = part.subplots(figure_rows, columns, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, index in zip(axes.flat, indices):
            axis.imshow(answers.image(index))
            stop = int(accepted[index])
            color = "black" if answers.right[index, stop] else ORANGE
            axis.set_title(_caption(answers, index, stop), fontsize=7.5, color=color, parse_math=False, linespacing=1.2)
    return figure


def extremes(order: Sequence[int], labels: Sequence[int], count: int) -> list[int]:
    """The first `count` of `order` with at most `limit` of each label, for the smallest `limit` that gives as many."""
    for limit in range(1, count + 1):
        seen: Counter[int] = Counter()
        chosen = []
        for index in order:
            if len(chosen) < count and seen[labels[index]] < limit:
                seen[labels[index]] += 1
                chosen.append(index)
        if len(chosen) == count:
            break
    return chosen


def hardness(answers: ImageAnswers) -> torch.Tensor:
    """The mean depth of an A-ViT's tokens, else the entropy of the first answer; greatest where that is not finite."""
    if answers.depths is not None:
        return answers.depths
    return answers.entropies[:, 0].nan_to_num(nan=float("inf"))


def _caption(answers: ImageAnswers, index: int, stop: int) -> str:
    """The label, and the answers that an image is given until one is accepted."""
    lines = [f"label: {_short(answers.label_names[int(answers.labels[index])])}"]
    shown = range(stop + 1) if answers.stages is not None else [stop]
    for answer in shown:
        name = _short(answers.class_names[int(answers.predicted[index, answer])])
        mark = "✓" if answers.right[index, answer] else "✗"
        facts = f"{answers.confidences[index, answer]:.0%}, H {answers.entropies[index, answer]:.2f}"
        lines.append(f"{f'{answer}: ' if answers.stages is not None else ''}{name} {mark} {facts}")
    if answers.depths is not None:
        lines.append(f"{answers.depths[index]:.1f} layers")
    return "\n".join(lines)


def _set_title(figure: Any, title: str) -> None:
    """Over the whole figure, in as many lines as it takes."""
    lines = textwrap.wrap(title, round(TITLE_CHARACTERS * figure.get_figwidth()))
    figure.suptitle("\n".join(lines), fontsize=10, parse_math=False)


def _short(name: str) -> str:
    name = name.split(",")[0]
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _edge(style: dict[str, Any]) -> dict[str, Any]:
    return {} if style.get("fill", True) else {"edgecolor": style["color"]}


def _new_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # not pyplot, which needs a window system and has global state

    return Figure(figsize=(width, height), layout="constrained")
