"""
Converts plain Transformers ViT and DeiT classifiers to models of this package, and a stage of a ThinkingViT back.

Both directions pair the parameters by name. A stage uses the leading rows and columns of every weight, so the smaller
parameter of a pair is a leading slice of the larger.
"""

import os
from collections.abc import Iterator, Sequence

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
from transformers.utils import logging

from .configuration_avit import AViTConfig
from .configuration_labels import complete_labels
from .configuration_thinkingvit import ThinkingViTConfig
from .nested_projection import check_merged


logger = logging.get_logger(__name__)

# Fields with the same meaning in both configurations, independent of the width.
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


PLAIN_VIT = (ViTForImageClassification,)
ONE_HEAD = (ViTForImageClassification, DeiTForImageClassification)
ONE_OR_TWO_HEADS = (*ONE_HEAD, DeiTForImageClassificationWithTeacher)


# Prefixes of the classifiers' parameters, in our models and in the source.
HEADS = ("classifier.", "cls_classifier.", "distillation_classifier.", "exit_classifiers.")


def load_classifier(
    source: str | os.PathLike | PreTrainedModel, accepted: tuple[type[PreTrainedModel], ...], overrides: dict
) -> PreTrainedModel:
    """
    An image classifier of one of the `accepted` classes, from a model, a folder or a Hub id. It may lack the
    classification head if `overrides` of the configuration define the labels.

    Raises:
        ValueError: if it has another class, or its checkpoint lacks weights, such as those of the head.
    """
    needs_classifier = all(overrides.get(name) is None for name in ("num_labels", "id2label", "label2id"))
    names = " or ".join(f"`{expected.__name__}`" for expected in accepted)
    if isinstance(source, (str, os.PathLike)):
        model, loading = AutoModelForImageClassification.from_pretrained(source, output_loading_info=True)
        missing = sorted(key for key in loading["missing_keys"] if needs_classifier or not key.startswith(HEADS))
        if missing:
            raise ValueError(
                f"{source} is no complete image classifier: its checkpoint lacks {missing}. Expected a fine-tuned "
                f"{names}{'; or pass `num_labels`, for a new classifier' if needs_classifier else ''}."
            )
    else:
        model = source
    if not isinstance(model, accepted):
        raise ValueError(f"Expected a {names}, got {type(model).__name__}.")
    if needs_classifier and not model.config.num_labels:
        raise ValueError(
            f"The {type(model).__name__} has no classification head (`num_labels` = 0): pass `num_labels`."
        )
    return model


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
    "use_distillation_token",
    "distilled",  # the former name of A-ViT's `use_distillation_token`
)


def check_overrides(overrides: dict, fixed_fields: tuple[str, ...] = FIXED_FIELDS) -> None:
    """`ValueError` if `overrides` has one of `fixed_fields`, which the source's weights fix."""
    fixed = [name for name in fixed_fields if name in overrides]
    if fixed:
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in fixed)} cannot be overridden: the weights of the source fix them."
        )


def override_fields(fields: dict, overrides: dict) -> dict:
    """
    The source's `fields`, updated with `overrides`. One of `num_labels`, `id2label` and `label2id` is enough; the
    source's label names remain if only their number is given and is the same.

    Raises:
        ValueError: if the overrides' labels contradict each other.
    """
    labels = complete_labels(overrides)
    names = ("num_labels", "id2label", "label2id")
    others = {name: value for name, value in overrides.items() if name not in names}
    only_number = overrides.get("id2label") is None and overrides.get("label2id") is None
    if only_number and overrides.get("num_labels") == len(fields["id2label"]):
        labels = {}
    return {**fields, **others, **labels}


def thinkingvit_config_from_vit(
    config: PreTrainedConfig, thinking_stages: list[int] | None = None, **overrides
) -> ThinkingViTConfig:
    """
    The configuration of a ThinkingViT with the head size of the ViT or DeiT `config`, as wide as its widest stage.

    Raises:
        ValueError: if all of `thinking_stages` have fewer heads than the source, or an override changes a field
            that the source's weights fix.
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
    return ThinkingViTConfig(**override_fields(fields, overrides))


def fields_from_vit(config: PreTrainedConfig, overrides: dict) -> dict:
    """
    The fields of a model of the size of the ViT or DeiT `config`, before `overrides`.

    Raises:
        ValueError: if an override changes what the source's weights fix.
    """
    check_overrides(overrides)
    names = ("hidden_size", "num_attention_heads", "intermediate_size", *SHARED_FIELDS)
    return {name: getattr(config, name) for name in names}


def avit_config_from_vit(config: PreTrainedConfig, **overrides) -> AViTConfig:
    """
    The configuration of an A-ViT with the sizes of the ViT or DeiT `config`, and a distillation token for a DeiT.

    Raises:
        ValueError: if an override changes a field that the source's weights fix.
    """
    fields = fields_from_vit(config, overrides)
    fields["use_distillation_token"] = isinstance(config, DeiTConfig)
    return AViTConfig(**override_fields(fields, overrides))


def _pairs(model: PreTrainedModel, vit: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name and parameter of our model, the ViT's parameter of the same role), for every parameter of the ViT."""
    nested = own_weights(model)
    for name, parameter in own_weights(vit).items():
        name = _our_name(model, vit, name)
        yield name, nested[name], parameter


