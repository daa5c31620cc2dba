"""
Plain Transformers ViT / DeiT classifiers → models of this package, and a stage of a ThinkingViT → a plain classifier.

Both ways are one operation, because a stage is the leading corner of every weight: parameters pair up by name, and the
smaller of the two is the leading corner of the larger.
"""

import os
from collections.abc import Iterator

import torch
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from .configuration_thinkingvit import ThinkingViTConfig


# What both kinds of model mean in the same way, whatever the width.
SHARED_FIELDS = (
    "num_hidden_layers",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
    "id2label",
    "label2id",
    "problem_type",
)


ONE_HEAD = (ViTForImageClassification, DeiTForImageClassification)
ONE_OR_TWO_HEADS = (*ONE_HEAD, DeiTForImageClassificationWithTeacher)


def load_classifier(
    source: str | os.PathLike | PreTrainedModel, accepted: tuple[type[PreTrainedModel], ...]
) -> PreTrainedModel:
    """
    An image classifier of one of the `accepted` classes, from a model, a folder or a Hub id.

    Raises:
        ValueError: if it is of another class, or its checkpoint lacks weights, such as those of the classifier.
    """
    names = " or ".join(f"`{expected.__name__}`" for expected in accepted)
    if isinstance(source, (str, os.PathLike)):
        model, loading = AutoModelForImageClassification.from_pretrained(source, output_loading_info=True)
        if loading["missing_keys"]:
            raise ValueError(
                f"{source} is no complete image classifier: its checkpoint lacks {sorted(loading['missing_keys'])}. "
                f"Expected a fine-tuned {names}."
            )
    else:
        model = source
    if not isinstance(model, accepted):
        raise ValueError(f"Expected a {names}, got {type(model).__name__}.")
    if not model.config.num_labels:
        raise ValueError(f"The {type(model).__name__} has no classification head (`num_labels` = 0).")
    return model


def load_vit(
    source: str | os.PathLike | PreTrainedModel, accepted: tuple[type[PreTrainedModel], ...] = ONE_HEAD
) -> PreTrainedModel:
    """A ViT or DeiT image classifier, as `load_classifier` returns it."""
    return load_classifier(source, accepted)


# Fields that the source's weights fix: another value would leave weights out, or put them in the wrong place.
FIXED_FIELDS = (
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "num_hidden_layers",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
    "num_labels",
    "use_distillation_token",
    "distilled",
)


def check_overrides(overrides: dict, fixed_fields: tuple[str, ...] = FIXED_FIELDS) -> None:
    """`ValueError` for overrides of what the source's weights fix; labels may be renamed, not added or removed."""
    fixed = [name for name in fixed_fields if name in overrides]
    if fixed:
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in fixed)} cannot be overridden: the weights of the source fix them."
        )


def thinkingvit_config_from_vit(
    config: PreTrainedConfig, thinking_stages: list[int] | None = None, **overrides
) -> ThinkingViTConfig:
    """
    The configuration of a ThinkingViT with the head size of the ViT or DeiT `config`, as wide as its widest stage.

    Raises:
        ValueError: if all of `thinking_stages` have fewer heads than the source, or an override changes what the
            source's weights fix.
    """
    check_overrides(overrides)
    source_heads = config.num_attention_heads
    thinking_stages = [source_heads, 2 * source_heads] if thinking_stages is None else thinking_stages
    if not isinstance(thinking_stages, (list, tuple)) or max(thinking_stages, default=0) < source_heads:
        raise ValueError(
            f"`thinking_stages` ({thinking_stages}) must have a stage of {source_heads} heads or more: the source has "
            f"{source_heads}."
        )
    heads = max(thinking_stages)
    fields = {name: getattr(config, name) for name in SHARED_FIELDS}
    fields.update(
        thinking_stages=thinking_stages,
        num_attention_heads=heads,
        hidden_size=config.hidden_size // source_heads * heads,
        intermediate_size=config.intermediate_size * heads // source_heads,
        use_distillation_token=isinstance(config, DeiTConfig),
    )
    return ThinkingViTConfig(**{**fields, **overrides})


def _pairs(model: PreTrainedModel, vit: PreTrainedModel) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(parameter of our model, the ViT's parameter of the same role), for every parameter of the ViT."""
    nested = dict(model.named_parameters())
    for name, parameter in vit.named_parameters():
        name = name.replace(f"{vit.base_model_prefix}.", f"{model.base_model_prefix}.", 1)
        name = name.removeprefix("cls_") if name.startswith("cls_classifier.") else name
        yield nested[name.replace("patch_embeddings.projection.", "patch_embeddings.")], parameter


def _leading(parameter: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return parameter[tuple(slice(size) for size in shape)]


def match_source(model: PreTrainedModel, source: PreTrainedModel) -> None:
    """`model` takes on device, dtype and mode of `source`; `ValueError` if their numbers of labels differ."""
    if model.config.num_labels != source.config.num_labels:
        raise ValueError(
            f"`id2label` names {model.config.num_labels} labels, but the source has {source.config.num_labels}: their "
            "number cannot change here."
        )
    model.to(device=source.device, dtype=source.dtype).train(source.training)


@torch.no_grad()
def import_vit(model: PreTrainedModel, vit: PreTrainedModel) -> None:
    """Put the weights of `vit` into the leading channels and heads of `model`, which takes on its dtype and mode."""
    match_source(model, vit)
    for nested, parameter in _pairs(model, vit):
        _leading(nested, parameter.shape).copy_(parameter)


@torch.no_grad()
def export_stage(model: PreTrainedModel, stage_index: int) -> PreTrainedModel:
    """A plain ViT, or DeiT where there is a distillation token, with the weights of one stage of a ThinkingViT."""
    config = model.config
    if isinstance(stage_index, bool) or not isinstance(stage_index, int) or not 0 <= stage_index < config.num_stages:
        raise ValueError(f"`stage_index` must be an integer from 0 to {config.num_stages - 1}, got {stage_index!r}.")
    stage = config.stages[stage_index]
    config_class, vit_class = (
        (DeiTConfig, DeiTForImageClassification)
        if config.use_distillation_token
        else (ViTConfig, ViTForImageClassification)
    )
    fields = {name: getattr(config, name) for name in SHARED_FIELDS}
    vit = vit_class(config_class(**fields, **stage._asdict()))
    vit.to(device=model.device, dtype=model.dtype)
    for nested, parameter in _pairs(model, vit):
        parameter.copy_(_leading(nested, parameter.shape))
    return vit.train(model.training)


__all__ = [
    "ONE_OR_TWO_HEADS",
    "SHARED_FIELDS",
    "export_stage",
    "import_vit",
    "load_classifier",
    "load_vit",
    "match_source",
    "check_overrides",
    "thinkingvit_config_from_vit",
]
