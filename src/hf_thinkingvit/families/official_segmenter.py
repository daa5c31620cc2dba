"""
Official checkpoints of ThinkingViT with Segmenter's decoders, and of Segmenter itself (one stage, no recycling).

The encoder is as wide as a 12-head container, whatever stages were trained. It is cut to the widest stage, with which
the logits stay the same. The mask transformer has a width of its own and is not cut.
"""

import logging
import math
import re
from dataclasses import replace

import torch

from ..models.configuration_thinkingvit import ThinkingViTConfig
from .official import Checkpoint, OfficialFormat, UnstatedField, rename
from .official_deit import DEIT_HEAD_DIM, convert_tensor, deit_fields, deit_name
from .official_supernet import cut_tensor
from .record import IMAGE_SEGMENTATION


logger = logging.getLogger(__name__)

REQUIRED = {"encoder.patch_embed.proj.weight": 4, "encoder.pos_embed": 3, "encoder.blocks.0.mlp.fc1.weight": 2}
# Tensors of the decoder whose first dimension is the classes, of which each decoder has one, by its `decoder_type`.
CLASS_TENSORS = {"linear": "decoder.head.weight", "mask_transformer": "decoder.mask_norm.weight"}
PROJECTION = "encoder._thinking_proj_layers."
ALPHA = "encoder._thinking_alphas."

# Names in our state dicts → official names; those of the layers are the DeiT's.
RENAMES = (
    (r"^thinkingvit\.recyclers\.(\d+)\.alpha$", ALPHA + r"\1"),
    (r"^thinkingvit\.recyclers\.(\d+)\.projection\.", PROJECTION + r"\1."),
    (r"^decoder\.head\.", "decoder.head."),
    (r"^decoder\.projection\.", "decoder.proj_dec."),
    (r"^decoder\.class_embeddings$", "decoder.cls_emb"),
    (r"^decoder\.layernorm\.", "decoder.decoder_norm."),
    (r"^decoder\.patch_projection\.weight$", "decoder.proj_patch"),
    (r"^decoder\.class_projection\.weight$", "decoder.proj_classes"),
    (r"^decoder\.mask_norm\.", "decoder.mask_norm."),
)


def official_name(name: str) -> str:
    """The official name of the tensor that holds our parameter `name`."""
    if name.startswith("decoder.layers."):
        return "decoder." + deit_name(name.removeprefix("decoder."))
    try:
        return rename(name, RENAMES)
    except KeyError:
        return "encoder." + deit_name(name.removeprefix("thinkingvit."))


def convert_segmenter_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Our parameter `name` from the official tensor, which for the two projections multiplies from the right."""
    if name in ("decoder.patch_projection.weight", "decoder.class_projection.weight") and tensor.dim() == 2:
        return tensor.T.contiguous()
    return convert_tensor(name, tensor)


def matches(checkpoint: Checkpoint, overrides: dict) -> bool:
    """Whether this is an encoder with one of Segmenter's decoders."""
    return "encoder.patch_embed.proj.weight" in checkpoint.state_dict and any(
        name in checkpoint.state_dict for name in CLASS_TENSORS.values()
    )


def count_labels(state_dict: dict[str, torch.Tensor]) -> int:
    return len(state_dict[CLASS_TENSORS[_decoder_type(state_dict)]])


def _decoder_type(state_dict: dict[str, torch.Tensor]) -> str:
    return next(decoder for decoder, name in CLASS_TENSORS.items() if name in state_dict)


