"""One optimizer step: forward and backward of each micro-batch, and with the last one the update of the weights."""

import numpy as np
import torch

from .seeding import seeded
from .setup import TrainingSetup


def train_micro_batch(
    setup: TrainingSetup, batch: dict[str, torch.Tensor], step: int, micro_batch: int
) -> dict[str, torch.Tensor]:
    """
    Accumulate the gradients of one micro-batch; the last micro-batch of a step also updates the weights.

    Args:
        setup (`TrainingSetup`): of the run.
        batch (`dict`): `pixel_values` of shape `(batch_size, channels, height, width)` and `labels`, class indices of
            shape `(batch_size,)`, of masks `(batch_size, height, width)`.
        step (`int`): number of optimizer steps done so far.
        micro_batch (`int`): index among the `gradient_accumulation_steps` micro-batches of the step.

    Returns:
        `loss` and its parts by name: detached scalars of this process.
    """
    accelerator, config = setup.accelerator, setup.config
    pixel_values = batch["pixel_values"].to(accelerator.device, non_blocking=True)
    labels = batch["labels"].to(accelerator.device, non_blocking=True)
    targets, arguments = labels, setup.loss.model_arguments(step, micro_batch)
    # What is random is seeded by its place in the run, so that a resumed run needs no saved state of the generators.
    place = (config.seed, step, micro_batch, accelerator.process_index)
    if setup.mixup is None:
        arguments = {"labels": labels, **arguments} if setup.task.model_gets_labels else arguments
    else:  # the model's own loss takes class indices only
        with seeded(*place):
            pixel_values, targets = setup.mixup(pixel_values, labels)
    torch.manual_seed(int(np.random.SeedSequence((*place, 1)).generate_state(1)[0]))
    # Accelerate restores its count of micro-batches from the checkpoint, where it need not be at the start of a step.
    accelerator.step = micro_batch
    with accelerator.accumulate(setup.model):
        with accelerator.autocast():
            outputs = setup.model(pixel_values, **arguments)
            loss, parts = setup.loss(outputs, pixel_values, targets, step, micro_batch)
        accelerator.backward(loss)
        if accelerator.sync_gradients and config.clip_grad is not None:
            accelerator.clip_grad_norm_(setup.model.parameters(), config.clip_grad)
        # Accelerate's optimizer does nothing in these two before the last micro-batch.
        setup.optimizer.step()
        setup.optimizer.zero_grad()
    return {"loss": loss.detach(), **parts}


def update_schedule_and_average(setup: TrainingSetup, step: int) -> None:
    """Set the learning rate of the next step, and update the moving average of the weights, after `step` steps."""
    setup.schedule.step_update(step)
    if setup.ema is not None:
        setup.ema.update(setup.accelerator.unwrap_model(setup.model, keep_torch_compile=False))
