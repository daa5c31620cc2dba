"""The official A-ViT state dict, which is a DeiT's, and the gate values that it does not hold."""

from ..models.configuration_avit import AViTConfig
from ..models.modeling_avit import AViTForImageClassification
from .checkpoint import Checkpoint
from .deit import DEIT_HEAD_DIM, REQUIRED, convert_tensor, deit_fields, deit_name


__all__ = ["MODEL_CLASS", "REQUIRED", "build_config", "convert_tensor", "matches", "official_name"]

MODEL_CLASS = AViTForImageClassification


def official_name(name: str) -> str:
    """The official name of the tensor that holds our parameter `name`."""
    return deit_name(name.removeprefix("avit."))


def matches(checkpoint: Checkpoint, overrides: dict) -> bool:
    """Whether this is an A-ViT: a DeiT, for which a gate is stated or nothing else is known."""
    return "cls_token" in checkpoint.state_dict and "blocks.0.attn.qkv.weight" in checkpoint.state_dict


def build_config(checkpoint: Checkpoint, **overrides) -> AViTConfig:
    """
    The configuration that belongs to an official checkpoint. Sizes come from the tensors, the gate from the
    `config.json` beside them or from `overrides`, which win.

    Raises:
        ValueError: if nothing states the gate, or how many heads a width that is no DeiT's has.
    """
    distilled = "dist_token" in checkpoint.state_dict
    stated = {**checkpoint.model_args, **checkpoint.config}
    fields = {**deit_fields(checkpoint, overrides, num_prefix_tokens=1 + distilled), "distilled": distilled}
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
            raise ValueError(
                f"{checkpoint.path} is a DeiT and does not state the gate of an A-ViT. Pass `{name}`: the official "
                "weights have `gate_scale=10` and `gate_center=30` (Tiny) or `gate_center=75` (Small)."
            )
    if "num_attention_heads" not in overrides and fields["hidden_size"] % max(fields["num_attention_heads"], 1):
        raise ValueError(f"{checkpoint.path} does not say how many heads it has. Pass `num_attention_heads`.")
    return AViTConfig(**{**fields, **overrides})
