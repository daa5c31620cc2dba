"""ThinkingViT on ViT (arXiv 2507.10800): its record, and its official checkpoints."""

import operator
import re

import torch

from ..models import weights_from_vit
from ..models.configuration_pruning import resolve_keep_rates
from ..models.configuration_thinkingvit import ThinkingViTConfig
from ..models.modeling_thinkingvit import ThinkingViTForImageClassification, ThinkingViTModel
from ..models.modeling_thinkingvit_backbone import ThinkingViTBackbone
from ..models.modeling_thinkingvit_segmentation import ThinkingViTForSemanticSegmentation
from . import costs_vit
from .official import Checkpoint, OfficialFormat, UnstatedField
from .official_deit import DEIT_HEAD_DIM, REQUIRED, convert_tensor, deit_fields, deit_name
from .official_pruning import CROP_PCT, cut_to_stages, predictor_name, predictor_width, pruning_fields
from .official_segmenter import SEGMENTER
from .official_supernet import cut_supernet, is_supernet
from .record import (
    BACKBONE_FIELDS,
    EXIT_FIELDS,
    IMAGE_CLASSIFICATION,
    IMAGE_SEGMENTATION,
    TRAINING_FIELDS,
    CardText,
    Costs,
    Family,
    Paper,
    PlainSource,
)


def official_name(name: str) -> str:
    """The official name of the tensor that holds our parameter `name`."""
    name = name.removeprefix("thinkingvit.")
    recycler = re.match(r"^recyclers\.(\d+)\.(?:projection\.)?(.*)$", name)
    if recycler is None:
        return predictor_name(name) or deit_name(name)
    index, rest = int(recycler[1]), recycler[2]
    return f"alpha.{index}" if rest == "alpha" else f"proj_layer{index + 1 if index else ''}.{rest}"


def matches(checkpoint: Checkpoint, overrides: dict) -> bool:
    """
    Whether this is a ThinkingViT on DeiT: there are recycling weights or predictors of token pruning, or the files or
    overrides state stages.
    """
    return (
        "alpha.0" in checkpoint.state_dict
        or "proj_layer.weight" in checkpoint.state_dict
        or predictor_width(checkpoint.state_dict) is not None
        or "thinking_stages" in {**checkpoint.model_args, **overrides}
    ) and not any(name.startswith("layers.") for name in checkpoint.state_dict)


def prepare(checkpoint: Checkpoint, **overrides) -> dict[str, torch.Tensor]:
    """
    The state dict, which for checkpoints of the first release, and for those with token pruning, is cut to the widest
    stage.

    Raises:
        ValueError: if it is of the first release, and neither files nor overrides state the heads of the stages.
    """
    hidden_size = checkpoint.state_dict["patch_embed.proj.weight"].shape[0]
    if predictor_width(checkpoint.state_dict) is not None:
        stages = _stated_stages(checkpoint, overrides) or _stages_from_widths(checkpoint, hidden_size)
        return cut_to_stages(checkpoint, _head_dim(checkpoint, hidden_size), stages)
    num_heads = checkpoint.model_args.get("num_heads") or hidden_size // DEIT_HEAD_DIM
    thinking_stages = _stated_stages(checkpoint, overrides)
    num_stages = len(thinking_stages or _projection_widths(checkpoint)) + (thinking_stages is None)
    if not is_supernet(checkpoint.state_dict, num_heads, num_stages):
        _refuse_supernet_without_alphas(checkpoint, num_heads, num_stages, thinking_stages)
        return checkpoint.state_dict
    if thinking_stages is None:
        raise UnstatedField(
            f"{checkpoint.path} is a supernet of {num_heads} heads, whose tensors do not tell the widest stage. "
            "Pass `thinking_stages`, the heads of each stage (--thinking-stages on the command line)."
        )
    return cut_supernet(checkpoint.state_dict, num_heads, thinking_stages)


def _refuse_supernet_without_alphas(
    checkpoint: Checkpoint, num_heads: int, num_stages: int, thinking_stages: list[int] | None
) -> None:
    """Refuse a supernet without its last α, which would pass for a later release with too many of them."""
    alphas = [f"alpha.{index}" for index in range(num_heads)]
    further = [name for name in alphas[num_stages - 1 :] if name in checkpoint.state_dict]
    is_wider = thinking_stages is not None and max(thinking_stages) < num_heads
    if len(further) > 1 or (further and is_wider):
        missing = [name for name in alphas if name not in checkpoint.state_dict]
        raise ValueError(
            f"{checkpoint.path} is a supernet of {num_heads} heads, which has an α for each head, but it lacks "
            f"{', '.join(missing)}. Is the file complete?"
        )


def build_config(checkpoint: Checkpoint, **overrides) -> ThinkingViTConfig:
    """
    The configuration of a checkpoint with the state dict that `prepare` returned. Sizes come from the tensors, stages
    from the files or from `overrides`, which win.

    Raises:
        ValueError: if neither tensors, files nor overrides state the heads of the stages.
    """
    fields = deit_fields(checkpoint)
    thinking_stages = _stated_stages(checkpoint, overrides) or _stages_from_widths(checkpoint, fields["hidden_size"])
    fields["num_attention_heads"] = max(thinking_stages)
    if predictor_width(checkpoint.state_dict) is not None:
        fields |= pruning_fields(checkpoint, fields["num_hidden_layers"], len(thinking_stages), overrides)
    return ThinkingViTConfig(**{**fields, **overrides, "thinking_stages": thinking_stages})


