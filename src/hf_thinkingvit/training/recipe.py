"""
The parts of the DeiT recipe that timm defines: augmentation, mixup, parameter groups, learning rate schedule and moving
average of the weights.
"""

from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import AugmentOp, posterize
from timm.optim import create_optimizer_v2, get_optimizer_info, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..families import FAMILIES
from ..models.configuration_checks import as_pair
from .config import TrainingConfig
from .layer_decay import with_layer_decay


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


def build_optimizer(config: TrainingConfig, model: nn.Module) -> torch.optim.Optimizer:
    """
    The optimizer that `config.optimizer` names in timm's list, of whose groups those of the backbone have a factor of
    the learning rate where the run configures one.

    Raises:
        ValueError: if it does, and the model has no other parameters than its backbone; if there is no such optimizer.
    """
    groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=NO_WEIGHT_DECAY)
    if config.backbone_learning_rate != 1 or config.frozen_backbone_epochs:
        groups = list(_split_by_backbone(groups, config, model))
    if config.layer_decay != 1:
        groups = list(with_layer_decay(groups, model, config.layer_decay))
    for group in groups:
        group["own_lr_scale"] = group.get("lr_scale", 1.0)
    try:
        get_optimizer_info(config.optimizer)
    except ValueError as error:
        raise ValueError(f"`optimizer` must be one of timm's, such as adamw or sgd: {error}") from None
    return create_optimizer_v2(
        groups,
        opt=config.optimizer,
        lr=config.scaled_learning_rate,
        weight_decay=0.0,  # the groups have theirs
        momentum=config.momentum,
        betas=(config.adam_beta1, config.adam_beta2),
    )


def _split_by_backbone(
    groups: list[dict[str, Any]], config: TrainingConfig, model: nn.Module
) -> Iterator[dict[str, Any]]:
    """Each group in two: the score predictors of token pruning, and all else, which is marked `is_backbone`."""
    patterns = FAMILIES[config.model_type].added_parameters.values()
    added = {name: each for name, each in model.named_parameters() if any(fnmatch(name, to) for to in patterns)}
    predictors = set(map(id, added.values()))
    if not predictors:
        raise ValueError(
            "`backbone_learning_rate` and `frozen_backbone_epochs` are of models with `model.pruning_layers`, whose "
            "score predictors learn at the full rate: leave them at 1 and 0."
        )
    for group in groups:
        for is_backbone in (True, False):
            parameters = [each for each in group["params"] if (id(each) in predictors) != is_backbone]
            if parameters:
                yield {**group, "params": parameters, "is_backbone": is_backbone}


class BackboneFactor(Scheduler):
    """
    A schedule of timm, with a factor for the groups of the optimizer that are marked `is_backbone`.

    Args:
        backbone_factor (`float`): of their learning rate.
        frozen_steps (`int`): first steps, in which their learning rate is 0.
        kwargs: of timm's schedule.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, backbone_factor: float, frozen_steps: int, **kwargs):
        self.backbone_factor, self.frozen_steps = backbone_factor, frozen_steps
        super().__init__(optimizer, **kwargs)

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        for group in self.optimizer.param_groups:
            if group.get("is_backbone"):
                factor = 0.0 if num_updates < self.frozen_steps else self.backbone_factor
                group["lr_scale"] = factor * group.get("own_lr_scale", 1.0)  # earlier checkpoints have none
        super().step_update(num_updates, metric)


class CosineSchedule(BackboneFactor, CosineLRScheduler):
    pass


class PolynomialSchedule(BackboneFactor, PolyLRScheduler):
    pass


def build_schedule(config: TrainingConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Scheduler:
    """
    Warm-up, then cosine or polynomial to `min_learning_rate`, then cooldown, as a function of the number of optimizer
    steps done (`step_update`).
    """
    options = {
        "backbone_factor": config.backbone_learning_rate,
        "frozen_steps": round(config.frozen_backbone_epochs * steps_per_epoch),
        "t_initial": config.epochs * steps_per_epoch,
        "lr_min": config.min_learning_rate,
        "warmup_t": round(config.warmup_epochs * steps_per_epoch),
        "warmup_lr_init": config.warmup_learning_rate,
        "cycle_limit": 1,
        "t_in_epochs": False,
    }
    if config.schedule == "polynomial":
        return PolynomialSchedule(optimizer, power=config.schedule_power, **options)
    return CosineSchedule(optimizer, **options)


def build_ema(config: TrainingConfig, model: nn.Module) -> ModelEmaV3 | None:
    return ModelEmaV3(model, decay=config.ema_decay) if config.ema_decay > 0 else None
