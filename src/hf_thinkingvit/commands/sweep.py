"""Measures a model at every τ, and writes results and plots. `options.py` has its options and description."""

import argparse
import json
import shlex

import torch
from accelerate import Accelerator

from ..evaluation.p_values import least_images
from ..evaluation.plots import plot_accuracy_against_macs, plot_exit_shares, plot_score_histogram, save_figure
from ..evaluation.segmentation import StageConfusions
from ..evaluation.splits import is_training_split
from ..evaluation.sweep import StageAnswers
from ..evaluation.threshold_points import distinct_thresholds
from ..evaluation.wording import distinct_labels
from . import command, options
from .evaluation import COLUMNS, evaluate, measure_of, segments, sides_of, size_words
from .loading import load_model, start


DROPS = (0.01, 0.02, 0.05, 0.1)  # greatest falls of accuracy to ask for


def run(arguments: argparse.Namespace) -> None:
    # Accelerate does not find out by itself that several processes run on CPUs.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    model, processor = load_model(arguments.model, task=None, dtype=getattr(torch, arguments.dtype))
    model.to(accelerator.device)
    if accelerator.is_main_process:
        start(model, dataset=arguments.dataset, saved_to=arguments.output_dir)
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
    sides = sides_of(arguments, model.config) if segments(model) else None
    following, remark = calibration_command(arguments, answers, sides)
    command.say(
        best=f"τ = {distinct_labels([best['threshold']])[0]}: {words} {value:.2f} % at {best['gmacs']:.4g} GMACs",
        files=f"results.json and plots in {arguments.output_dir}",
        next=following,
        note=remark,
    )


def calibration_command(
    arguments: argparse.Namespace, answers: StageAnswers | StageConfusions, sides: tuple | None = None
) -> tuple[str, str | None]:
    """
    The command that calibrates the model on these images, with the smallest usual limit for which they are enough; on
    others, where it would refuse these; and why it is not the usual one, if it is not.
    """
    usable = answers.seen is None and not is_training_split(answers.split)
    judged = len(answers.judged())
    images = judged - round(options.CHECKED * judged)
    drop = next((drop for drop in DROPS if least_images(drop, options.DELTA) <= images), None)
    words = ["hf-thinkingvit", "calibrate", "--model", arguments.model, "--dataset", arguments.dataset]
    if not usable:
        words[-1] = "NEW_IMAGES"
        drop, remark = DROPS[0], "on images that had no part in making the model"
    elif drop is None:
        remark = f"{judged} images are too few for a promise about accuracy"
        words += ["--gmacs", f"{answers.macs[-1] / 1e9:.4g}"]
    else:
        remark = None
    if usable and arguments.split is not None:
        words += ["--split", arguments.split]
    if usable and arguments.label_map is not None:
        words += ["--label-map", arguments.label_map if isinstance(arguments.label_map, str) else "FILE"]
    if usable and arguments.max_samples is not None:
        words += ["--max-samples", str(arguments.max_samples)]
    if drop is not None:
        words += ["--max-drop", str(drop)]
    if arguments.dtype != options.DTYPES[0]:
        words += ["--dtype", arguments.dtype]
    for flag, default in options.MASK_VALUES.items() if sides is not None and usable else ():
        if (values := getattr(arguments, flag[2:].replace("-", "_"))) != default:
            words += [flag, *values]
    return shlex.join(words) + (f" {size_words(*sides)}" if sides is not None else ""), remark


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
    command.run_command("sweep", words, prog)


if __name__ == "__main__":
    main()