def _stated_stages(checkpoint: Checkpoint, overrides: dict) -> list[int] | None:
    """Heads of each stage, from `overrides` or the files. Training scripts also pickle them as strings."""
    stated = overrides.get("thinking_stages") or checkpoint.model_args.get("thinking_stages")
    if not stated:
        return None
    words = re.split(r"[\s,]+", re.sub(r"[\[\]()'\"]", " ", stated).strip()) if isinstance(stated, str) else stated
    try:
        stages = [_heads(word) for word in words]
    except (TypeError, ValueError):
        stages = []
    if not stages or any(heads < 1 for heads in stages):
        raise ValueError(
            f"`thinking_stages` must be the heads of each stage, such as [3, 6]; {checkpoint.path} or the caller gave "
            f"{stated!r}."
        )
    return stages


def _heads(word: str | float) -> int:
    if isinstance(word, float):
        if not word.is_integer():
            raise ValueError(f"{word} is not a number of heads")
        return int(word)
    return int(word) if isinstance(word, str) else operator.index(word)


def _projection_widths(checkpoint: Checkpoint) -> list[int]:
    """Channels of each stage but the last: the input widths of the recycling projections."""
    widths = []
    while (name := f"proj_layer{len(widths) + 1 if widths else ''}.weight") in checkpoint.state_dict:
        widths.append(checkpoint.state_dict[name].shape[-1])
    return widths


def _stages_from_widths(checkpoint: Checkpoint, hidden_size: int) -> list[int]:
    widths = [*_projection_widths(checkpoint), predictor_width(checkpoint.state_dict) or hidden_size]
    head_dim = _head_dim(checkpoint, hidden_size)
    if any(width % head_dim for width in widths):
        raise UnstatedField(
            f"{checkpoint.path} has stages of {widths} channels and does not say how many heads they have. "
            "Pass `thinking_stages`, the heads of each stage (--thinking-stages on the command line)."
        )
    return [width // head_dim for width in widths]


def _head_dim(checkpoint: Checkpoint, hidden_size: int) -> int:
    """Channels of a head, of tensors that may have been cut since the files stated their sizes."""
    stated = checkpoint.model_args
    return (stated.get("embed_dim") or hidden_size) // stated["num_heads"] if stated.get("num_heads") else DEIT_HEAD_DIM


def crop_pct(checkpoint: Checkpoint) -> float | None:
    return CROP_PCT if predictor_width(checkpoint.state_dict) is not None else None


def unread(config: ThinkingViTConfig) -> str | None:
    """The predictors of token pruning, where the caller has turned it off (`pruning_layers=None`)."""
    return None if config.pruning_layers else r"score_predictor\."


def describe_pruning(config: ThinkingViTConfig) -> str | None:
    """For model cards: where patches are removed and how many remain; `None` if none are."""
    if not config.pruning_layers:
        return None
    rates = resolve_keep_rates(config.pruning_keep_rate, len(config.pruning_layers))
    layers, shares = (
        ", ".join(texts) for texts in (map(str, config.pruning_layers), (f"{100 * r:.3g}" for r in rates))
    )
    return (
        "The last stage removes the patches that small predictors score lowest (DynamicViT, "
        f"[arXiv 2106.02034](https://arxiv.org/abs/2106.02034)) before layers {layers} (counted from 0): {shares} % of "
        "the image's patches remain from there on. Costs and measurements are for this `pruning_keep_rate`, "
        f"{config.pruning_keep_rate}; a call takes another as `keep_rate`."
    )


STAGED_LIMITS = (
    "The exit rule measures the model's own certainty, not its being right: a confident wrong answer leaves early. A τ "
    "chosen on one distribution of images may give another accuracy and cost on another."
)
THINKINGVIT_PAPER = Paper(
    title="ThinkingViT (on ViT and on Swin)",
    bibtex="""\
@inproceedings{hojjat2026thinkingvit,
  title     = {ThinkingViT: Matryoshka Thinking Vision Transformer for Elastic Inference},
  author    = {Hojjat, Ali and Haberer, Janek and Pirk, Soren and Landsiedel, Olaf},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2026}
}""",
)

FAMILY = Family(
    name="ThinkingViT",
    config_class=ThinkingViTConfig,
    model_class=ThinkingViTModel,
    heads={
        IMAGE_CLASSIFICATION: ThinkingViTForImageClassification,
        IMAGE_SEGMENTATION: ThinkingViTForSemanticSegmentation,
    },
    costs=Costs(stages=costs_vit.stage_macs, published_stages=costs_vit.published_stage_macs),
    plain=PlainSource("from_vit", frozenset({*weights_from_vit.FIXED_FIELDS, *weights_from_vit.SHARED_FIELDS})),
    free_fields=TRAINING_FIELDS | EXIT_FIELDS | BACKBONE_FIELDS | {"pruning_ratio_loss_weight"},
    announced_fields=frozenset({"thinking_stages", "pruning_keep_rate"}),
    added_parameters={"pruning_layers": "thinkingvit.score_predictors.*"},
    card=CardText(
        description="""\
A ThinkingViT ([arXiv 2507.10800](https://arxiv.org/abs/2507.10800)), a nested Vision Transformer: a few leading
attention heads answer first, and images whose answer is not certain enough go on to a wider stage, which starts from
the recycled tokens.""",
        limits=STAGED_LIMITS,
        tokens=describe_pruning,
    ),
    paper=THINKINGVIT_PAPER,
    official=OfficialFormat(
        REQUIRED, matches, build_config, official_name, convert_tensor, prepare, crop_pct=crop_pct, unread=unread
    ),
    other_official=(SEGMENTER,),
    backbone_class=ThinkingViTBackbone,
)
