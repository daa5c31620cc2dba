"""Losses and speed of training, averaged over steps and processes: on the progress bar and in the trackers."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from .divergence import check_losses
from .progress import Progress
from .setup import TrainingSetup


class TrainingLog:
    """
    A context in which the trackers run and the progress bar is shown, on the main process.

    Args:
        setup (`TrainingSetup`): of the run.
        progress (`Progress`): where the run starts. Skipped images and seconds are counted in it.
    """

    def __init__(self, setup: TrainingSetup, progress: Progress):
        self.setup, self.progress = setup, progress
        self.known_skipped = set(progress.skipped)
        if setup.config.trackers:
            fields = setup.config.to_dict().items()
            flat = {name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in fields}
            setup.accelerator.init_trackers("hf-thinkingvit", flat)
        self.bar = tqdm(
            total=setup.num_steps,
            initial=progress.step,
            desc="training",
            unit="step",
            disable=not setup.accelerator.is_main_process,
        )
        self._reset()

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()
        self.setup.accelerator.end_training()

    def _reset(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self.skipped: set[int | str] = set()  # that were not known before
        self.micro_batches = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what has happened since the last report (saving, evaluating) out of the training time."""
        self.started = time.perf_counter()

    def add(self, losses: Mapping[str, torch.Tensor], skipped: Iterable[int | str]) -> None:
        """
        Record a micro-batch.

        Args:
            losses (`dict[str, torch.Tensor]`): `loss` and its parts, scalars. Not read before the report, so that a
                GPU need not be waited for.
            skipped (`list`): the images that could not be decoded, before or in it, as `train_batches` names them.
        """
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.skipped |= set(skipped) - self.known_skipped
        self.micro_batches += 1

    def finish_step(self) -> None:
        self.bar.update()

    def report(self, last_good: Path | None) -> None:
        """
        Show what was recorded since the last report. Every process calls it.

        Args:
            last_good (`Path`, *optional*): the newest checkpoint.

        Raises:
            TrainingDivergedError: if a loss is not finite.
        """
        accelerator, config, progress = self.setup.accelerator, self.setup.config, self.progress
        seconds = time.perf_counter() - self.started
        losses, skipped = self._mean_over_processes()
        check_losses(losses, progress.step, config.log_steps, last_good)
        if skipped:
            self.known_skipped |= self._of_all_processes(self.skipped)
            progress.skipped = sorted(self.known_skipped, key=str)
        progress.seconds += seconds
        progress.add_losses(losses, self.counts)
        images = self.micro_batches * self.setup.batch_of_process * accelerator.num_processes / seconds
        learning_rate = max(
            group["lr"] for group in self.setup.optimizer.param_groups
        )  # of the last layer, if it falls
        self.bar.set_postfix(loss=f"{losses['loss']:.3f}", lr=f"{learning_rate:.2e}", images_per_s=f"{images:.0f}")
        if config.trackers:
            values = {f"train/{name}": value for name, value in losses.items()}
            values |= {"train/learning_rate": learning_rate, "train/images_per_second": images}
            accelerator.log(values, step=progress.step)
        self._reset()

    def _mean_over_processes(self) -> tuple[dict[str, float], int]:
        """The mean of each loss over micro-batches and processes; how many images are new among the skipped ones."""
        accelerator = self.setup.accelerator
        means = [(value / self.counts[name]).float().cpu() for name, value in self.sums.items()]
        local = torch.tensor([*torch.stack(means).tolist(), float(len(self.skipped))], device=accelerator.device)
        *sums, skipped = accelerator.reduce(local, reduction="sum").tolist()
        return {name: value / accelerator.num_processes for name, value in zip(self.sums, sums)}, int(skipped)

    def _of_all_processes(self, skipped: set[int | str]) -> set[int | str]:
        """An image is read by another process in another epoch, so that processes cannot count for themselves."""
        if self.setup.accelerator.num_processes == 1:
            return skipped
        return set().union(*gather_object([skipped]))
