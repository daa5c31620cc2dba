"""The picture of `benchmarks.compare`: accuracy against cost and against speed, one column for each kind of method."""

from typing import Any

from benchmarks.compare_methods import GROUPS
from hf_thinkingvit.evaluation.plots import BLACK, BLUE, GREEN, ORANGE, PURPLE


GREY = "0.5"
# In every column: the methods of no group. Plain nets are points, which have no line.
REFERENCES = [(GREY, "v", ""), (GREY, "^", ""), (GREY, "s", ""), (BLACK, "o", "-"), (BLACK, "o", ":")]
# In a column, each method has a colour, a marker and a line of its own; the last three colours are Okabe and Ito's too,
# or dark enough beside them.
STYLES = [
    (BLUE, "s", "-"),
    (ORANGE, "D", "--"),
    (GREEN, "^", "-."),
    (PURPLE, "v", ":"),
    ("#56B4E9", "P", "--"),
    ("#E69F00", "X", "-"),
    ("#8C510A", "<", "-."),
]
MARKED = 8  # of a sweep with many thresholds, about so many have a marker


def draw(results: dict[str, dict[str, Any]]) -> Any:
    """
    Args:
        results (`dict`): of each method its `title` and `points`, in the order of their cost: `gmacs`, `top1`,
            `top1_se` and `images_per_second` (the last two may be `None`), and `threshold` of a sweep.

    Returns:
        A matplotlib `Figure`.
    """
    from matplotlib.figure import Figure

    grouped = {name for names in GROUPS.values() for name in names}
    references = [name for name in results if name not in grouped]
    columns = {title: [name for name in names if name in results] for title, names in GROUPS.items()}
    columns = {title: names for title, names in columns.items() if names} or {"": []}
    timed = any(point["images_per_second"] is not None for result in results.values() for point in result["points"])
    rows = ("gmacs", "images_per_second") if timed else ("gmacs",)
    figure = Figure(figsize=(1.5 + 4.6 * len(columns), 0.6 + 4.6 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(columns), sharey=True, sharex="row", squeeze=False)
    for column, (title, names) in enumerate(columns.items()):
        for row, measure in enumerate(rows):
            axes = panels[row][column]
            for styles, shown in ((REFERENCES, references), (STYLES, names)):
                for index, name in enumerate(shown):
                    _line(axes, results[name], measure, styles[index % len(styles)])
            _finish(axes, measure)
        panels[0][column].set_title(title, fontsize=11)
        handles, labels = panels[0][column].get_legend_handles_labels()
        own = handles[len(references) :], labels[len(references) :]
        if names:
            panels[-1][column].legend(*own, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    for axes in panels[:, 0]:
        axes.set_ylabel("top-1 accuracy (%)")
    legend = handles[: len(references)], labels[: len(references)]
    figure.legend(*legend, loc="outside upper center", ncols=5, frameon=False)
    return figure


def _line(axes: Any, result: dict[str, Any], measure: str, style: tuple[str, str, str]) -> None:
    color, marker, line = style
    points = [point for point in result["points"] if point[measure] is not None]
    across = [point[measure] * (1e3 if measure == "gmacs" else 1) for point in points]
    top1, errors = [point["top1"] for point in points], [point["top1_se"] or 0.0 for point in points]
    every = max(1, round(len(points) / MARKED)) if points and "threshold" in points[0] else 1
    look = {"color": color, "marker": marker, "linestyle": line, "linewidth": 1.4}
    look |= {"markersize": 5 if line else 8, "zorder": 2 if line else 3}  # single points stay visible
    if any(errors):
        axes.errorbar(across, top1, errors, fmt="none", ecolor=color, elinewidth=0.6, errorevery=every)
    axes.plot(across, top1, markevery=every, label=result["title"], **look)


def _finish(axes: Any, measure: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.set_xscale("log")
    axes.set_xlabel("mean MMACs per image" if measure == "gmacs" else "images per second")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())  # beside those, its labels would cover each other
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
