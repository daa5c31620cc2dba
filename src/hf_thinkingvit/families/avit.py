"""A-ViT (arXiv 2112.07658): its record, and its official checkpoints, which are DeiT's without the gate's values."""

from ..models import weights_from_vit
from ..models.configuration_avit import AViTConfig
from ..models.modeling_avit import AViTForImageClassification, AViTModel
from . import costs_vit
from .official import Checkpoint, OfficialFormat, UnstatedField
from .official_deit import DEIT_HEAD_DIM, REQUIRED, convert_tensor, deit_fields, deit_name
from .record import IMAGE_CLASSIFICATION, TRAINING_FIELDS, CardText, Costs, Family, Paper, PlainSource


def official_name(name: str) -> str:
    """The official name of the tensor that holds our parameter `name`."""
    return deit_name(name.removeprefix("avit."))


def matches(checkpoint: Checkpoint, overrides: dict) -> bool:
    """Whether this is an A-ViT: any DeiT that is of no other family."""
    return "cls_token" in checkpoint.state_dict and "blocks.0.attn.qkv.weight" in checkpoint.state_dict


def build_config(checkpoint: Checkpoint, **overrides) -> AViTConfig:
    """
    The configuration of an official checkpoint. Sizes come from the tensors, the gate from the `config.json` beside
    them or from `overrides`, which win.

    Raises:
        ValueError: if neither files nor overrides state the gate, or the heads of a width that is not a multiple of 64.
    """
    distilled = "dist_token" in checkpoint.state_dict
    stated = {**checkpoint.model_args, **checkpoint.config}
    fields = deit_fields(checkpoint, num_prefix_tokens=1 + distilled)
    if "distilled" not in overrides:  # the field's former name, which may be given instead
        fields["use_distillation_token"] = distilled
    if stated.get("depth"):
        fields["num_hidden_layers"] = stated["depth"]
    fields["num_attention_heads"] = stated.get("num_heads") or fields["hidden_size"] // DEIT_HEAD_DIM
    if "layer_norm_eps" in stated:
        fields["layer_norm_eps"] = stated["layer_norm_eps"]
    if "eps" in stated:
        fields["halting_epsilon"] = stated["eps"]
    for name in ("gate_scale", "gate_center"):
        if name in stated:
            fields[name] = stated[name]
        elif name not in overrides:
            raise UnstatedField(
                f"{checkpoint.path} is a DeiT and does not state the gate of an A-ViT. Pass `{name}`: the official "
                "weights have `gate_scale=10` and `gate_center=30` (Tiny) or `gate_center=75` (Small). If it is a "
                "plain timm ViT or DeiT, which is not adaptive: training starts from the same model in Transformers' "
                'format, `ThinkingViTForImageClassification.from_vit("facebook/deit-small-patch16-224")`.'
            )
    if "num_attention_heads" not in overrides and fields["hidden_size"] % max(fields["num_attention_heads"], 1):
        raise UnstatedField(f"{checkpoint.path} does not say how many heads it has. Pass `num_attention_heads`.")
    return AViTConfig(**{**fields, **overrides})


FAMILY = Family(
    name="A-ViT",
    config_class=AViTConfig,
    model_class=AViTModel,
    heads={IMAGE_CLASSIFICATION: AViTForImageClassification},
    costs=Costs(halting=costs_vit.halting_macs),
    plain=PlainSource("from_vit", frozenset({*weights_from_vit.FIXED_FIELDS, *weights_from_vit.SHARED_FIELDS})),
    free_fields=TRAINING_FIELDS
    | {"halting_epsilon", "ponder_loss_weight", "prior_loss_weight", "target_depth", "prior_std"},
    announced_fields=frozenset({"gate_scale", "gate_center"}),
    card=CardText(
        description="""\
An A-ViT ([arXiv 2112.07658](https://arxiv.org/abs/2112.07658)), a Vision Transformer in which every token halts at its
own depth: halted tokens leave the computation, and an image is finished when its class token halts.""",
        limits=(
            "How deep tokens go was learned on the training images: on other images the mean depth, and with it "
            "accuracy and cost, may differ."
        ),
        rule=(
            "A token halts once its halting scores sum to 1 − ε. The configuration has ε = {halting_epsilon}; a "
            "greater one halts tokens earlier."
        ),
        override="halting_epsilon",
    ),
    paper=Paper(
        title="A-ViT",
        bibtex="""\
@inproceedings{yin2022avit,
  title     = {A-ViT: Adaptive Tokens for Efficient Vision Transformer},
  author    = {Yin, Hongxu and Vahdat, Arash and Alvarez, Jose M. and Mallya, Arun and Kautz, Jan and Molchanov, Pavlo},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2022}
}""",
    ),
    official=OfficialFormat(REQUIRED, matches, build_config, official_name, convert_tensor),
    without_mixup="A-ViT is trained without mixup and cutmix (arXiv 2112.07658, section 4)",
)
