"""The training loop, on Accelerate: one process or many, from the first step or from where a run was killed."""

import dataclasses
import json
import logging
import math
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..evaluation.accuracy import evaluate_accuracy
from .checkpoints import Checkpoints, replace_file
from .config import TrainingConfig
from .data import Place, train_batches
from .progress import Progress, changed_fields
from .reporting import continue_models, report_test, save_model, say_accuracy
from .seeding import seeded
from .setup import TrainingSetup
from .stop_signals import StopSignals


logger = logging.getLogger(__name__)


class TrainingDivergedError(RuntimeError):
    """The loss is no longer a finite number."""


class TrainingRun(TrainingSetup):
    """
    A configured run, ready to train.

    Args:
        config (`TrainingConfig`): checked.

    Raises:
        ValueError: where the configuration, the data and the machine do not fit together; before anything is written.
    """

    def __init__(self, config: TrainingConfig):
        super().__init__(config)
        self.checkpoints = Checkpoints(
            self.output_dir / "checkpoints", self.accelerator, self.ema, config.keep_checkpoints
        )
        self.progress = Progress()
        self.history: list[dict] = []
        self.test: dict | None = None
        self.stop_signals = StopSignals(self.accelerator)
        self.within_step = False
        self._resume()

    def _resume(self) -> None:
        if self.config.resume is None:
            return
        checkpoint = self.checkpoints.find(self.config.resume)
        if checkpoint is None:
            return
        saved = self.checkpoints.read(checkpoint)
        changed = changed_fields(saved["config"], self.config)
        if changed or saved["steps_per_epoch"] != self.steps_per_epoch:
            what = "; ".join(changed) or f"steps per epoch: {saved['steps_per_epoch']} then, {self.steps_per_epoch} now"
            raise ValueError(
                f"{checkpoint} belongs to another run ({what}). Continue it as it was, or start a new one in another "
                "`output_dir`, with `from_pretrained` if it should begin with these weights."
            )
        try:
            self.checkpoints.load(checkpoint)
        except RuntimeError as error:
            raise ValueError(
                f"The weights of {checkpoint} do not fit this model. The configuration is the same, so the labels of "
                f"the data or the model that the run started from have changed: {error}"
            ) from error
        self.progress = Progress(**saved["progress"])
        self.history = saved["history"]
        if self.progress.step_in_epoch == self.steps_per_epoch:  # as checkpoints once said of a finished epoch
            self._next_epoch()
        if self.config.streaming and self.progress.step_in_epoch and saved.get("readers", self.readers) != self.readers:
            logger.warning(
                "the stream was read by %s and is now by %s: until the end of this epoch, images may be seen twice or "
                "not at all",
                saved["readers"],
                self.readers,
            )
        self.accelerator.print(f"resuming from {checkpoint}, step {self.progress.step} of {self.num_steps}")

    @property
    def readers(self) -> dict[str, int]:
        """On which the order of a stream depends."""
        return {
            "processes": self.accelerator.num_processes,
            "workers per process": self.config.num_workers,
            "images per batch": self.batch_of_process,
        }

    def save(self) -> Path:
        """A checkpoint of the finished step; of weights that are finite only."""
        if self.within_step:
            raise RuntimeError("A step that is not finished cannot be saved: continue from the checkpoint before it.")
        finite = torch.stack([parameter.detach().isfinite().all() for parameter in self.model.parameters()]).all()
        if not self.accelerator.reduce(finite.int(), reduction="sum") == self.accelerator.num_processes:
            raise self._diverged(f"the weights are no longer finite at step {self.progress.step}")
        return self.checkpoints.save(self.progress.step, self._state())

    def _state(self) -> dict:
        return {
            "progress": dataclasses.asdict(self.progress),
            "history": self.history,
            "steps_per_epoch": self.steps_per_epoch,
            "readers": self.readers,
            "config": self.config.to_dict(),
        }

    # --- one step -----------------------------------------------------------------------------------------------------

    def batches(self) -> Any:
        accumulation = self.config.gradient_accumulation_steps
        place = Place(
            batch_size=self.batch_of_process,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            seed=self.config.seed,
            epoch=self.progress.epoch,
            start=self.progress.step_in_epoch * accumulation,
            stop=self.steps_per_epoch * accumulation,
        )
        return train_batches(self.config, self.data.train, self.transform, place)

    def train_batch(self, batch: dict[str, torch.Tensor], part: int) -> dict[str, torch.Tensor]:
        """Forward and backward of one part of a step; with the last part, the step. Its losses, detached."""
        self.within_step = True
        step, rank = self.progress.step, self.accelerator.process_index
        device = self.accelerator.device
        pixel_values = batch["pixel_values"].to(device, non_blocking=True)
        labels = batch["labels"].to(device, non_blocking=True)
        targets, inputs = labels, {"labels": labels}
        if self.mixup is not None:
            with seeded(self.config.seed, step, part, rank):
                pixel_values, targets = self.mixup(pixel_values, labels)
            inputs = {}
        torch.manual_seed(int(np.random.SeedSequence((self.config.seed, step, part, rank, 1)).generate_state(1)[0]))
        # Accelerate counts parts from wherever the checkpoint left its count, which need not be the start of a step.
        self.accelerator.step = part
        with self.accelerator.accumulate(self.model):
            with self.accelerator.autocast():
                outputs = self.model(pixel_values, **inputs, **self.loss.outputs_needed)
                loss, parts = self.loss(outputs, pixel_values, targets, step)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients and self.config.clip_grad is not None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {"loss": loss.detach(), **parts}

    def finish_step(self) -> None:
        self.progress.step += 1
        self.progress.step_in_epoch += 1
        self.schedule.step_update(self.progress.step)
        if self.ema is not None:
            self.ema.update(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        if self.progress.step_in_epoch == self.steps_per_epoch:
            self._next_epoch()
        self.within_step = False

    def _next_epoch(self) -> None:
        self.progress.epoch += 1
        self.progress.step_in_epoch = 0

    # --- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> dict:
        """
        Train to the end, and return what was measured, as in `results.json`.

        Raises:
            TrainingDivergedError: if loss or weights are no longer finite.
            SystemExit: after SIGTERM or Ctrl-C, when a checkpoint has been saved; its message says how to continue.
        """
        if self.within_step:
            raise RuntimeError("This run was interrupted in the middle of a step: make another with `resume='auto'`.")
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self.config.save(self.output_dir / "config.yaml")
        if self.config.trackers:
            flat = {
                k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in self.config.to_dict().items()
            }
            self.accelerator.init_trackers("hf-thinkingvit", flat)
        self.model.train()
        self.schedule.step_update(self.progress.step)
        bar = tqdm(
            total=self.num_steps,
            initial=self.progress.step,
            desc="training",
            unit="step",
            disable=not self.accelerator.is_main_process,
        )
        try:
            with self.stop_signals.listening():
                continue_models(self, self.history, self.progress, self.checkpoints.last_good)
                if not self.checkpoints.holds_last_good():
                    self.save()
                self._evaluate_if_due()  # what a run was stopped in
                while self.progress.step < self.num_steps:
                    self._run_epoch(bar)
                    self._evaluate_if_due()
                self.test = report_test(self, self.history, self.progress, self._until_stopped)
                self._save_results()
        finally:
            bar.close()
            self.accelerator.end_training()
        return self._results()

    def _run_epoch(self, bar: tqdm) -> None:
        """The rest of an epoch, with a checkpoint at its end."""
        config, accumulation = self.config, self.config.gradient_accumulation_steps
        sums: dict[str, torch.Tensor] = {}
        count, skipped, started, part = 0, 0, time.perf_counter(), 0
        for batch in self.batches():
            skipped += int(batch["skipped"])
            for name, value in self.train_batch(batch, part).items():
                sums[name] = sums.get(name, 0.0) + value
            count, part = count + 1, (part + 1) % accumulation
            if part:
                continue
            self.finish_step()
            bar.update()
            ends = self.progress.step_in_epoch == 0 or self.progress.step >= self.num_steps
            stop = self.stop_signals.agreed()
            saves = ends or stop is not None or self.progress.step % config.save_steps == 0
            if saves or self.progress.step % config.log_steps == 0:
                seconds = time.perf_counter() - started
                self._log(bar, {name: value / count for name, value in sums.items()}, skipped, count, seconds)
                sums, count, skipped, started = {}, 0, 0, time.perf_counter()
            if saves:
                self.save()
                started = time.perf_counter()
            if stop is not None:
                raise self._stopped(stop)
            if ends:
                break

    def _stopped(self, stop: signal.Signals) -> SystemExit:
        """To raise when the newest checkpoint is of the step that was finished last."""
        message = f"stopped by {stop.name}; continue with --resume auto from {self.checkpoints.last_good}"
        return SystemExit(message if self.accelerator.is_main_process else 1)

    def _log(self, bar: tqdm, losses: dict[str, torch.Tensor], skipped: int, count: int, seconds: float) -> None:
        """Average over the processes and report."""
        names = list(losses)
        row = torch.stack([losses[name].float().cpu() for name in names]).tolist()
        local = torch.tensor([*row, float(skipped)], device=self.accelerator.device)
        *means, skipped = self.accelerator.reduce(local, reduction="sum").tolist()
        means = {name: value / self.accelerator.num_processes for name, value in zip(names, means)}
        if not all(math.isfinite(value) for value in means.values()):
            raise self._diverged(
                f"the loss was {means['loss']} at step {self.progress.step} or up to {self.config.log_steps - 1} steps "
                f"before ({means})"
            )
        self.progress.skipped_images += int(skipped)
        self.progress.seconds += seconds
        images = count * self.batch_of_process * self.accelerator.num_processes / seconds
        learning_rate = self.optimizer.param_groups[0]["lr"]
        bar.set_postfix(loss=f"{means['loss']:.3f}", lr=f"{learning_rate:.2e}", images_per_s=f"{images:.0f}")
        if self.config.trackers:
            values = {f"train/{name}": value for name, value in means.items()}
            values |= {"train/learning_rate": learning_rate, "train/images_per_second": images}
            self.accelerator.log(values, step=self.progress.step)

    def _diverged(self, what: str) -> TrainingDivergedError:
        good = self.checkpoints.last_good
        return TrainingDivergedError(
            f"{what}; " + (f"the last good checkpoint is {good}" if good else "there is no checkpoint before it")
        )

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def _evaluate_if_due(self) -> None:
        """
        After the checkpoint of the same step, so that neither a signal nor a kill during an evaluation loses training:
        whoever resumes evaluates again.
        """
        progress = self.progress
        ends_epoch = progress.step > 0 and progress.step_in_epoch == 0 and progress.epoch % self.config.eval_epochs == 0
        evaluated = self.history and self.history[-1]["step"] == progress.step
        if evaluated or not (ends_epoch or progress.step >= self.num_steps):
            return
        self.evaluate()
        self.checkpoints.add_evaluation(self._state())

    def _until_stopped(self, batches: Iterable[dict]) -> Iterator[dict]:
        for batch in batches:
            if (stop := self.stop_signals.agreed()) is not None:
                raise self._stopped(stop)
            yield batch

    def evaluate(self) -> dict[str, dict]:
        """Top-1 and top-5 per stage of the weights and their moving average; saves the last model, and the best."""
        started = time.perf_counter()
        models = {"weights": self.accelerator.unwrap_model(self.model, keep_torch_compile=False)}
        if self.ema is not None:
            models["ema"] = self.ema.module
        results = evaluate_accuracy(self.accelerator, models, self._until_stopped(self.evaluation))
        better = max(results, key=lambda name: results[name]["top1"][-1])
        self.history.append(
            {"step": self.progress.step, "epoch": self.progress.epoch, "chosen": better, "results": results}
        )
        top1 = results[better]["top1"][-1]
        say_accuracy(self, self.progress, results, time.perf_counter() - started)
        folders = ["last"]
        if top1 > self.progress.best_top1:
            self.progress.best_top1, self.progress.best_step = top1, self.progress.step
            folders.append("best")
        if self.accelerator.is_main_process:
            for folder in folders:
                save_model(self.output_dir / folder, models[better], results[better], self, self.progress)
        self._save_results()
        self.accelerator.wait_for_everyone()
        return results

    def _save_results(self) -> None:
        if self.accelerator.is_main_process:
            replace_file(self.output_dir / "results.json", json.dumps(self._results(), indent=1))

    def _results(self) -> dict:
        cuda = self.accelerator.device.type == "cuda"
        return {
            "step": self.progress.step,
            "seconds": round(self.progress.seconds, 1),
            "skipped_images": self.progress.skipped_images,
            "processes": self.accelerator.num_processes,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            # Which images choose the best epoch, and which are reported: measured once, at the end.
            "selected_on": self.data.selected_on,
            "split": self.data.split,
            "test": self.test,
            "history": self.history,
        }


def train(config: TrainingConfig) -> dict:
    """Train as configured; what was measured, as in `results.json`."""
    return TrainingRun(config).run()
