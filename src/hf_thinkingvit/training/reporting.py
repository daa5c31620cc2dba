"""What a run leaves for use: models with processor and card, and the figures of images that are measured once."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageClassification, PreTrainedModel

from ..data import evaluation_batches
from ..evaluation.accuracy import evaluate_accuracy
from ..hub import accuracy_results, model_card
from ..public_names import public_name
from .checkpoints import replacing_folder
from .progress import Progress
from .setup import TrainingSetup
from .stop_signals import ignore_stop_signals


def save_model(
    folder: Path, model: PreTrainedModel, measured: Mapping[str, Any], setup: TrainingSetup, progress: Progress
) -> None:
    """
    Replace `folder` by the model as it is, with its image processor and card. Its configuration records the images that
    made it as `training_data`.

    Args:
        folder (`Path`): where the model of an earlier step may be.
        model (`PreTrainedModel`): not wrapped.
        measured (`dict`): its entry of `evaluate_accuracy` on the images that choose the best epoch.
        setup (`TrainingSetup`), progress (`Progress`): of the run.
    """
    # For whoever measures this model: which images are not new to it. Also over what a starting point had recorded.
    model.config.training_data = {
        "dataset": public_name(setup.config.dataset),
        "split": setup.config.train_split,
        "selected_on": setup.data.selected_on,
    }
    with replacing_folder(folder) as temporary:
        model.save_pretrained(temporary)
        setup.processor.save_pretrained(temporary)
        _save_card(temporary, model, measured, setup, progress.epoch, progress.step, split=setup.data.selected_on)


def say_accuracy(setup: TrainingSetup, progress: Progress, results: Mapping[str, Mapping], seconds: float) -> None:
    """Tell the console and the trackers what `evaluate_accuracy` found after an epoch."""
    say = setup.accelerator.print
    for name, result in results.items():
        stages = ", ".join(f"{value:.2f}" for value in result["top1"])
        say(f"\nepoch {progress.epoch}, {name}: top-1 {stages} %", end="")
        if setup.config.trackers:
            values = {f"eval/{name}/top1_stage_{stage}": value for stage, value in enumerate(result["top1"])}
            values |= {f"eval/{name}/top5_stage_{stage}": value for stage, value in enumerate(result["top5"])}
            setup.accelerator.log(values, step=progress.step)
    if progress.skipped_images:
        say(f"\n{progress.skipped_images} training images could not be decoded so far", end="")
    say(f" ({seconds:.0f} s)")


def report_test(
    setup: TrainingSetup, history: list[dict], each: Callable[[Iterable[dict]], Iterable[dict]]
) -> dict[str, dict] | None:
    """
    Measure the best and the last model of a finished run on the test split, and say so in their cards. Every process
    calls it.

    Args:
        setup (`TrainingSetup`): of the run.
        history (`list[dict]`): what was measured after epochs.
        each (`Callable`): goes through the batches, and may stop.

    Returns:
        For each of the two what `evaluate_accuracy` found, and the `step` it is of. `None` without a test split.
    """
    data, accelerator, folder = setup.data, setup.accelerator, setup.output_dir
    if data.test is None:
        return None
    best = max(history, key=lambda entry: entry["results"][entry["chosen"]]["top1"][-1])
    entries = {"best": best, "last": history[-1]}
    models = {
        name: AutoModelForImageClassification.from_pretrained(folder / name).to(accelerator.device) for name in entries
    }
    batches = evaluation_batches(data.test, setup.processor, setup.config.eval_batch_size, setup.config.num_workers)
    batches.worker_init_fn = ignore_stop_signals
    measured = evaluate_accuracy(accelerator, models, each(accelerator.prepare(batches)))
    for name, entry in entries.items():
        stages = ", ".join(f"{value:.2f}" for value in measured[name]["top1"])
        accelerator.print(f"{data.split}, {name} model (step {entry['step']}): top-1 {stages} %")
        if accelerator.is_main_process:
            _save_card(folder / name, models[name], measured[name], setup, entry["epoch"], entry["step"], data.split)
    accelerator.wait_for_everyone()
    return {name: {"step": entry["step"], **measured[name]} for name, entry in entries.items()}


def _save_card(
    folder: Path,
    model: PreTrainedModel,
    measured: Mapping[str, Any],
    setup: TrainingSetup,
    epoch: int,
    step: int,
    split: str,
) -> None:
    """The card of a model saved in `folder`, with its entry of `evaluate_accuracy` on the images called `split`."""
    config, data = setup.config, setup.data
    dataset = public_name(config.dataset)
    training = {
        "data": f"`{dataset}`, split `{config.train_split}`, {setup.num_images} images",
        "epochs": f"{epoch} of {setup.num_epochs}, {step} optimizer steps",
        "batch size": config.batch_size,
        "learning rate": f"{config.scaled_learning_rate:g} at that batch size",
        "seed": config.seed,
    }
    results = accuracy_results(model, measured, dataset, split=split, selected_on=data.selected_on, training=training)
    name = f"{config.model_type}-{dataset.rsplit('/')[-1]}"
    card = model_card(model, results, name=name, license=config.model_license)
    temporary = folder / ".README.md.partial"
    card.save(temporary)
    os.replace(temporary, folder / "README.md")
