"""ThinkingViT on Swin (arXiv 2507.10800): its record, and its official checkpoints."""

import re

import torch

from ..models import weights_from_swin
from ..models.configuration_thinking_swin import ThinkingSwinConfig
from ..models.modeling_thinking_swin import ThinkingSwinForImageClassification, ThinkingSwinModel
from ..models.modeling_thinking_swin_backbone import ThinkingSwinBackbone
from . import costs_swin
from .official import Checkpoint, OfficialFormat, UnstatedField, rename
from .official_deit import one_if_equal
from .record import (
    BACKBONE_FIELDS,
    EXIT_FIELDS,
    IMAGE_CLASSIFICATION,
    TRAINING_FIELDS,
    CardText,
    Costs,
    Family,
    PlainSource,
)
from .thinkingvit import STAGED_LIMITS, THINKINGVIT_PAPER


# Names in our state dicts, without the base model's prefix → the official ones.
RENAMES = (
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^embeddings\.position_embeddings$", "absolute_pos_embed"),
    (r"^(layers\.\d+\.blocks\.\d+)\.layernorm_before\.", r"\1.norm1."),
    (r"^(layers\.\d+\.blocks\.\d+)\.layernorm_after\.", r"\1.norm2."),
    (r"^(layers\.\d+\.blocks\.\d+)\.attention\.o_proj\.", r"\1.attn.proj."),
    (r"^(layers\.\d+\.blocks\.\d+)\.attention\.", r"\1.attn."),
    (r"^(layers\.\d+\.blocks\.\d+\.mlp\.)", r"\1"),
    (r"^(layers\.\d+\.downsample\.)", r"\1"),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head.fc."),
)

# The tensors whose shapes `build_config` reads, and how many dimensions they have.
REQUIRED = {
    "patch_embed.proj.weight": 4,
    "layers.0.blocks.0.attn.relative_position_bias_table": 2,
    "layers.0.blocks.0.mlp.fc1.weight": 2,
    "head.fc.weight": 2,
}

# Buffers that are computed from the sizes; some versions save them.
IGNORED = re.compile(r"^layers\.\d+\.blocks\.\d+\.(attn\.relative_position_index|attn_mask)$")


def prepare(checkpoint: Checkpoint, **overrides) -> dict[str, torch.Tensor]:
    """The state dict without the buffers that are computed from the configuration."""
    return {name: tensor for name, tensor in checkpoint.state_dict.items() if not IGNORED.match(name)}


def official_name(name: str) -> str:
    """The official name of the tensor that holds our parameter `name`."""
    name = name.removeprefix("thinking_swin.")
    recycler = re.match(r"^recyclers\.(\d+)\.(alpha|upsample|weight|bias)$", name)
    if recycler is not None:
        index, rest = int(recycler[1]), recycler[2]
        if rest == "alpha":
            return f"alpha.{index}"
        rest = "upsample.weight" if rest == "upsample" else f"proj.{rest}"
        return f"proj_layer{index + 1 if index else ''}.{rest}"
    return rename(name, RENAMES)


def convert_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Our parameter `name` from the official tensor that holds it."""
    if name.endswith(".upsample") and tensor.dim() == 4:  # (channels, 1, rows, columns) of a depthwise convolution
        return tensor[:, 0].permute(1, 2, 0).contiguous()
    if ".recyclers." in name and name.endswith(".weight") and tensor.dim() == 4 and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    return tensor  # a tensor of another shape fails the check of shapes, which names it


def matches(checkpoint: Checkpoint, overrides: dict) -> bool:
    """Whether this is a ThinkingViT on Swin: Swin's names, and recycling weights or stated rounds."""
    return "layers.0.blocks.0.attn.relative_position_bias_table" in checkpoint.state_dict and (
        "alpha.0" in checkpoint.state_dict or "head_rounds" in {**checkpoint.model_args, **overrides}
    )


