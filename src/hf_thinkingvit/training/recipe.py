"""
The parts of the DeiT recipe that timm defines: augmentation, mixup, parameter groups, learning rate schedule and moving
average of the weights.
"""

from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import AugmentOp, posterize
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..models.configuration_checks import as_pair
from .config import TrainingConfig


# Tokens, and what is added to tokens or attention scores, are no weights of a product: weight decay leaves them out.
NO_WEIGHT_DECAY = ("*cls_token", "*distillation_token", "*position_embeddings", "*relative_position_bias_table")


def train_transform(config: TrainingConfig, image_size: int | tuple[int, int]) -> Any:
    """The augmentation: a callable from a PIL image to a normalised float32 tensor `(channels, height, width)`."""
    transform = create_transform(
        as_pair(image_size),
        is_training=True,
        scale=tuple(config.crop_scale),
        ratio=tuple(config.crop_ratio),
        hflip=config.horizontal_flip,
        color_jitter=config.color_jitter or None,
        auto_augment=config.auto_augment,
        interpolation=config.interpolation or "bicubic",
        mean=tuple(config.image_mean or IMAGENET_DEFAULT_MEAN),
        std=tuple(config.image_std or IMAGENET_DEFAULT_STD),
        re_prob=config.random_erasing,
        re_mode="pixel",
    )
    for operation in _augment_operations(transform.transforms):
        if operation.aug_fn is posterize:
            operation.aug_fn = posterize_to_any_depth
    return transform


def _augment_operations(steps: Any) -> Iterator[AugmentOp]:
    """The operations of timm's AutoAugment (lists of them), RandAugment and AugMix, wherever they are nested."""
    for step in steps:
        if isinstance(step, AugmentOp):
            yield step
        else:
            nested = step if isinstance(step, (list, tuple)) else getattr(step, "ops", getattr(step, "policy", ()))
            yield from _augment_operations(nested)


def posterize_to_any_depth(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    """
    timm's posterize, also for 0 bits, of which it makes a black image as Pillow did up to version 11.3.

    With timm's increasing scale (`inc1`), 4 bits remain at level 0 and none at level 10, and with a standard deviation
    (`mstd0.5`), 2 % of the draws around the published level 9 reach level 10. The published models were trained with
    these black images; Pillow 13 raises an error for fewer than 1 bit.
    """
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return posterize(image, bits_to_keep, **kwargs)


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
    """Warm-up, cosine and cooldown, as a function of the number of optimizer steps done (`step_update`)."""
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
