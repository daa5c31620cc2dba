"""
The training loop, on Accelerate: one process or many, from the first step or from where a run was stopped.

What a run is made of is in `setup.py`, one step in `step.py`, the loss in `losses.py`.
"""

import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..accelerate_state import released_afterwards
from .checkpoints import Checkpoints
from .config import TrainingConfig
from .data import Place, train_batches
from .divergence import TrainingDivergedError, check_weights
from .evaluation import evaluate_epoch, evaluation_is_due, run_results, save_results
from .reporting import continue_models, report_test
from .resuming import resume, state_of_run
from .setup import TrainingSetup
from .splits import TrainingData
from .step import train_micro_batch, update_schedule_and_average
from .stop_signals import StopSignals
from .summary import end_summary, start_summary
from .training_log import TrainingLog


__all__ = ["TrainingDivergedError", "TrainingRun", "train"]


class TrainingRun(TrainingSetup):
    """
    A configured run, ready to train.

    Args:
        config (`TrainingConfig`): checked.
        data (`TrainingData`, *optional*): the images; by default those that the configuration names.

    Raises:
        ValueError: where the configuration, the data and the machine do not fit together; before anything is written.
    """

    def __init__(self, config: TrainingConfig, data: TrainingData | None = None):
        super().__init__(config, data)
        self.checkpoints = Checkpoints(
            self.output_dir / "checkpoints", self.accelerator, self.ema, config.keep_checkpoints
        )
        self.stop_signals = StopSignals(self.accelerator)
        self.progress, self.history = resume(self, self.checkpoints)
        self.test: dict | None = None
        self.within_step = False

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
        self.model.train()
        self.schedule.step_update(self.progress.step)
        config, progress = self.config, self.progress
        with TrainingLog(self, progress) as log, self.stop_signals.listening():
            continue_models(self, self.history, progress, self.checkpoints.last_good)
            if not self.checkpoints.holds_last_good():
                self.save()
            self._evaluate_if_due()  # where the run was stopped during an evaluation
            while progress.step < self.num_steps:  # an epoch, or the rest of one
                log.restart_clock()
                for index, batch in enumerate(self.batches()):
                    micro_batch = index % config.gradient_accumulation_steps
                    self.within_step = True
                    log.add(train_micro_batch(self, batch, progress.step, micro_batch), batch["skipped"])
                    if micro_batch + 1 < config.gradient_accumulation_steps:
                        continue
                    self.finish_step()
                    log.finish_step()
                    ends_epoch = progress.step_in_epoch == 0 or progress.step >= self.num_steps
                    stop = self.stop_signals.agreed()
                    saves = ends_epoch or stop is not None or progress.step % config.save_steps == 0
                    if saves or progress.step % config.log_steps == 0:
                        log.report(self.checkpoints.last_good)
                    if saves:
                        self.save()
                        log.restart_clock()
                    if stop is not None:
                        raise self._stopped(stop)
                    if ends_epoch:
                        break
                self._evaluate_if_due()
            self.test = report_test(self, self.history, progress, self._until_stopped)
            self._save_results()
        return self._results()

    def batches(self) -> Iterable[dict]:
        """The micro-batches of this process, from the present step to the end of the epoch."""
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
        if self.memory_images is not None:
            return self.memory_images.batches(self.transform, place, self.config.shuffle, self.accelerator.device)
        return train_batches(self.config, self.data.train, self.transform, place)

    def finish_step(self) -> None:
        """Count the step whose last micro-batch has been trained on."""
        update_schedule_and_average(self, self.progress.step + 1)
        self.progress.finish_step(self.steps_per_epoch)
        self.within_step = False

    def save(self) -> Path:
        """
        Save a checkpoint of the finished step.

        Raises:
            RuntimeError: in the middle of a step.
            TrainingDivergedError: if a weight is not finite.
        """
        if self.within_step:
            raise RuntimeError("A step that is not finished cannot be saved: continue from the checkpoint before it.")
        check_weights(self.accelerator, self.model, self.progress.step, self.checkpoints.last_good)
        return self.checkpoints.save(self.progress.step, state_of_run(self, self.progress, self.history))

    def evaluate(self) -> dict[str, dict]:
        """Evaluate now, as `evaluate_epoch` does, and save the results."""
        measured = evaluate_epoch(self, self.progress, self.history, self._until_stopped)
        self._save_results()
        return measured

    def _evaluate_if_due(self) -> None:
        """
        Called when the checkpoint of the same step is saved, so that neither a signal nor a kill during an evaluation
        loses training: the resumed run evaluates again.
        """
        if evaluation_is_due(self, self.progress, self.history):
            self.evaluate()
            self.checkpoints.add_evaluation(state_of_run(self, self.progress, self.history))

    def _until_stopped(self, batches: Iterable[dict]) -> Iterator[dict]:
        for batch in batches:
            if (stop := self.stop_signals.agreed()) is not None:
                raise self._stopped(stop)
            yield batch

    def _stopped(self, stop: signal.Signals) -> SystemExit:
        """To raise when the newest checkpoint is of the step that was finished last."""
        message = f"stopped by {stop.name}; continue with --resume auto from {self.checkpoints.last_good}"
        return SystemExit(message if self.accelerator.is_main_process else 1)

    def _save_results(self) -> None:
        save_results(self, self._results())

    def _results(self) -> dict:
        return run_results(self, self.progress, self.history, self.test)


@released_afterwards()
def train(config: TrainingConfig) -> dict:
    """Train as configured, with summaries for the console; what was measured, as in `results.json`."""
    run = TrainingRun(config)
    run.accelerator.print(start_summary(run))
    results = run.run()
    run.accelerator.print(end_summary(run, results))
    return results
