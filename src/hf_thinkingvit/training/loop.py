"""The training loop, on Accelerate: one process or many, from the first step or from where a run was killed."""

import dataclasses
import json
import logging
import math
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import set_seed
from tqdm import tqdm
from transformers import AutoModelForImageClassification, PreTrainedModel

from ..data import evaluation_batches
from ..evaluation.accuracy import evaluate_accuracy
from ..hub import accuracy_results, model_card
from ..image_processing import evaluation_image_processor
from ..public_names import public_name
from .checkpoints import Checkpoints, list_checkpoints, replace_folder
from .config import TrainingConfig
from .data import Place, load_data, num_train_images, train_batches
from .losses import TrainingLoss
from .recipe import build_ema, build_mixup, build_optimizer, build_schedule, train_transform
from .seeding import seeded
from .starting_point import build_model


logger = logging.getLogger(__name__)

# What may differ between a run and its continuation without making it another run.
FREE_TO_CHANGE = {
    *("output_dir", "resume", "num_workers", "trackers", "log_steps", "save_steps", "keep_checkpoints", "cpu"),
    *("eval_epochs", "eval_batch_size", "max_steps", "gradient_accumulation_steps", "compile", "model_license"),
}


class TrainingDivergedError(RuntimeError):
    """The loss is no longer a finite number."""


@dataclasses.dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    skipped_images: int = 0
    seconds: float = 0.0
    best_top1: float = -1.0


