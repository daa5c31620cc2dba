"""
Accuracy and cost of a model at every τ, from one pass over the images:

    hf-thinkingvit sweep --model MODEL --dataset uoft-cs/cifar10

prints a table, and writes `results.json` (which `push` takes) and plots as PNG and SVG. Without `--thresholds`, τ lies
at quantiles of the scores, where images change their exit. Needs `pip install "hf-thinkingvit[examples]"`; several GPUs
share the images under `accelerate launch`.
"""

import argparse
import json
import shlex
import sys

import torch
from accelerate import Accelerator

from ..evaluation.plots import plot_accuracy_against_macs, plot_exit_shares, plot_score_histogram, save_figure
from ..evaluation.segmentation import StageConfusions
from ..evaluation.sweep import StageAnswers
from ..evaluation.threshold_points import POINTS, distinct_thresholds
from ..evaluation.wording import distinct_labels
from . import command
from .evaluation import COLUMNS, add_evaluation, evaluate, measure_of, segments, sides_of, size_words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.add_model(parser)
    command.add_output_dir(parser, "outputs/sweep", "results and plots")
    parser.add_argument("--dtype", default="float32", choices=command.DTYPES, help="to measure in")
    parser.add_argument("--thresholds", type=float, nargs="+", help="τ to measure; by default where exits change")
    parser.add_argument("--points", type=command.positive, default=POINTS, help="values of τ, where none are given")
    add_evaluation(parser)
    parser.add_argument("--streaming", action="store_true", help="read the images without downloading them first")


def run(arguments: argparse.Namespace) -> None:
    # Accelerate does not find out by itself that several processes run on CPUs.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    model, processor = command.load_model(arguments.model, task=None, dtype=getattr(torch, arguments.dtype))
    model.to(accelerator.device)
    if accelerator.is_main_process:
        command.start(model, dataset=arguments.dataset, saved_to=arguments.output_dir)
    answers, rows = evaluate(model, processor, arguments, arguments.thresholds or (), accelerator, arguments.streaming)
    if not accelerator.is_main_process:
        return
    if not rows:
        own = model.config.threshold  # None after `exit_criterion` was changed
        rows = [answers.row(each) for each in distinct_thresholds(answers, max(2, arguments.points), own)]
    print(f"{answers.dataset}, split {answers.split}, {len(answers)} images, measured in {arguments.dtype}")
    print(table(rows))
    save(answers, rows, arguments.output_dir)
    best = max(rows, key=lambda row: (measure_of(row)[2], -row["gmacs"]))
    _, words, value = measure_of(best)
    command.say(
        best=f"τ = {distinct_labels([best['threshold']])[0]}: {words} {value:.2f} % at {best['gmacs']:.4g} GMACs",
        files=f"results.json and plots in {arguments.output_dir}",
        next=f"hf-thinkingvit calibrate --model {shlex.quote(arguments.model)} "
        f"--dataset {shlex.quote(arguments.dataset)} --max-drop 0.01"
        + (f" {size_words(*sides_of(arguments, model.config))}" if segments(model) else ""),
    )


def table(rows: list[dict]) -> str:
    num_stages = len(rows[0]["exit_shares"])
    shares = "".join(f"{f'stage {stage}':>10}" for stage in range(num_stages))
    columns = [column for column in COLUMNS if column[0] in rows[0]]
    titles = "".join(f"{title:>{form.split('.')[0]}}" for _, title, form, _ in columns)
    labels = distinct_labels([row["threshold"] for row in rows])
    width = max(8, *map(len, labels))
    lines = [f"{'τ':>{width}}{titles}{shares}"]
    for label, row in zip(labels, rows):
        shares = "".join(f"{share:>10.1%}" for share in row["exit_shares"])
        cells = "".join(f"{factor * row[name]:>{form}}" for name, _, form, factor in columns)
        lines.append(f"{label:>{width}}{cells}{shares}")
    return "\n".join(lines)


def save(answers: StageAnswers | StageConfusions, rows: list[dict], folder) -> None:
    """Results and plots of the same points as the table."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"sweep": plot_accuracy_against_macs(answers, rows), "exit_shares": plot_exit_shares(answers, rows)}
    # Of right and wrong answers, which windows are not.
    for stage in range(answers.num_stages - 1) if isinstance(answers, StageAnswers) else ():
        figures[f"scores_stage_{stage}"] = plot_score_histogram(answers, stage)
    for name, figure in figures.items():
        save_figure(figure, folder / name)
    results = answers.results([row["threshold"] for row in rows])
    results["plot"] = "sweep.png"
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


def main(words: list[str] | None = None, prog: str | None = None) -> None:
    command.run_command(sys.modules[__name__], words, prog)


if __name__ == "__main__":
    main()
