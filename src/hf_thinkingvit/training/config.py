"""
One training run as data: read from a YAML file, every field also a command-line flag.

    python examples/train.py --config examples/configs/thinkingvit_cifar10.yaml --epochs 5 --model.patch-size 2

`config_parsing.py` reads it. Fields of the model's own configuration stand under `model` in the file, and are flags
with `model.` in front.
"""

import argparse
import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from ..auto import TASKS
from ..families import FAMILIES
from ..families.record import IMAGE_CLASSIFICATION
from .labels import LABEL_MAPS
from .stage_samplers import STAGE_SAMPLERS


def _help(text: str, default: Any = None, **metadata) -> Any:
    metadata["help"] = text
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainingConfig:
    """
    Everything that a run depends on. The defaults are the published ThinkingViT recipe (arXiv 2507.10800, appendix),
    which is DeiT's.

    Raises:
        ValueError: from `check`, for values that cannot work together.
    """

    dataset: str = _help("Hub id, folder (images or Parquet), Parquet file, or sklearn-digits", "ILSVRC/imagenet-1k")
    output_dir: str = _help("checkpoints, logs, and the best and last model", "outputs/train")

    task: str = _help("what to train for", IMAGE_CLASSIFICATION, choices=sorted(TASKS))
    model_type: str = _help("architecture to train", "thinkingvit", choices=sorted(FAMILIES))
    model: dict = field(default_factory=dict, metadata={"help": argparse.SUPPRESS})
    from_pretrained: str | None = _help("start from a model of this package: folder or Hub id; `model` overrides it")
    from_vit: str | None = _help("start from a plain ViT or DeiT, for thinking_swin a Swin: folder or Hub id")
    label_map: str = _help(
        "how the labels of the data, the starting point and the teacher are paired: index where they number the same "
        "classes under other names",
        "name",
        choices=list(LABEL_MAPS),
    )
    freeze: list[str] = _help("parameters to leave as they are: names with wildcards, such as '*.alpha'", [])
    lora_rank: int = _help(
        "rank of LoRA adapters to train in place of the layers' weights; what is saved is merged. 0 trains all weights",
        0,
    )
    lora_alpha: float | None = _help("the adapters are scaled by lora_alpha / lora_rank; lora_rank where not given")
    attn_implementation: str | None = _help("attention backend: eager, sdpa, flash_attention_2, ...")

    train_split: str = _help("split to train on", "train")
    eval_split: str | None = _help(
        "split to evaluate on and choose the best epoch by; where not given 'validation', else held-out training images"
    )
    validation_fraction: float = _help(
        "share of the training images held out to choose by, where there is no validation split; 0 to choose on 'test'",
        0.1,
    )
    test_split: str | None = _help("split to measure once, at the end; where not given 'test', if it has labels")
    image_column: str | None = _help("column of images; found by its type where not given")
    label_column: str | None = _help("column of labels; found by its type where not given")
    label_names: list[str] = _help(
        "classes of masks, in order; or one file: a name a line, or JSON from indices to names", []
    )
    mask_values: list[str] = _help(
        "value in the masks of each class, in order, such as 1-150; where not given 0, 1, 2, ...", []
    )
    ignored_mask_values: list[str] = _help("values of pixels that do not count; all others must be classes", ["255"])
    image_files: str | None = _help(
        "of a folder with trees of images and masks: pattern of the images, such as 'images/{split}/*.jpg'"
    )
    mask_files: str | None = _help(
        "the same of the masks: where {split} and * stand for the same, they belong together"
    )
    streaming: bool = _help("read the data as a stream instead of downloading it first", False)
    shuffle_buffer: int = _help("images that a stream is shuffled within; 1 keeps the order", 10_000)
    shuffle: bool = _help("reshuffle the training images every epoch", True)
    in_memory: bool = _help(
        "decode the training images once, keep them in memory, and augment whole batches on the device that trains: "
        "for images of one size, without auto_augment and color_jitter",
        False,
    )
    max_train_samples: int | None = _help("train on the first so many images only")
    images_per_epoch: int | None = _help(
        "length of an epoch in images, for streams that do not say it and to evaluate less often than every pass"
    )
    max_eval_samples: int | None = _help(
        "evaluate on so many images only: the first of a split, some of each label of held-out images"
    )
    num_workers: int = _help("processes that read images, per training process", 8)

    epochs: int = _help("passes over the training images, without cooldown", 300)
    cooldown_epochs: int = _help("further epochs at the smallest learning rate", 10)
    warmup_epochs: float = _help("epochs of linear warm-up", 5.0)
    max_steps: int | None = _help("stop after so many optimizer steps, whatever the epochs say")
    batch_size: int = _help("images per optimizer step, over all processes", 1024)
    gradient_accumulation_steps: int = _help("parts that a step's batch is computed in", 1)
    learning_rate: float = _help("at a batch of learning_rate_batch images; scaled by the batch size", 5e-4)
    learning_rate_batch: int = _help("see learning_rate", 512)
    warmup_learning_rate: float = _help("where the warm-up starts; not scaled", 1e-6)
    min_learning_rate: float = _help("where the schedule ends; not scaled", 1e-5)
    schedule: str = _help("of the learning rate after warm-up", "cosine", choices=["cosine", "polynomial"])
    schedule_power: float = _help("exponent of the polynomial", 0.9)
    optimizer: str = _help("by timm's name: adamw, sgd (with Nesterov's momentum), lamb, ...", "adamw")
    backbone_learning_rate: float = _help(
        "factor of the learning rate of all but the score predictors, of a model that prunes tokens", 1.0
    )
    layer_decay: float = _help("factor of the learning rate from each layer to the one before it, to fine-tune", 1.0)
    frozen_backbone_epochs: float = _help(
        "first epochs in which the score predictors alone learn, of a model that prunes tokens", 0.0
    )
    weight_decay: float = _help("none on norms, biases, class token and position embeddings or biases", 0.05)
    momentum: float = _help("of optimizers that have one, such as sgd", 0.9)
    adam_beta1: float = _help("of optimizers of Adam's kind", 0.9)
    adam_beta2: float = _help("of optimizers of Adam's kind", 0.999)
    clip_grad: float | None = _help("greatest norm of the gradients")
    ema_decay: float = _help("of the moving average of the weights; 0 for none", 0.99996)

    image_mean: list[float] | None = _help("of each channel; that of the model started from, else ImageNet's")
    image_std: list[float] | None = _help("of each channel; that of the model started from, else ImageNet's")
    interpolation: str | None = _help("bilinear, bicubic, ...; that of the model started from, else bicubic")
    crop_scale: list[float] = _help("smallest and greatest share of the image that a random crop keeps", [0.08, 1.0])
    crop_ratio: list[float] = _help("smallest and greatest aspect ratio of a random crop", [3 / 4, 4 / 3])
    horizontal_flip: float = _help("probability of a flip", 0.5)
    color_jitter: float = _help("strength, where there is no auto_augment", 0.3)
    auto_augment: str | None = _help("timm's policy; none for none", "rand-m9-mstd0.5-inc1")
    random_erasing: float = _help("probability of erasing a rectangle", 0.25)
    mixup: float = _help("alpha of mixup; 0 for none", 0.8)
    cutmix: float = _help("alpha of cutmix; 0 for none", 1.0)
    mixup_switch_prob: float = _help("probability of cutmix where both are on", 0.5)
    short_side: int | None = _help("of segmentation: shorter side of the images at scale 1; none for their own size")
    long_side: int | None = _help("the longer side is then at most so long")
    scale_jitter: list[float] = _help("of segmentation: smallest and greatest scale", [0.5, 2.0])
    crop_class_share: float = _help("of segmentation: greatest share of one class in a crop (ten tries)", 0.75)
    photometric_distortion: float = _help("of segmentation: probability of each change of colours", 0.5)
    crop_pct: float | None = _help(
        "share of the shorter side that evaluation crops; as the model started from does, else 0.9"
    )

    label_smoothing: float = _help("share of the target spread over all labels", 0.1)
    stage_sampling: str = _help(
        "stages (of an elastic model sub-networks) whose losses train a step: all; sandwich, the first, the last and "
        "random ones between; one, a random one; accumulate, a random one in each micro-batch",
        "all",
        choices=list(STAGE_SAMPLERS),
    )
    sandwich_samples: int = _help("random stages between, with stage_sampling sandwich", 1)
    inplace_distillation: float = _help("share of the last stage's answer in the earlier stages' targets", 0.0)
    teacher: str | None = _help("image classifier to distil from: folder or Hub id")
    distillation: str = _help(
        "from the teacher's answer or its distribution; tokens: of a model that prunes, from the last stage of the "
        "same model without pruning; hidden_states: of an elastic model, from an elastic model's (DynaBERT)",
        "hard",
        choices=["hard", "soft", "tokens", "hidden_states"],
    )
    distillation_weight: float = _help(
        "share of the teacher in the loss; with tokens, the weight of each of its two terms; with hidden_states, the "
        "weight of the teacher's answer",
        0.5,
    )
    hidden_states_weight: float = _help("of the summed squared differences, with distillation hidden_states", 0.1)
    teacher_sub_network: str = _help(
        "what a sub-network learns from, with distillation hidden_states: the whole teacher, or its sub-network of the "
        "same width with all layers",
        "whole",
        choices=["whole", "same_width"],
    )
    distillation_temperature: float = _help("of soft and in-place distillation", 3.0)

    mixed_precision: str = _help("of the computation", "no", choices=["no", "fp16", "bf16"])
    compile: bool = _help("compile the model (torch.compile)", False)
    cpu: bool = _help("train on the CPU even where there is a GPU", False)
    seed: int = _help("of everything random", 0)

    save_steps: int = _help("optimizer steps between checkpoints, besides those at each epoch", 1000)
    keep_checkpoints: int = _help("newest checkpoints to keep", 2)
    resume: str | None = _help("'auto': from output_dir's newest checkpoint, if any; or folder of a checkpoint or run")
    eval_epochs: int = _help("epochs between evaluations; the last epoch is always evaluated", 1)
    eval_batch_size: int = _help("images per process and forward pass in evaluation", 256)
    log_steps: int = _help("optimizer steps between logged losses", 10)
    trackers: list[str] = _help("where to log: tensorboard, wandb, ...", [])
    model_license: str | None = _help("licence to state in the model card, such as apache-2.0")

    @property
    def scaled_learning_rate(self) -> float:
        return self.learning_rate * self.batch_size / self.learning_rate_batch

    @property
    def uses_mixup(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def check(self) -> None:
        positive = ("epochs", "batch_size", "gradient_accumulation_steps", "learning_rate_batch", "save_steps")
        positive += ("keep_checkpoints", "eval_epochs", "eval_batch_size", "log_steps", "shuffle_buffer")
        positive += ("sandwich_samples", "distillation_temperature")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)!r}.")
        not_negative = ("cooldown_epochs", "warmup_epochs", "learning_rate", "warmup_learning_rate", "num_workers")
        not_negative += ("backbone_learning_rate", "frozen_backbone_epochs", "hidden_states_weight")
        for name in (*not_negative, "min_learning_rate", "weight_decay", "mixup", "cutmix", "color_jitter"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)!r}.")
        shares = ("label_smoothing", "inplace_distillation", "distillation_weight", "horizontal_flip", "random_erasing")
        shares += ("crop_class_share", "photometric_distortion", "momentum")
        for name in (*shares, "mixup_switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {getattr(self, name)!r}.")
        for name in (
            "max_steps",
            "max_train_samples",
            "max_eval_samples",
            "images_per_epoch",
            "clip_grad",
            "short_side",
            "long_side",
        ):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)!r}.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"`layer_decay` must be above 0 and at most 1, got {self.layer_decay!r}.")
        if self.layer_decay != 1 and (self.backbone_learning_rate != 1 or self.frozen_backbone_epochs):
            raise ValueError("`layer_decay` does not go with `backbone_learning_rate` and `frozen_backbone_epochs`.")
        for name in ("ema_decay", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 0 and below 1, got {getattr(self, name)!r}.")
        if isinstance(self.lora_rank, bool) or not isinstance(self.lora_rank, int) or self.lora_rank < 0:
            raise ValueError(f"`lora_rank` must be an integer, at least 0, got {self.lora_rank!r}.")
        if self.lora_rank and not (self.from_pretrained or self.from_vit):
            raise ValueError(
                "`lora_rank` adapts trained weights: give `from_pretrained` or `from_vit`, or leave it at 0."
            )
        if self.lora_alpha is not None and not (self.lora_rank and self.lora_alpha > 0):
            raise ValueError(f"`lora_alpha` must be above 0, and goes with `lora_rank`, got {self.lora_alpha!r}.")
        if self.label_map not in LABEL_MAPS:
            raise ValueError(f"`label_map` must be one of {list(LABEL_MAPS)}, got {self.label_map!r}.")
        known = [resampling.name.lower() for resampling in Image.Resampling]
        if self.interpolation not in (*known, None):
            raise ValueError(f"`interpolation` must be one of {known}, got {self.interpolation!r}.")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs > 0:
            raise ValueError(f"`warmup_epochs` ({self.warmup_epochs}) must be fewer than `epochs` ({self.epochs}).")
        for name in ("crop_scale", "crop_ratio", "scale_jitter"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"`{name}` must be two numbers, got {getattr(self, name)!r}.")
        if self.from_pretrained and self.from_vit:
            raise ValueError("`from_pretrained` and `from_vit` are two ways to start: give one of them.")
        family = FAMILIES[self.model_type]
        if self.task not in family.heads:
            raise ValueError(f"{family.name} has models for {sorted(family.heads)}, but `task` is {self.task!r}.")
        if self.task != IMAGE_CLASSIFICATION and (self.uses_mixup or self.teacher):
            raise ValueError(
                f"`mixup`, `cutmix` and `teacher` are of {IMAGE_CLASSIFICATION}: set them to 0, 0 and none."
            )
        if (self.image_files is None) != (self.mask_files is None):
            raise ValueError("`image_files` and `mask_files` belong together: give both.")
        if family.without_mixup and self.uses_mixup:
            raise ValueError(f"{family.without_mixup}: set `mixup` and `cutmix` to 0.")
        known = [entry.name for entry in dataclasses.fields(family.config_class)]
        for name in self.model:
            if name not in known and name not in family.config_class.attribute_map:  # names of earlier versions
                raise ValueError(unknown_field(f"model.{name}", [f"model.{entry}" for entry in known]))
        if "label_smoothing" in self.model:
            raise ValueError("`model.label_smoothing` is of the model's own loss: set `label_smoothing` of the run.")

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """As YAML, which `--config` reads back."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def unknown_field(name: str, known: list[str], what: str = "field", prefix: str = "") -> str:
    """That there is no such field or flag, with the nearest of the `known` ones."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    suggestion = f" Did you mean `{prefix}{nearest[0]}`?" if nearest else ""
    return f"There is no {what} `{prefix}{name}`.{suggestion}"
