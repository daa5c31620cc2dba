"""What a run says of itself: the facts of its model cards, and the images that are measured once, at its end."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..data import evaluation_batches
from ..evaluation.accuracy import evaluate_accuracy
from ..hub import accuracy_results, model_card
from .config import TrainingConfig
from .splits import TrainingData


def training_facts(
    config: TrainingConfig, data: TrainingData, num_images: int, epoch: int, step: int
) -> dict[str, Any]:
    """What a card says of the training, up to optimizer step `step` in `epoch`."""
    return {
        "data": f"`{_dataset_name(config)}`, split `{config.train_split}`, {num_images} images",
        "best epoch chosen by": f"`{data.selected_on}`",
        "epochs": f"{epoch} of {config.epochs + config.cooldown_epochs}, {step} optimizer steps",
        "batch size": config.batch_size,
        "learning rate": f"{config.scaled_learning_rate:g} at that batch size",
        "seed": config.seed,
    }


def save_card(
    folder: Path,
    model: PreTrainedModel,
    measured: Mapping[str, Any],
    config: TrainingConfig,
    data: TrainingData,
    training: Mapping[str, Any],
    split: str,
) -> None:
    """The card of a model saved in `folder`, with its entry of `evaluate_accuracy` on the images called `split`."""
    results = accuracy_results(
        model, measured, _dataset_name(config), split=split, selected_on=data.selected_on, training=dict(training)
    )
    card = model_card(model, results, name=f"{config.model_type}-{_dataset_name(config)}", license=config.model_license)
    temporary = folder / ".README.md.partial"
    card.save(temporary)
    os.replace(temporary, folder / "README.md")


def _dataset_name(config: TrainingConfig) -> str:
    """Without the folders of this machine."""
    return Path(config.dataset).name


def report_test(
    accelerator: Accelerator,
    folder: Path,
    config: TrainingConfig,
    data: TrainingData,
    processor: BaseImageProcessor,
    num_images: int,
    history: list[dict],
) -> dict[str, dict] | None:
    """
    Measure the best and the last model of a finished run on the test split, and say so in their cards. Every process
    calls it.

    Args:
        accelerator (`Accelerator`): of the run.
        folder (`Path`): with the models, in `best` and `last`.
        config, data, processor, num_images: of the run.
        history (`list[dict]`): what was measured after epochs.

    Returns:
        For each of the two what `evaluate_accuracy` found, and the `step` it is of. `None` without a test split.
    """
    if data.test is None:
        return None
    best = max(history, key=lambda entry: entry["results"][entry["chosen"]]["top1"][-1])
    entries = {"best": best, "last": history[-1]}
    models = {
        name: AutoModelForImageClassification.from_pretrained(folder / name).to(accelerator.device) for name in entries
    }
    batches = accelerator.prepare(evaluation_batches(data.test, processor, config.eval_batch_size, config.num_workers))
    measured = evaluate_accuracy(accelerator, models, batches)
    for name, entry in entries.items():
        stages = ", ".join(f"{value:.2f}" for value in measured[name]["top1"])
        accelerator.print(f"{data.split}, {name} model (step {entry['step']}): top-1 {stages} %")
        if accelerator.is_main_process:
            training = training_facts(config, data, num_images, entry["epoch"], entry["step"])
            save_card(folder / name, models[name], measured[name], config, data, training, data.split)
    accelerator.wait_for_everyone()
    return {name: {"step": entry["step"], **measured[name]} for name, entry in entries.items()}
