"""Stops a run whose losses or weights are no longer finite, before such weights are saved."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn


class TrainingDivergedError(RuntimeError):
    """The loss or the weights are no longer finite."""


def check_losses(losses: Mapping[str, float], step: int, log_steps: int, last_good: Path | None) -> None:
    """
    Raises `TrainingDivergedError` if a loss is not finite.

    Args:
        losses (`dict[str, float]`): means over the steps since the last check, `loss` among them.
        step (`int`): number of steps done.
        log_steps (`int`): greatest number of steps between two checks.
        last_good (`Path`, *optional*): the newest checkpoint, which the message names.
    """
    if not all(math.isfinite(value) for value in losses.values()):
        raise _diverged(
            f"the loss was {losses['loss']} at step {step} or up to {log_steps - 1} steps before ({losses})", last_good
        )


def check_weights(accelerator: Accelerator, model: nn.Module, step: int, last_good: Path | None) -> None:
    """Raises `TrainingDivergedError` on every process if a weight of any process is not finite."""
    finite = torch.stack([parameter.detach().isfinite().all() for parameter in model.parameters()]).all()
    if not accelerator.reduce(finite.int(), reduction="sum") == accelerator.num_processes:
        raise _diverged(f"the weights are no longer finite at step {step}", last_good)


def _diverged(what: str, last_good: Path | None) -> TrainingDivergedError:
    advice = f"the last good checkpoint is {last_good}" if last_good else "there is no checkpoint before it"
    return TrainingDivergedError(f"{what}; {advice}")
