"""Evaluation between epochs: measures of the weights and of their moving average, saved models, and results."""

import json
import time
from collections.abc import Callable, Iterable

import torch

from ..evaluation.accuracy import main_measure
from ..files import replace_file
from .progress import Progress
from .reporting import save_model, say_measures
from .setup import TrainingSetup


def evaluation_is_due(setup: TrainingSetup, progress: Progress, history: list[dict]) -> bool:
    """
    Whether the model of this step is to be evaluated (every `eval_epochs`, at the end, and with `eval_start` before the
    first step) and has not been yet.
    """
    ends_epoch = progress.step > 0 and progress.step_in_epoch == 0 and progress.epoch % setup.config.eval_epochs == 0
    evaluated = history and history[-1]["step"] == progress.step
    starts = progress.step == 0 and setup.config.eval_start
    return not evaluated and (starts or ends_epoch or progress.step >= setup.num_steps)


def evaluate_epoch(
    setup: TrainingSetup,
    progress: Progress,
    history: list[dict],
    each: Callable[[Iterable[dict]], Iterable[dict]],
) -> dict[str, dict]:
    """
    Measure every stage or sub-network, of the weights and of their moving average, and save the more accurate of the
    two, by the task's decisive measure, as the last model, and as the best if it is. Every process calls it.

    Args:
        setup (`TrainingSetup`): of the run.
        progress (`Progress`): of the run; its best score is updated.
        history (`list[dict]`): gets an entry, which has the mean training losses since the last one too.
        each (`Callable`): iterates over the batches it is given, and may raise to stop.

    Returns:
        What the task's `evaluate` found, by `"weights"` and `"ema"`.
    """
    accelerator, started = setup.accelerator, time.perf_counter()
    models = {"weights": accelerator.unwrap_model(setup.model, keep_torch_compile=False)}
    if setup.ema is not None:
        models["ema"] = setup.ema.module
    results = setup.task.evaluate(accelerator, models, each(setup.evaluation))
    decisive = setup.task.decisive
    better = max(results, key=lambda name: main_measure(results[name], decisive))
    where = {"step": progress.step, "epoch": progress.epoch, "seconds": round(progress.seconds, 1)}
    losses = progress.take_mean_losses()  # of training, since the last entry
    history.append({**where, "losses": losses, "chosen": better, "results": results})
    say_measures(setup, progress, results, time.perf_counter() - started)
    folders, score = ["last"], main_measure(results[better], decisive)
    if score > progress.best_score:
        progress.best_score, progress.best_step = score, progress.step
        folders.append("best")
    if accelerator.is_main_process:
        for folder in folders:
            save_model(setup.output_dir / folder, models[better], results[better], setup, progress)
    return results


def run_results(setup: TrainingSetup, progress: Progress, history: list[dict], test: dict | None) -> dict:
    """What a run has measured so far, as in `results.json`; `test` as `report_test` returns it."""
    cuda = setup.accelerator.device.type == "cuda"
    return {
        "step": progress.step,
        "seconds": round(progress.seconds, 1),
        "skipped_images": progress.skipped_images,
        "processes": setup.accelerator.num_processes,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "selected_on": setup.data.selected_on,  # the images that the best epoch is chosen by
        "split": setup.data.split,  # the images of `test`
        "test": test,
        "history": history,
    }


def save_results(setup: TrainingSetup, results: dict) -> None:
    """Replace `results.json`. Every process calls it."""
    if setup.accelerator.is_main_process:
        replace_file(setup.output_dir / "results.json", json.dumps(results, indent=1))
    setup.accelerator.wait_for_everyone()
