"""The parts of a run: processes, data, model, loss, optimizer, schedule and evaluation batches."""

import math
from pathlib import Path

from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    parse_flag_from_env,
    set_seed,
)
from torch.utils.data import DataLoader

from ..accelerate_state import check_precision
from ..data import ImageSplit
from .checkpoints import list_checkpoints, recover_checkpoints, recover_folder
from .config import TrainingConfig
from .continuation import as_begun
from .data import load_data, num_train_images
from .distillation import load_teacher
from .losses import TrainingLoss
from .memory_images import load_in_memory
from .recipe import build_ema, build_mixup, build_optimizer, build_schedule
from .splits import TrainingData, held_out_from
from .starting_point import build_model
from .stop_signals import ignore_stop_signals
from .tasks import training_task


# Environment variables in which `accelerate launch` requests what is not supported here.
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "A parallelism configuration (tensor, context or sequence parallelism)",
}


def build_accelerator(config: TrainingConfig) -> Accelerator:
    """The `Accelerator` of a run; `ValueError` if the launcher requests to shard the model."""
    # Checked before Accelerate is built, which would first report the missing package.
    for variable, name in UNSUPPORTED.items():
        if parse_flag_from_env(variable):
            raise _unsupported(name)
    check_precision(config.mixed_precision)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        # A plugin, because ACCELERATE_GRADIENT_ACCUMULATION_STEPS overrides a plain number.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        kwargs_handlers=[DistributedDataParallelKwargs()],
        log_with=config.trackers or None,
        project_dir=config.output_dir,
        cpu=config.cpu,
        dynamo_backend="inductor" if config.compile else None,
    )
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise _unsupported(kind.value)
    return accelerator


def _unsupported(name: str) -> ValueError:
    return ValueError(
        f"{name} is not supported: it divides models that do not fit on one device, and these do. Use plain "
        "multi-GPU (DDP): `accelerate launch --multi_gpu`."
    )


class TrainingSetup:
    """
    The parts of a run, ready for its first step.

    Args:
        config (`TrainingConfig`): checked.
        data (`TrainingData`, *optional*): the images; by default those that the configuration names.

    Raises:
        ValueError: where the configuration, the data and the machine do not fit together; before anything is written.
    """

    def __init__(self, config: TrainingConfig, data: TrainingData | None = None):
        config.check()
        self.config, self.task = config, training_task(config.task)
        self.output_dir = Path(config.output_dir)
        self.accelerator = build_accelerator(config)
        self._check_output_dir()
        config = as_begun(config)
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
        with self.accelerator.local_main_process_first():  # one process downloads, the others read its cache
            self.data = load_data(config) if data is None else data
        self.num_images = num_train_images(config, self.data.train)
        self.steps_per_epoch = self.num_images // config.batch_size
        if not self.steps_per_epoch:
            raise ValueError(f"`batch_size` ({config.batch_size}) is more than there are images ({self.num_images}).")
        set_seed(config.seed)
        say = self.accelerator.print
        say(self.data.summary)
        source = config.from_pretrained or config.from_vit
        if source and self.data.selected_on == held_out_from(config.train_split):
            say(
                f"`{source}` must not have learned the images that are held out here: if it was trained on this data, "
                "then with a `validation_fraction` at least as great"
            )
        model = build_model(config, self.data.id2label, say)
        self.model_config = model.config
        self.processor, config = self.task.image_processor(config, model.config, say)
        self.config = config
        self.num_epochs = config.epochs + config.cooldown_epochs
        self.num_steps = min(self.num_epochs * self.steps_per_epoch, config.max_steps or math.inf)
        model.to(self.accelerator.device)
        self.loss = TrainingLoss(config, model.config, load_teacher(config, model.config, self.accelerator.device, say))
        self.ema = build_ema(config, model)
        optimizer = build_optimizer(config, model)
        self.accelerator.ddp_handler.find_unused_parameters = self.loss.leaves_parameters_out
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.schedule = build_schedule(config, self.optimizer, self.steps_per_epoch)
        self.mixup = build_mixup(config, model.config.num_labels)
        self.transform = self.task.augmentation(config, model.config)
        self.memory_images = None
        if config.in_memory:
            with self.accelerator.local_main_process_first():
                self.memory_images = load_in_memory(self.data.train)
            if self.num_images > len(self.memory_images.labels):
                raise ValueError(
                    f"`in_memory` makes epochs of one pass over the {len(self.memory_images.labels)} images: "
                    f"`images_per_epoch` ({config.images_per_epoch}) must not be more."
                )
        self.evaluation = self.batches_to_evaluate(self.data.evaluation)

    def batches_to_evaluate(self, split: ImageSplit) -> DataLoader:
        """The evaluation batches of a split, shared out over the processes."""
        batches = self.task.evaluation_batches(split, self.processor, self.config, self.model_config)
        batches.worker_init_fn = ignore_stop_signals
        return self.accelerator.prepare(batches)

    def _check_output_dir(self) -> None:
        """Refuse to overwrite another run, and complete replacements of folders that a kill has interrupted."""
        checkpoints = self.output_dir / "checkpoints"
        if self.accelerator.is_main_process:
            recover_checkpoints(checkpoints)
            read = [path for path in (self.config.from_pretrained, self.config.teacher) if path is not None]
            for folder in (self.output_dir / "last", self.output_dir / "best", *map(Path, read)):
                recover_folder(folder)
        self.accelerator.wait_for_everyone()
        if self.config.resume is None and list_checkpoints(checkpoints):
            raise ValueError(
                f"`{self.output_dir}` holds the checkpoints of a run: continue it with `--resume auto`, or choose "
                "another `output_dir`."
            )
