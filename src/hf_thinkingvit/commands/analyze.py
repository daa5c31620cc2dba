"""Draws and tabulates a model's answers image by image. `options.py` has its options and description."""

import argparse
import csv
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..evaluation.answer_plots import plot_classes, plot_examples, plot_histograms
from ..evaluation.classes import class_table, entropy_histogram, segmentation_class_table
from ..evaluation.image_answers import ImageAnswers, collect_image_answers
from ..evaluation.segmentation import StageConfusions
from ..models.configuration_staged import thinks_in_stages
from ..models.exit_criteria import EXIT_CRITERIA
from ..models.staged_arguments import resolve_thresholds
from . import command
from .evaluation import evaluate, segments
from .loading import best_device, load_baseline, load_model, start


SHOWN_ROWS = 5  # at each end of the table that is printed
DPI = 130


def run(arguments: argparse.Namespace) -> None:
    if not (arguments.classes or arguments.histograms or arguments.examples):
        arguments.classes, arguments.histograms, arguments.examples = True, True, 12
    model, processor = load_model(arguments.model, task=None, dtype=torch.float32)  # as `sweep` measures
    model.to(best_device())
    threshold = command.one_or_list(arguments.threshold)
    if not thinks_in_stages(model):
        if threshold is not None:
            raise ValueError(f"`{arguments.model}` does not think in stages: it has no τ.")
    else:
        threshold = model.config.threshold if threshold is None else threshold
        resolve_thresholds(threshold, model.config.num_stages - 1)
    start(model, dataset=arguments.dataset, saved_to=arguments.output_dir)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    written = _of_windows if segments(model) else _of_images
    command.say(files=", ".join(written(model, processor, arguments, threshold)))


def _of_images(model: Any, processor: Any, arguments: argparse.Namespace, threshold: Any) -> list[str]:
    """What is asked of a classifier; the names of the files."""
    options = {
        "split": arguments.split,
        "label_map": arguments.label_map,
        "max_samples": arguments.max_samples,
        "batch_size": arguments.batch_size or 64,
        "num_workers": arguments.num_workers,
    }
    answers = collect_image_answers(model, arguments.dataset, processor, **options)
    title, folder, files = _title(answers, threshold), arguments.output_dir, []
    if arguments.classes:
        baseline, words = None, " by class: last stage over first" if answers.num_answers > 1 else " by class"
        if arguments.baseline is not None:
            other, other_processor = load_baseline(arguments.baseline, dtype=torch.float32)
            baseline = collect_image_answers(other.to(model.device), arguments.dataset, other_processor, **options)
            words = f" by class, over {Path(arguments.baseline).name}"
        rows = class_table(answers, threshold, baseline)
        files += _save_classes(rows, f"{title}{words}", folder)
    if arguments.histograms:
        rows = entropy_histogram(answers.entropies, answers.right)
        files += _save_histograms(rows, title, answers.kind, _marks(model, threshold), folder)
    if arguments.examples:
        _save_figure(plot_examples(answers, arguments.examples, title, threshold), folder / "examples.png")
        files.append("examples.png")
    return files


def _of_windows(model: Any, processor: Any, arguments: argparse.Namespace, threshold: Any) -> list[str]:
    """What is asked of a segmentation model; the names of the files."""
    if arguments.baseline is not None:
        raise ValueError("`baseline` is of classifiers.")
    confusions, _ = evaluate(model, processor, arguments)
    title, folder, files = _title(confusions, threshold), arguments.output_dir, []
    if arguments.classes:
        names = [model.config.id2label[index] for index in range(model.config.num_labels)]
        rows = segmentation_class_table(confusions, names, threshold)
        files += _save_classes(rows, f"{title} by class: last stage over first", folder)
    if arguments.histograms:
        if not EXIT_CRITERIA[confusions.criterion].is_entropy:
            raise ValueError(f"`exit_criterion` = {confusions.criterion!r} is no entropy.")
        rows = entropy_histogram(confusions.scores)
        files += _save_histograms(rows, title, "stage", _marks(model, threshold), folder)
    if arguments.examples:
        print("pictures of segmented images: hf-thinkingvit segment --model " + shlex.quote(arguments.model))
    return files


def _title(answers: ImageAnswers | StageConfusions, threshold: Any) -> str:
    words = f"{answers.dataset}, split {answers.split}, {len(answers)} images"
    if threshold is None:
        return words
    values = threshold if isinstance(threshold, Sequence) else [threshold]
    return f"{words}, τ = {', '.join(f'{value:.4g}' for value in values)}"


def _marks(model: Any, threshold: Any) -> tuple[float, ...]:
    """The τ to mark in histograms of the entropy, which they are where the criterion is the entropy reported."""
    if threshold is None or not EXIT_CRITERIA[model.config.exit_criterion].is_entropy:
        return ()
    return resolve_thresholds(threshold, model.config.num_stages - 1)


def _save_classes(rows: list[dict[str, Any]], title: str, folder: Path) -> list[str]:
    key = next(name for name in ("gain", "depth", "top1", "iou") if name in rows[0])
    ranked = sorted(rows, key=lambda row: -row[key])
    _save_table(ranked, folder / "classes.csv")
    _save_figure(plot_classes(rows, title), folder / "classes.png")
    print(title)
    print(_text(ranked))
    return ["classes.csv", "classes.png"]


def _save_histograms(
    rows: list[dict[str, Any]], title: str, kind: str, marks: Sequence[float], folder: Path
) -> list[str]:
    _save_table(rows, folder / "histograms.csv")
    _save_figure(plot_histograms(rows, title, kind, marks), folder / "histograms.png")
    return ["histograms.csv", "histograms.png"]


def _text(rows: list[dict[str, Any]]) -> str:
    """The first and last rows of a table, in columns."""
    shown = [[_cell(value) for value in row.values()] for row in rows]
    if len(shown) > 2 * SHOWN_ROWS:
        shown = [*shown[:SHOWN_ROWS], ["…"] * len(rows[0]), *shown[-SHOWN_ROWS:]]
    shown.insert(0, list(rows[0]))
    widths = [max(len(row[column]) for row in shown) for column in range(len(shown[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        )
        for row in shown
    )


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)[:40]


def _save_table(rows: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _save_figure(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI)


def main(words: list[str] | None = None, prog: str | None = None) -> None:
    command.run_command("analyze", words, prog)


if __name__ == "__main__":
    main()
