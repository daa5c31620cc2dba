"""The models that a run leaves for use: weights, image processor and model card."""

from pathlib import Path

from transformers import PreTrainedModel

from ..hub import accuracy_results, model_card
from .checkpoints import replacing_folder
from .progress import Progress
from .setup import TrainingSetup


def save_model(folder: Path, model: PreTrainedModel, result: dict, setup: TrainingSetup, progress: Progress) -> None:
    """
    Replace `folder` by the model as it is.

    Args:
        folder (`Path`): where the model of an earlier step may be.
        model (`PreTrainedModel`): not wrapped.
        result (`dict`): what `evaluate_accuracy` found of it.
        setup (`TrainingSetup`), progress (`Progress`): of the run, for the model card.
    """
    config = setup.config
    training = {
        "data": f"`{config.dataset}`, split `{config.train_split}`, {setup.num_images} images",
        "epochs": f"{progress.epoch} of {setup.num_epochs}, {progress.step} optimizer steps",
        "batch size": config.batch_size,
        "learning rate": f"{config.scaled_learning_rate:g} at that batch size",
        "seed": config.seed,
    }
    dataset = Path(config.dataset).name
    results = accuracy_results(model, result, dataset, split=config.eval_split, training=training)
    card = model_card(model, results, name=f"{config.model_type}-{dataset}", license=config.model_license)
    with replacing_folder(folder) as temporary:
        model.save_pretrained(temporary)
        setup.processor.save_pretrained(temporary)
        card.save(temporary / "README.md")