def _projection_shapes(state_dict: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    """(next stage's width, stage's width) of every stage but the last."""
    shapes = []
    while (name := f"{PROJECTION}{len(shapes)}.weight") in state_dict:
        if state_dict[name].dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions, got the shape {tuple(state_dict[name].shape)}.")
        shapes.append(tuple(state_dict[name].shape))
    return shapes


def _head_dim(checkpoint: Checkpoint) -> int:
    """Channels of a head: those of the files if they state the container's width and heads, else DeiT's."""
    net = checkpoint.variant.get("net_kwargs") or {}
    width, heads = (_stated_integer(checkpoint, f"net_kwargs.{name}", net.get(name)) for name in ("d_model", "n_heads"))
    if width is None or heads is None:
        return DEIT_HEAD_DIM
    if width % heads:
        raise ValueError(
            f"`net_kwargs.d_model` ({width}) in the `variant.yml` of {checkpoint.path} must be a multiple of "
            f"`net_kwargs.n_heads` ({heads})."
        )
    return width // heads


def _stated_integer(checkpoint: Checkpoint, name: str, value) -> int | None:
    """`value` of the `variant.yml`, a positive integer or nothing, else `ValueError`."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise _not_as_expected(checkpoint, name, "a positive integer", value)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _not_as_expected(checkpoint: Checkpoint, name: str, expected: str, value) -> ValueError:
    return ValueError(
        f"`{name}` in the `variant.yml` of {checkpoint.path} must be {expected}, got {value!r}: correct the file, or "
        "remove the line for the default."
    )


def _stages(checkpoint: Checkpoint, overrides: dict) -> list[int]:
    """
    Heads of each stage: those that `overrides` or the files state, else those that the widths of the projections tell;
    without projections, one stage of full width.
    """
    state_dict, head_dim = checkpoint.state_dict, _head_dim(checkpoint)
    stated = overrides.get("thinking_stages") or (checkpoint.variant.get("thinking_kwargs") or {}).get("stages")
    shapes = _projection_shapes(state_dict)
    if stated:
        try:
            stages = [int(heads) for heads in stated]
        except (TypeError, ValueError):
            stages = []
        if not stages or min(stages) < 1:
            raise ValueError(
                f"`thinking_stages` must be the heads of each stage, such as [3, 6]; {checkpoint.path} or the caller "
                f"gave {stated!r}."
            )
        return stages
    widths = [width for _, width in shapes] + [shapes[-1][0] if shapes else len(state_dict["encoder.norm.weight"])]
    if any(width % head_dim for width in widths):
        raise UnstatedField(
            f"{checkpoint.path} has stages of {widths} channels, no multiples of {head_dim} channels a head. Pass "
            "`thinking_stages`, the heads of each stage, or add the `variant.yml` of the checkpoint."
        )
    return [width // head_dim for width in widths]


def prepare(checkpoint: Checkpoint, **overrides) -> dict[str, torch.Tensor]:
    """
    The state dict without the unused classifier, cut to the widest stage. The projections of token recycling get as
    many rows as that stage has channels; those beyond the official ones are 0 and are not read.

    Raises:
        ValueError: if a stage is wider than the container, or a dimension is not a multiple of the heads.
    """
    full_width, head_dim = checkpoint.state_dict["encoder.patch_embed.proj.weight"].shape[0], _head_dim(checkpoint)
    stages = _stages(checkpoint, overrides)
    num_heads, kept_heads = full_width // head_dim, max(stages)
    if kept_heads > num_heads or full_width % head_dim:
        raise ValueError(
            f"{checkpoint.path}: stages of {stages} heads with {head_dim} channels each do not fit an encoder of "
            f"{full_width} channels."
        )
    width = kept_heads * head_dim
    prepared = {}
    for name, tensor in checkpoint.state_dict.items():
        if re.match(r"encoder\.head(_dist)?\.", name):
            continue
        if name.startswith(PROJECTION):
            tensor = _with_rows(tensor, width)
        elif name.startswith("encoder."):
            tensor = cut_tensor(name.removeprefix("encoder."), tensor, num_heads, kept_heads)
        elif name in ("decoder.head.weight", "decoder.proj_dec.weight") and tensor.dim() == 2:
            tensor = tensor[:, :width]
        prepared[name] = tensor
    alphas = [tensor for name, tensor in prepared.items() if name.startswith(ALPHA)]
    if alphas and not any(alpha.any() for alpha in alphas):
        logger.warning(
            f"{checkpoint.path.name}: every α of token recycling is 0, as the official training script leaves them. "
            "The later stages use nothing of what the earlier ones computed, unless the model is trained further."
        )
    return prepared


def _with_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """`tensor` with zeros below, up to `rows`; as it is where it has as many or more."""
    if tensor.dim() == 0 or len(tensor) >= rows:
        return tensor
    return torch.cat([tensor, tensor.new_zeros((rows - len(tensor), *tensor.shape[1:]))])


def build_config(checkpoint: Checkpoint, **overrides) -> ThinkingViTConfig:
    """
    The configuration of a checkpoint with the state dict that `prepare` returned. Sizes come from the tensors, and what
    these do not tell from the `variant.yml`; `overrides` win.
    """
    state_dict, net = checkpoint.state_dict, checkpoint.variant.get("net_kwargs") or {}
    encoder = {name.removeprefix("encoder."): t for name, t in state_dict.items() if name.startswith("encoder.")}
    decoder_type = _decoder_type(state_dict)
    layers = {int(match[1]) for name in encoder if (match := re.match(r"blocks\.(\d+)\.", name))}
    stated = {"model_args": {"depth": max(layers) + 1, "img_size": _size(net.get("image_size"))}}
    as_classifier = replace(
        checkpoint,
        state_dict={**encoder, "head.weight": state_dict[CLASS_TENSORS[decoder_type]]},  # of as many classes
        config=stated,
        training_args={},
    )
    fields = deit_fields(as_classifier, 2 if "dist_token" in encoder else 1)
    stages = _stages(checkpoint, overrides)
    fields.update(
        thinking_stages=stages,
        num_attention_heads=max(stages),
        use_distillation_token="dist_token" in encoder,
        layer_norm_eps=1e-5,
        position_interpolation="bilinear",
        decoder_type=decoder_type,
        **_exit_fields(checkpoint, len(stages)),
    )
    if decoder_type == "mask_transformer":
        width = state_dict["decoder.cls_emb"].shape[-1]
        numbers = {int(match[1]) for name in state_dict if (match := re.match(r"decoder\.blocks\.(\d+)\.", name))}
        decoder = net.get("decoder") if isinstance(net.get("decoder"), dict) else {}
        heads = _stated_integer(checkpoint, "net_kwargs.decoder.n_heads", decoder.get("n_heads"))
        dropout = decoder.get("dropout")
        if dropout is not None and not (_is_number(dropout) and 0 <= dropout <= 1):
            raise _not_as_expected(checkpoint, "net_kwargs.decoder.dropout", "a number from 0 to 1", dropout)
        fields.update(
            decoder_num_hidden_layers=len(numbers),
            decoder_hidden_size=width,
            decoder_num_attention_heads=heads or max(width // DEIT_HEAD_DIM, 1),
            decoder_intermediate_size=len(state_dict["decoder.blocks.0.mlp.fc1.weight"]),
            decoder_dropout_prob=dropout or 0.0,
        )
    return ThinkingViTConfig(**{**fields, **overrides, "thinking_stages": stages})


def _size(size: int | list[int] | None) -> int | list[int] | None:
    return list(size) if isinstance(size, (list, tuple)) else size


def _exit_fields(checkpoint: Checkpoint, num_stages: int) -> dict:
    """τ and the weights of the losses, where the files state them."""
    thinking, fields = checkpoint.variant.get("thinking_kwargs") or {}, {}
    threshold, weights = thinking.get("threshold"), thinking.get("loss_weights")
    if threshold is not None:
        each = threshold if isinstance(threshold, list) else [threshold]
        if not each or not all(_is_number(value) for value in each):
            expected = "a number, or a list of one for each stage but the last"
            raise _not_as_expected(checkpoint, "thinking_kwargs.threshold", expected, threshold)
        fields["threshold"] = threshold
    if weights is not None:
        numbers = isinstance(weights, list) and all(_is_number(weight) and weight >= 0 for weight in weights)
        if not numbers or len(weights) != num_stages or sum(weights) == 0:
            expected = f"{num_stages} numbers, one for each stage, none below 0 and not all 0"
            raise _not_as_expected(checkpoint, "thinking_kwargs.loss_weights", expected, weights)
        fields["stage_loss_weights"] = [weight / sum(weights) for weight in weights]  # as the script normalises them
    return fields


SEGMENTER = OfficialFormat(
    REQUIRED,
    matches,
    build_config,
    official_name,
    convert_segmenter_tensor,
    prepare,
    task=IMAGE_SEGMENTATION,
    count_labels=count_labels,
)