def own_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters by name; `ValueError` if they are not all that the model computes with, or no plain ones."""
    check_merged(model, "a copy of its weights")
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if type(parameter) is not torch.nn.Parameter:
            raise ValueError(
                f"{type(model).__name__} has weights that are no plain parameters, but quantised or sharded: {name} is "
                f"of {type(parameter).__name__}. Load it without quantisation first."
            )
    return parameters


def _our_name(model: PreTrainedModel, vit: PreTrainedModel, name: str) -> str:
    """The name in our model of the ViT's parameter `name`."""
    name = name.replace(f"{vit.base_model_prefix}.", f"{model.base_model_prefix}.", 1)
    name = name.removeprefix("cls_") if name.startswith("cls_classifier.") else name
    return name.replace("patch_embeddings.projection.", "patch_embeddings.")


def _leading(parameter: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return parameter[tuple(slice(size) for size in shape)]


def pairs_of_layers(
    model: PreTrainedModel, vit: PreTrainedModel, layers: Sequence[int], classifier: str = "classifier."
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """
    (leading corner of our model's parameter, the ViT's parameter), for every parameter of the ViT, whose layers are
    those of our model with the numbers `layers`, and whose classifier is ours with the prefix `classifier`.
    """
    nested = own_weights(model)
    ours = f"{model.base_model_prefix}.layers."
    taken = {f"{ours}{index}.": f"{ours}{number}." for index, number in enumerate(layers)}
    taken["classifier."] = classifier
    for name, parameter in vit.named_parameters():
        name = _our_name(model, vit, name)
        prefix = next((prefix for prefix in taken if name.startswith(prefix)), None)
        name = name if prefix is None else name.replace(prefix, taken[prefix], 1)
        yield _leading(nested[name], parameter.shape), parameter


def match_source(model: PreTrainedModel, source: PreTrainedModel) -> bool:
    """
    Move `model` to the device, dtype and training mode of `source`.

    Returns:
        Whether the source's classifier fits. If the numbers of labels differ it does not: `model` gets a newly
        initialised one, and a warning as from `from_pretrained`.
    """
    model.to(device=source.device, dtype=source.dtype).train(source.training)
    fits = model.config.num_labels == source.config.num_labels
    if not fits:
        fresh = sorted(name for name, _ in model.named_parameters() if name.startswith(HEADS))
        origin = source.config.name_or_path or f"the given {type(source).__name__}"
        logger.warning(
            f"Some weights of {type(model).__name__} were not initialized from {origin} and are newly initialized, "
            f"because it has {source.config.num_labels} labels and not {model.config.num_labels}: {fresh}\n"
            "You should probably TRAIN this model on a down-stream task to be able to use it for predictions and "
            "inference."
        )
    return fits


@torch.no_grad()
def import_vit(model: PreTrainedModel, vit: PreTrainedModel) -> bool:
    """
    Copy the weights of `vit` into the leading channels and heads of `model`, and move `model` to its device, dtype and
    training mode. Returns whether the classifier was copied (see `match_source`).
    """
    takes_classifier = match_source(model, vit)
    for name, nested, parameter in _pairs(model, vit):
        if takes_classifier or not name.startswith(HEADS):
            _leading(nested, parameter.shape).copy_(parameter)
    return takes_classifier


@torch.no_grad()
def export_stage(model: PreTrainedModel, stage_index: int) -> PreTrainedModel:
    """A plain ViT, or DeiT if there is a distillation token, with the weights of one stage of a ThinkingViT."""
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
    sizes = {name: getattr(stage, name) for name in ("num_attention_heads", "hidden_size", "intermediate_size")}
    vit = vit_class(config_class(**fields, **sizes))
    vit.to(device=model.device, dtype=model.dtype)
    for _, nested, parameter in _pairs(model, vit):
        parameter.copy_(_leading(nested, parameter.shape))
    return vit.train(model.training)


__all__ = [
    "HEADS",
    "ONE_HEAD",
    "ONE_OR_TWO_HEADS",
    "PLAIN_VIT",
    "SHARED_FIELDS",
    "avit_config_from_vit",
    "check_overrides",
    "export_stage",
    "fields_from_vit",
    "import_vit",
    "load_classifier",
    "match_source",
    "override_fields",
    "own_weights",
    "pairs_of_layers",
    "thinkingvit_config_from_vit",
]
