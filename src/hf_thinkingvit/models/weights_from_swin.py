"""Converts plain Transformers Swin classifiers to ThinkingSwin models of the same size."""

import os
import re

import torch
from transformers import PreTrainedModel, SwinForImageClassification

from .configuration_thinking_swin import ThinkingSwinConfig
from .weights_from_vit import HEADS, check_overrides, load_classifier, match_source, override_fields


# Fields with the same meaning in both configurations.
SHARED_FIELDS = (
    "image_size",
    "patch_size",
    "num_channels",
    "embed_dim",
    "depths",
    "num_heads",
    "window_size",
    "mlp_ratio",
    "qkv_bias",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "hidden_act",
    "use_absolute_embeddings",
    "initializer_range",
    "layer_norm_eps",
    "id2label",
    "label2id",
    "problem_type",
)
# Fields that the source's weights fix: another value would leave weights out, or put them in the wrong place.
FIXED_FIELDS = (*SHARED_FIELDS[:9], "use_absolute_embeddings", "hidden_size")


def load_swin(source: str | os.PathLike | PreTrainedModel, overrides: dict) -> SwinForImageClassification:
    """A Swin image classifier, as `load_classifier` returns it."""
    return load_classifier(source, (SwinForImageClassification,), overrides)


def thinking_swin_config_from_swin(config, head_rounds=None, **overrides) -> ThinkingSwinConfig:
    """
    The configuration of a ThinkingSwin with the sizes of the Swin `config`.

    Raises:
        ValueError: if `head_rounds` does not fit the source, or an override changes a field that its weights fix.
    """
    check_overrides(overrides, FIXED_FIELDS)
    heads = list(config.num_heads)
    if head_rounds is None:
        head_rounds = [[heads[0], *(max(1, count // 2) for count in heads[1:])], heads]
    fields = {name: getattr(config, name) for name in SHARED_FIELDS}
    fields.update(head_rounds=head_rounds, qkv_slicing="each_projection")
    return ThinkingSwinConfig(**override_fields(fields, overrides))


def _source_names(name: str) -> list[str]:
    """Names of the source's tensors whose concatenation is our parameter `name`; an empty list for recycling."""
    name = name.removeprefix("thinking_swin.")
    if name.startswith("recyclers."):
        return []
    if name.startswith("classifier."):
        return [name]
    name = name.replace("patch_embeddings.", "patch_embeddings.projection.")
    merging = re.match(r"layers\.(\d+)\.(downsample\..*)", name)
    if merging:  # part of the layer that follows it here, of the layer before it in the source
        name = f"layers.{int(merging[1]) - 1}.{merging[2]}"
    name = re.sub(r"^layers\.", "encoder.layers.", name)
    name = name.replace("attention.relative", "attention.relative_position_bias.relative")
    return [f"swin.{name.replace('.qkv.', f'.{part}_proj.')}" for part in ("qkv" if ".qkv." in name else "q")]


@torch.no_grad()
def import_swin(model: PreTrainedModel, swin: PreTrainedModel) -> None:
    """
    Copy the weights of `swin` into `model`, and move `model` to its device, dtype and training mode. Recycling is left
    unchanged, as is the classifier if the numbers of labels differ.
    """
    takes_classifier = match_source(model, swin)
    weights = dict(swin.named_parameters())
    for name, parameter in model.named_parameters():
        names = _source_names(name)
        if names and (takes_classifier or not name.startswith(HEADS)):
            parameter.copy_(torch.cat([weights[each] for each in names]))


__all__ = ["FIXED_FIELDS", "import_swin", "load_swin", "thinking_swin_config_from_swin"]
