"""The backbone of one ThinkingViT as the start of a model for another task."""

from dataclasses import fields

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_backbone import StagedBackboneConfig
from .configuration_labels import complete_labels
from .configuration_thinkingvit import ThinkingViTConfig
from .nested_vit import interpolate_positions
from .weights_from_vit import FIXED_FIELDS, check_overrides, own_weights


LABEL_FIELDS = ("num_labels", "id2label", "label2id")
PREDICTORS = "score_predictors."


def segmentation_config(config: ThinkingViTConfig, **overrides) -> ThinkingViTConfig:
    """
    The configuration of a segmentation model with the backbone of `config`, of which `overrides` win. Labels and exits
    are not the source's: another task has others. Nor is token pruning, since every patch is read.

    Raises:
        ValueError: if the labels are not given, or an override changes what the source's weights fix.
    """
    check_overrides(overrides, tuple(name for name in (*FIXED_FIELDS, "thinking_stages") if name != "image_size"))
    if all(overrides.get(name) is None for name in LABEL_FIELDS):
        raise ValueError("The classes of the masks must be given: pass `num_labels`, or their names as `id2label`.")
    # `fields` of the staged configuration: those of the exits and of backbones, and those of all.
    shared = {field.name for field in fields(StagedBackboneConfig)}
    backbone = {field.name for field in fields(ThinkingViTConfig)} - shared
    backbone = {name for name in backbone if not name.startswith(("decoder_", "semantic_", "pruning_"))}
    values = {name: getattr(config, name) for name in backbone} | {"position_interpolation": "bilinear"}
    others = {name: value for name, value in overrides.items() if name not in LABEL_FIELDS}
    return ThinkingViTConfig(**{**values, **others, **complete_labels(overrides)})


@torch.no_grad()
def import_backbone(model: PreTrainedModel, source: PreTrainedModel) -> None:
    """
    Copy the weights of the backbone of `source` into that of `model`, which takes on its device, dtype and mode. The
    predictors of token pruning are left out, and position embeddings are resized to the patch grid of `model`.

    Raises:
        ValueError: if `source` has adapters that are not merged, or quantised weights.
    """
    own_weights(source.base_model)  # refuses those
    model.to(device=source.device, dtype=source.dtype).train(source.training)
    state_dict = source.base_model.state_dict()
    config: PreTrainedConfig = model.config
    state_dict["embeddings.position_embeddings"] = interpolate_positions(
        state_dict["embeddings.position_embeddings"],
        config.num_prefix_tokens,
        source.config.patch_grid,
        config.patch_grid,
        config.position_interpolation,
    )
    model.base_model.load_state_dict({name: state_dict[name] for name in state_dict if not name.startswith(PREDICTORS)})


__all__ = ["import_backbone", "segmentation_config"]