def build_config(checkpoint: Checkpoint, **overrides) -> ThinkingSwinConfig:
    """
    The configuration of an official checkpoint. Sizes and heads come from the tensors, rounds from the files or from
    `overrides`, which win.

    Raises:
        ValueError: if neither files nor overrides state the heads of the rounds.
    """
    state_dict, stated = checkpoint.state_dict, checkpoint.model_args
    embed_dim, num_channels, *patch_size = state_dict["patch_embed.proj.weight"].shape
    head_rounds = overrides.get("head_rounds") or stated.get("head_rounds")
    if not head_rounds:
        raise UnstatedField(
            f"{checkpoint.path} does not say how many heads its rounds have. Pass `head_rounds`, for each round the "
            "heads of each layer (--head-rounds on the command line); the published model has [[3, 3, 6, 12], "
            "[3, 6, 12, 24]]."
        )
    tables = _bias_tables(checkpoint)
    sides = stated.get("img_size") or checkpoint.preprocessing.get("input_size", [])[1:] or 224
    fields = {
        "head_rounds": [list(heads) for heads in head_rounds],
        "image_size": sides if isinstance(sides, int) else one_if_equal(list(sides)),
        "patch_size": one_if_equal(patch_size),
        "num_channels": num_channels,
        "embed_dim": embed_dim,
        "depths": [_count(state_dict, rf"layers\.{layer}\.blocks\.(\d+)\.") for layer in range(len(tables))],
        "num_heads": [table.shape[1] for table in tables],
        "window_size": (round(tables[0].shape[0] ** 0.5) + 1) // 2,  # a table has (2 · window_size - 1)² rows
        "mlp_ratio": state_dict["layers.0.blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
        "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in state_dict,
        "use_absolute_embeddings": "absolute_pos_embed" in state_dict,
        "num_labels": state_dict["head.fc.weight"].shape[0],
        "qkv_slicing": "leading_rows",
    }
    return ThinkingSwinConfig(**{**fields, **overrides})


def _bias_tables(checkpoint: Checkpoint) -> list[torch.Tensor]:
    """The first table of relative position biases of each layer, `(offsets, heads)`."""
    names = [
        f"layers.{layer}.blocks.0.attn.relative_position_bias_table"
        for layer in range(_count(checkpoint.state_dict, r"layers\.(\d+)\."))
    ]
    for name in names:
        table = checkpoint.state_dict.get(name)
        if table is None or table.dim() != 2:
            got = "none" if table is None else f"the shape {tuple(table.shape)}"
            raise ValueError(f"{checkpoint.path}: expected {name} with 2 dimensions, got {got}.")
    return [checkpoint.state_dict[name] for name in names]


def _count(state_dict: dict[str, torch.Tensor], pattern: str) -> int:
    """One more than the greatest number in the group of `pattern`, over all names that match it."""
    return 1 + max((int(match[1]) for name in state_dict if (match := re.match(pattern, name))), default=-1)


FAMILY = Family(
    name="ThinkingSwin",
    config_class=ThinkingSwinConfig,
    model_class=ThinkingSwinModel,
    heads={IMAGE_CLASSIFICATION: ThinkingSwinForImageClassification},
    costs=Costs(stages=costs_swin.stage_macs, published_stages=costs_swin.published_stage_macs),
    plain=PlainSource("from_swin", frozenset({*weights_from_swin.FIXED_FIELDS, *weights_from_swin.SHARED_FIELDS})),
    free_fields=TRAINING_FIELDS | EXIT_FIELDS | BACKBONE_FIELDS,
    announced_fields=frozenset({"head_rounds", "image_size"}),  # the windows are the same size at every image size
    card=CardText(
        description="""\
A ThinkingViT ([arXiv 2507.10800](https://arxiv.org/abs/2507.10800)) on a Swin Transformer: a few leading attention
heads answer first, and images whose answer is not certain enough go on to a wider stage, a further round through the
whole hierarchy, which starts from the recycled tokens.""",
        limits=STAGED_LIMITS,
    ),
    paper=THINKINGVIT_PAPER,
    official=OfficialFormat(REQUIRED, matches, build_config, official_name, convert_tensor, prepare),
    backbone_class=ThinkingSwinBackbone,
)
