"""
What a training step consists of, from the library that defines the recipe: timm's augmentation, mixup, parameter
groups, schedule and moving average.
"""

from typing import Any

import torch
from timm.data import Mixup, create_transform
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from ..models.config_checks import as_pair
from .config import TrainingConfig


# Added to every token or to attention scores, or a token themselves: none of them is a weight that decay should shrink.
NO_WEIGHT_DECAY = ("*cls_token", "*distillation_token", "*position_embeddings", "*relative_position_bias_table")


def train_transform(config: TrainingConfig, image_size: int | tuple[int, int]) -> Any:
    """From a PIL image to a normalised float32 tensor `(channels, height, width)`."""
    return create_transform(
        as_pair(image_size),
        is_training=True,
        scale=tuple(config.crop_scale),
        ratio=tuple(config.crop_ratio),
        hflip=config.horizontal_flip,
        color_jitter=config.color_jitter or None,
        auto_augment=config.auto_augment,
        interpolation="bicubic",
        mean=tuple(config.image_mean),
        std=tuple(config.image_std),
        re_prob=config.random_erasing,
        re_mode="pixel",
    )


def build_mixup(config: TrainingConfig, num_labels: int) -> Mixup | None:
    if not config.uses_mixup:
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        switch_prob=config.mixup_switch_prob,
        label_smoothing=config.label_smoothing,
        num_classes=num_labels,
    )


def build_optimizer(config: TrainingConfig, model: nn.Module) -> torch.optim.AdamW:
    groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=NO_WEIGHT_DECAY)
    return torch.optim.AdamW(
        groups, lr=config.scaled_learning_rate, betas=(config.adam_beta1, config.adam_beta2), weight_decay=0.0
    )


def build_schedule(config: TrainingConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> CosineLRScheduler:
    """Warm-up, cosine and cooldown, of the number of optimizer steps done (`step_update`)."""
    return CosineLRScheduler(
        optimizer,
        t_initial=config.epochs * steps_per_epoch,
        lr_min=config.min_learning_rate,
        warmup_t=round(config.warmup_epochs * steps_per_epoch),
        warmup_lr_init=config.warmup_learning_rate,
        cycle_limit=1,
        t_in_epochs=False,
    )


def build_ema(config: TrainingConfig, model: nn.Module) -> ModelEmaV3 | None:
    return ModelEmaV3(model, decay=config.ema_decay) if config.ema_decay > 0 else None
