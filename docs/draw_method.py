"""
Draws docs/method.svg: how ThinkingViT answers.

    python docs/draw_method.py
"""

import argparse
from itertools import pairwise
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from PIL import Image


DOCS = Path(__file__).resolve().parent
PHOTOGRAPH = DOCS.parent / "examples" / "images" / "horse.png"
BLUE, ORANGE, GREEN, INK, FAINT, LINE = "#0072B2", "#D55E00", "#009E73", "#1f2328", "#e4e8ee", "#57606a"
HEADS, FEW = 6, 3
WIDTH, HEIGHT = 16.0, 7.6  # units of the drawing


def text(axes: plt.Axes, x: float, y: float, words: str, size: float = 13, color: str = INK, **options) -> None:
    axes.text(x, y, words, fontsize=size, color=color, **{"ha": "center", "va": "center"} | options)


def arrow(axes: plt.Axes, *points: tuple[float, float], color: str = LINE) -> None:
    """An arrow along straight lines through `points`."""
    for start, end in pairwise(points[:-1]):
        axes.plot(*zip(start, end), color=color, linewidth=2, solid_capstyle="round")
    axes.add_patch(
        FancyArrowPatch(
            points[-2], points[-1], arrowstyle="-|>", mutation_scale=18, color=color, linewidth=2, shrinkA=0, shrinkB=0
        )
    )


def stage(axes: plt.Axes, left: float, bottom: float, used: int, name: str, words: str) -> None:
    """A stage as the heads of the network, of which the leading ones are used."""
    axes.add_patch(
        FancyBboxPatch(
            (left, bottom), 3.4, 2.0, boxstyle="round,pad=0,rounding_size=0.18", facecolor="white", edgecolor=LINE
        )
    )
    for head in range(HEADS):
        axes.add_patch(
            Rectangle(
                (left + 0.3 + 0.48 * head, bottom + 0.25),
                0.38,
                0.85,
                facecolor=BLUE if head < used else FAINT,
                edgecolor=BLUE if head < used else "#b6bfca",
                linestyle="-" if head < used else (0, (2, 2)),
            )
        )
    text(axes, left + 1.7, bottom + 1.66, name, 14, fontweight="bold")
    text(axes, left + 1.7, bottom + 1.3, words, 11, LINE)


def answer(axes: plt.Axes, left: float, y: float, words: str) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (left, y - 0.5), 2.2, 1.0, boxstyle="round,pad=0,rounding_size=0.3", facecolor=GREEN, edgecolor=GREEN
        )
    )
    text(axes, left + 1.1, y, words, 14, "white", fontweight="bold")


def draw() -> plt.Figure:
    """Light paper with round corners, which can be read on a page of any colour."""
    figure = plt.figure(figsize=(WIDTH * 0.625, HEIGHT * 0.625))
    axes = figure.add_axes([0, 0, 1, 1], xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.set_axis_off()
    axes.add_patch(
        FancyBboxPatch(
            (0.08, 0.08),
            WIDTH - 0.16,
            HEIGHT - 0.16,
            boxstyle="round,pad=0,rounding_size=0.35",
            facecolor="#fbfcfd",
            edgecolor="#c8d0d9",
        )
    )
    upper, lower = 5.5, 2.0  # middle lines of the two stages

    axes.imshow(
        Image.open(PHOTOGRAPH), extent=(0.55, 2.35, upper - 0.9, upper + 0.9), interpolation="nearest", zorder=2
    )
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="auto")
    text(axes, 1.45, upper + 1.25, "image", 13)
    arrow(axes, (2.45, upper), (3.5, upper))
    stage(axes, 3.6, upper - 1.0, FEW, "stage 0", "a few leading heads")
    arrow(axes, (7.1, upper), (8.1, upper))

    middle = 9.75
    axes.add_patch(
        Polygon(
            [(middle - 1.55, upper), (middle, upper + 1.15), (middle + 1.55, upper), (middle, upper - 1.15)],
            facecolor="#fff4e8",
            edgecolor=ORANGE,
            linewidth=1.8,
        )
    )
    text(axes, middle, upper + 0.22, "certain?", 14, fontweight="bold")
    text(axes, middle, upper - 0.28, "entropy < τ", 12)
    arrow(axes, (middle + 1.6, upper), (13.0, upper), color=GREEN)
    text(axes, 12.1, upper + 0.32, "yes", 13, GREEN, fontweight="bold")
    answer(axes, 13.1, upper, "answer")
    text(axes, 14.2, upper - 0.85, "easy images leave here", 11, LINE)

    between = (upper - 1.0 + lower + 1.0) / 2
    arrow(axes, (middle, upper - 1.2), (middle, between), (5.3, between), (5.3, lower + 1.08), color=ORANGE)
    text(axes, middle + 0.4, upper - 1.42, "no", 13, ORANGE, fontweight="bold", ha="left")
    text(axes, 7.6, between - 0.34, "recycle: its tokens are added", 12, ORANGE)
    arrow(axes, (1.45, upper - 1.0), (1.45, lower), (3.5, lower))
    text(axes, 1.7, lower + 0.32, "embeddings", 11, LINE, ha="left")
    stage(axes, 3.6, lower - 1.0, HEADS, "stage 1", "all heads")
    arrow(axes, (7.1, lower), (13.0, lower))
    text(axes, 10.05, lower + 0.32, "the last stage always answers", 11, LINE)
    answer(axes, 13.1, lower, "answer")
    text(axes, 14.2, lower - 0.85, "hard images leave here", 11, LINE)
    text(axes, WIDTH / 2, 0.48, "One network: the weights of stage 0 are the leading part of those of stage 1.", 12)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=DOCS, help="of method.svg")
    arguments = parser.parse_args()
    with plt.rc_context({"svg.hashsalt": "method", "font.family": "DejaVu Sans"}):
        draw().savefig(arguments.output_dir / "method.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
