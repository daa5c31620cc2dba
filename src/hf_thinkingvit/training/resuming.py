"""What a checkpoint records of a run beside its weights, and a run that goes on from one."""

import dataclasses
import logging

from .checkpoints import Checkpoints
from .progress import Progress, changed_fields
from .setup import TrainingSetup


logger = logging.getLogger(__name__)


def state_of_run(setup: TrainingSetup, progress: Progress, history: list[dict]) -> dict:
    """As JSON: where a run stands, what it has measured, and what must be the same where it goes on."""
    return {
        "progress": dataclasses.asdict(progress),
        "history": history,
        "steps_per_epoch": setup.steps_per_epoch,
        "readers": readers(setup),
        "config": setup.config.to_dict(),
    }


def readers(setup: TrainingSetup) -> dict[str, int]:
    """The numbers that the order of the images of a stream depends on."""
    return {
        "processes": setup.accelerator.num_processes,
        "workers per process": setup.config.num_workers,
        "images per batch": setup.batch_of_process,
    }


def resume(setup: TrainingSetup, checkpoints: Checkpoints) -> tuple[Progress, list[dict]]:
    """
    Load the checkpoint that `config.resume` asks for: weights, optimizer, scaler and moving average.

    Args:
        setup (`TrainingSetup`): of the run; its model and optimizer are changed in place.
        checkpoints (`Checkpoints`): of the run.

    Returns:
        Where the run stands, and what it has measured: of a new run if there is no checkpoint to resume from.

    Raises:
        ValueError: if the checkpoint does not exist, is damaged, or belongs to another run.
    """
    checkpoint = None if setup.config.resume is None else checkpoints.find(setup.config.resume)
    if checkpoint is None:
        return Progress(), []
    saved = checkpoints.read(checkpoint)
    changed = changed_fields(saved["config"], setup.config)
    if changed or saved["steps_per_epoch"] != setup.steps_per_epoch:
        what = "; ".join(changed) or f"steps per epoch: {saved['steps_per_epoch']} then, {setup.steps_per_epoch} now"
        raise ValueError(
            f"{checkpoint} belongs to another run ({what}). Continue it as it was, or start a new one in another "
            "`output_dir`, with `from_pretrained` if it should begin with these weights."
        )
    try:
        checkpoints.load(checkpoint)
    except RuntimeError as error:
        raise ValueError(
            f"The weights of {checkpoint} do not fit this model. The configuration is the same, so the labels of the "
            f"data or the model that the run started from have changed: {error}"
        ) from error
    progress = Progress.from_dict(saved["progress"])
    if progress.step_in_epoch == setup.steps_per_epoch:  # older versions recorded the end of an epoch so
        progress.start_next_epoch()
    then, now = saved.get("readers", readers(setup)), readers(setup)
    if setup.config.streaming and progress.step_in_epoch and then != now:
        logger.warning(
            "the stream was read by %s and is now by %s: until the end of this epoch, images may be seen twice or not "
            "at all",
            then,
            now,
        )
    setup.accelerator.print(f"resuming from {checkpoint}, step {progress.step} of {setup.num_steps}")
    return progress, saved["history"]