class TrainingRun:
    """
    A configured run, ready to train.

    Args:
        config (`TrainingConfig`): checked.

    Raises:
        ValueError: where the configuration, the data and the machine do not fit together; before anything is written.
    """

    def __init__(self, config: TrainingConfig):
        config.check()
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=config.trackers or None,
            project_dir=str(self.output_dir),
            cpu=config.cpu,
            dynamo_backend="inductor" if config.compile else None,
        )
        if self.accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError(
                "FSDP is not supported: it shards weights that do not fit on one device, and these models do. Use "
                "plain multi-GPU (DDP): `accelerate launch --multi_gpu`."
            )
        self._check_output_dir()
        world_size = self.accelerator.num_processes
        parts = world_size * config.gradient_accumulation_steps
        if config.batch_size % parts:
            raise ValueError(
                f"`batch_size` ({config.batch_size}) must be a multiple of {parts}: {world_size} processes times "
                f"{config.gradient_accumulation_steps} accumulated parts."
            )
        self.batch_of_process = config.batch_size // parts
        if config.uses_mixup and self.batch_of_process % 2:
            raise ValueError(
                f"mixup and cutmix pair images: {self.batch_of_process} images a process cannot be paired."
            )
        with self.accelerator.local_main_process_first():  # one process downloads, the others find it there
            self.data = load_data(config)
        self.num_images = num_train_images(config, self.data.train)
        self.steps_per_epoch = self.num_images // config.batch_size
        if not self.steps_per_epoch:
            raise ValueError(f"`batch_size` ({config.batch_size}) is more than there are images ({self.num_images}).")
        set_seed(config.seed)
        model = build_model(config, self.data.id2label)
        self.model_config = model.config
        self.num_epochs = config.epochs + config.cooldown_epochs
        self.num_steps = min(self.num_epochs * self.steps_per_epoch, config.max_steps or math.inf)
        model.to(self.accelerator.device)
        self.loss = TrainingLoss(config, model.config, self._load_teacher())
        self.ema = build_ema(config, model)
        optimizer = build_optimizer(config, model)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.schedule = build_schedule(config, self.optimizer, self.steps_per_epoch)
        self.mixup = build_mixup(config, model.config.num_labels)
        self.processor = evaluation_image_processor(
            model.config.image_size, config.crop_pct, config.image_mean, config.image_std
        )
        self.transform = train_transform(config, model.config.image_size)
        self.evaluation = self.accelerator.prepare(
            evaluation_batches(self.data.evaluation, self.processor, config.eval_batch_size, config.num_workers)
        )
        self.checkpoints = Checkpoints(
            self.output_dir / "checkpoints", self.accelerator, self.ema, config.keep_checkpoints
        )
        self.progress = Progress()
        self.history: list[dict] = []
        self.stop_signal = False
        self._resume()

    def _check_output_dir(self) -> None:
        """Never write a new run over an old one."""
        if self.config.resume is None and list_checkpoints(self.output_dir / "checkpoints"):
            raise ValueError(
                f"`{self.output_dir}` holds the checkpoints of a run: continue it with `--resume auto`, or choose "
                "another `output_dir`."
            )

    def _load_teacher(self) -> PreTrainedModel | None:
        if self.config.teacher is None:
            return None
        teacher = AutoModelForImageClassification.from_pretrained(self.config.teacher)
        if teacher.config.num_labels != self.model_config.num_labels:
            raise ValueError(
                f"The teacher has {teacher.config.num_labels} labels, the data {self.model_config.num_labels}."
            )
        return teacher.to(self.accelerator.device).eval().requires_grad_(False)

    def _resume(self) -> None:
        if self.config.resume is None:
            return
        checkpoint = self.checkpoints.find(self.config.resume)
        if checkpoint is None:
            return
        saved = self.checkpoints.load(checkpoint)
        now = self.config.to_dict()
        changed = [
            f"{name}: {saved['config'].get(name)!r} then, {now[name]!r} now"
            for name in now
            if name not in FREE_TO_CHANGE and saved["config"].get(name) != now[name]
        ]
        if changed or saved["steps_per_epoch"] != self.steps_per_epoch:
            what = "; ".join(changed) or f"steps per epoch: {saved['steps_per_epoch']} then, {self.steps_per_epoch} now"
            raise ValueError(
                f"{checkpoint} belongs to another run ({what}). Continue it as it was, or start a new one in another "
                "`output_dir`, with `from_pretrained` if it should begin with these weights."
            )
        self.progress = Progress(**saved["progress"])
        self.history = saved["history"]
        self.accelerator.print(f"resuming from {checkpoint}, step {self.progress.step} of {self.num_steps}")

    def save(self) -> Path:
        """A checkpoint of the finished step; of weights that are finite only."""
        finite = torch.stack([parameter.detach().isfinite().all() for parameter in self.model.parameters()]).all()
        if not self.accelerator.reduce(finite.int(), reduction="sum") == self.accelerator.num_processes:
            raise self._diverged(f"the weights are no longer finite at step {self.progress.step}")
        return self.checkpoints.save(
            self.progress.step,
            {
                "progress": dataclasses.asdict(self.progress),
                "history": self.history,
                "steps_per_epoch": self.steps_per_epoch,
                "config": self.config.to_dict(),
            },
        )

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
        with self.accelerator.accumulate(self.model):
            with self.accelerator.autocast():
                outputs = self.model(pixel_values, **inputs)
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

    # --- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> dict:
        """Train to the end; what was measured, as in `results.json`. Raises `TrainingDivergedError`."""
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self.config.save(self.output_dir / "config.yaml")
        if self.config.trackers:
            flat = {
                k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in self.config.to_dict().items()
            }
            self.accelerator.init_trackers("hf-thinkingvit", flat)
        # Python lets only the main thread listen to signals; elsewhere whoever runs this must stop it.
        listens = threading.current_thread() is threading.main_thread()
        previous = signal.signal(signal.SIGTERM, self._on_signal) if listens else None
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
            while self.progress.step < self.num_steps:
                self._run_epoch(bar)
            if not self.history or self.history[-1]["step"] != self.progress.step:
                self.evaluate()
        finally:
            bar.close()
            if listens:
                signal.signal(signal.SIGTERM, previous)
            self.accelerator.end_training()
        return self._results()

    def _run_epoch(self, bar: tqdm) -> None:
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
            step, last = self.progress.step, self.progress.step >= self.num_steps
            ends = self.progress.step_in_epoch == self.steps_per_epoch
            saves = step % config.save_steps == 0
            # A lone process looks for a signal at every step; several must agree, which costs a message.
            asks = self.accelerator.num_processes == 1 and self.stop_signal
            if step % config.log_steps == 0 or saves or ends or last or asks:
                seconds = time.perf_counter() - started
                stop = self._log(bar, {name: value / count for name, value in sums.items()}, skipped, count, seconds)
                sums, count, skipped, started = {}, 0, 0, time.perf_counter()
                if stop:
                    path = self.save()
                    raise SystemExit(f"stopped by SIGTERM; continue with --resume auto from {path}")
            if saves and not ends:
                self.save()
                started = time.perf_counter()
            if last or ends:
                break
        if self.progress.step_in_epoch == self.steps_per_epoch:
            self.progress.epoch += 1
            self.progress.step_in_epoch = 0
            if self.progress.epoch % config.eval_epochs == 0 or self.progress.step >= self.num_steps:
                self.evaluate()
        self.save()

    def _log(self, bar: tqdm, losses: dict[str, torch.Tensor], skipped: int, count: int, seconds: float) -> bool:
        """Average over the processes and report; whether a signal asked any of them to stop."""
        names = list(losses)
        row = torch.stack([losses[name].float().cpu() for name in names]).tolist()
        local = torch.tensor([*row, float(skipped), float(self.stop_signal)], device=self.accelerator.device)
        *means, skipped, stop = self.accelerator.reduce(local, reduction="sum").tolist()
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
        return stop > 0

    def _diverged(self, what: str) -> TrainingDivergedError:
        good = self.checkpoints.last_good
        return TrainingDivergedError(
            f"{what}; " + (f"the last good checkpoint is {good}" if good else "there is no checkpoint before it")
        )

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, dict]:
        """Top-1 and top-5 per stage of the weights and their moving average; saves the last model, and the best."""
        started = time.perf_counter()
        models = {"weights": self.accelerator.unwrap_model(self.model, keep_torch_compile=False)}
        if self.ema is not None:
            models["ema"] = self.ema.module
        results = evaluate_accuracy(self.accelerator, models, self.evaluation)
        better = max(results, key=lambda name: results[name]["top1"][-1])
        self.history.append(
            {"step": self.progress.step, "epoch": self.progress.epoch, "chosen": better, "results": results}
        )
        top1 = results[better]["top1"][-1]
        for name, result in results.items():
            stages = ", ".join(f"{value:.2f}" for value in result["top1"])
            self.accelerator.print(f"\nepoch {self.progress.epoch}, {name}: top-1 {stages} %", end="")
            if self.config.trackers:
                values = {f"eval/{name}/top1_stage_{stage}": value for stage, value in enumerate(result["top1"])}
                values |= {f"eval/{name}/top5_stage_{stage}": value for stage, value in enumerate(result["top5"])}
                self.accelerator.log(values, step=self.progress.step)
        if self.progress.skipped_images:
            self.accelerator.print(
                f"\n{self.progress.skipped_images} training images could not be decoded so far", end=""
            )
        self.accelerator.print(f" ({time.perf_counter() - started:.0f} s)")
        folders = ["last"]
        if top1 > self.progress.best_top1:
            self.progress.best_top1 = top1
            folders.append("best")
        if self.accelerator.is_main_process:
            for folder in folders:
                self._save_model(self.output_dir / folder, models[better], results[better])
            (self.output_dir / "results.json").write_text(json.dumps(self._results(), indent=1), encoding="utf-8")
        self.accelerator.wait_for_everyone()
        return results

    def _save_model(self, folder: Path, model: PreTrainedModel, result: dict) -> None:
        temporary = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        self.processor.save_pretrained(temporary)
        config = self.config
        dataset = public_name(config.dataset)
        training = {
            "data": f"`{dataset}`, split `{config.train_split}`, {self.num_images} images",
            "epochs": f"{self.progress.epoch} of {self.num_epochs}, {self.progress.step} optimizer steps",
            "batch size": config.batch_size,
            "learning rate": f"{config.scaled_learning_rate:g} at that batch size",
            "seed": config.seed,
        }
        results = accuracy_results(model, result, dataset, split=config.eval_split, training=training)
        name = f"{config.model_type}-{dataset.rsplit('/')[-1]}"
        card = model_card(model, results, name=name, license=config.model_license)
        card.save(temporary / "README.md")
        replace_folder(temporary, folder)

    def _results(self) -> dict:
        cuda = self.accelerator.device.type == "cuda"
        return {
            "step": self.progress.step,
            "seconds": round(self.progress.seconds, 1),
            "skipped_images": self.progress.skipped_images,
            "processes": self.accelerator.num_processes,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "history": self.history,
        }

    def _on_signal(self, signum: int, frame: Any) -> None:
        self.stop_signal = True


def train(config: TrainingConfig) -> dict:
    """Train as configured; what was measured, as in `results.json`."""
    return TrainingRun(config).run()
