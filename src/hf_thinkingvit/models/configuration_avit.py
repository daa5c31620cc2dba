"""A-ViT configuration."""

import math
from typing import Any, ClassVar

from .configuration_checks import check_boolean, check_integer, check_label_smoothing, check_number
from .configuration_nested_vit import NestedViTConfig
from .sub_networks import SubNetwork


class AViTConfig(NestedViTConfig):
    r"""
    Configuration of an A-ViT (arXiv 2112.07658): a DeiT in which every token halts at its own depth, and halted tokens
    leave the computation. The defaults are those of the official A-ViT-Tiny.

    After layer l each token k gets the halting score `sigmoid(gate_scale * t_k[gate_channel] - gate_center)` from one
    channel of the layer's output; it halts once its scores sum to `1 - halting_epsilon`, at the latest in the last
    layer.

    Args:
        gate_scale (`float`, *optional*, defaults to 10.0):
            γ of the halting score.
        gate_center (`float`, *optional*, defaults to 30.0):
            β of the halting score: 30 in the official Tiny, 75 in the official Small (the paper's text says γ = 5,
            β = 10).
        gate_channel (`int`, *optional*, defaults to 0):
            The channel that the score is read from.
        halting_epsilon (`float`, *optional*, defaults to 0.01):
            ε, at least 0 and below 1. A greater value halts tokens earlier.
        ponder_loss_weight (`float`, *optional*, defaults to 5e-4):
            Weight of the ponder loss, the mean computation of a token (layers, and the remainder of its scores).
        prior_loss_weight (`float`, *optional*, defaults to 1e-3):
            Weight of the distributional prior, which favours halting around `target_depth`.
        target_depth (`float`, *optional*, defaults to 8):
            Centre of the prior, counted in layers.
        prior_std (`float`, *optional*, defaults to 1.0):
            Standard deviation of the prior, in layers.
        use_distillation_token (`bool`, *optional*, defaults to `False`):
            Whether there are a DeiT distillation token and head; the prediction is then the mean of both heads. Earlier
            versions called it `distilled`, which is still accepted everywhere.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Share of each target that the training loss spreads evenly over all classes, at least 0 and below 1. For
            single-label classification only. Use it instead of `TrainingArguments.label_smoothing_factor`, with which
            `Trainer` computes the loss itself, without the ponder and prior losses.
        kwargs:
            The ViT fields of [`NestedViTConfig`]: `hidden_size` (by default 64 channels a head), `num_hidden_layers`
            (12), `num_attention_heads` (3), `intermediate_size`, `image_size`, `patch_size` and so on.

    Raises:
        ValueError: if a value is invalid; the message names the field.
    """

    model_type = "avit"
    keys_to_ignore_at_inference = [
        "cls_logits",
        "distillation_logits",
        "task_loss",
        "ponder_loss",
        "prior_loss",
        "mean_depth",
        "macs",
        "token_depth",
        "hidden_states",
        "attentions",
    ]
    attribute_map: ClassVar[dict[str, str]] = {"distilled": "use_distillation_token"}
    remote_code: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_avit.AViTConfig",
        "AutoModel": "modeling_avit.AViTModel",
        "AutoModelForImageClassification": "modeling_avit.AViTForImageClassification",
    }

    num_attention_heads: int = 3
    gate_scale: float | int = 10.0
    gate_center: float | int = 30.0
    gate_channel: int = 0
    halting_epsilon: float | int = 0.01
    ponder_loss_weight: float | int = 5e-4
    prior_loss_weight: float | int = 1e-3
    target_depth: float | int = 8
    prior_std: float | int = 1.0
    use_distillation_token: bool | None = None
    label_smoothing: float | int = 0.0

    def __post_init__(self, distilled: bool | None = None, **kwargs):
        # `None` by default, so that a value that contradicts `distilled` can be told from no value.
        value = _one_value(self.use_distillation_token, distilled)
        self.use_distillation_token = False if value is None else value
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "AViTConfig":
        """
        As in Transformers, but with both names of one field compared: there, the last override would win.

        Raises:
            ValueError: if `distilled` and `use_distillation_token` contradict each other.
        """
        if "distilled" in kwargs:
            value = _one_value(kwargs.get("use_distillation_token"), kwargs.pop("distilled"))
            if value is not None:
                kwargs["use_distillation_token"] = value
        return super().from_dict(config_dict, **kwargs)

    @property
    def num_prefix_tokens(self) -> int:
        return 2 if self.use_distillation_token else 1

    @property
    def sub_network(self) -> SubNetwork:
        """The sizes of the layers: those of the whole model."""
        return SubNetwork(self.num_attention_heads, self.hidden_size, self.intermediate_size)

    def validate(self) -> None:
        super().validate()
        check_boolean("use_distillation_token", self.use_distillation_token)
        for name in ("gate_scale", "gate_center"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"`{name}` must be a finite number, got {value!r}.")
        check_integer("gate_channel", self.gate_channel, minimum=0)
        if self.gate_channel >= self.hidden_size:
            raise ValueError(f"`gate_channel` ({self.gate_channel}) must be below `hidden_size` ({self.hidden_size}).")
        check_halting_epsilon(self.halting_epsilon)
        check_label_smoothing(self)
        for name in ("ponder_loss_weight", "prior_loss_weight", "target_depth", "prior_std"):
            check_number(name, getattr(self, name))
        if not self.prior_std > 0:
            raise ValueError(f"`prior_std` must be above 0, got {self.prior_std!r}.")


def _one_value(use_distillation_token: bool | None, distilled: bool | None) -> bool | None:
    """The value of a field that may be given under its present or its former name; `None` if under neither."""
    if use_distillation_token is None or distilled is None:
        return distilled if use_distillation_token is None else use_distillation_token
    if use_distillation_token != distilled:
        raise ValueError(
            f"`distilled` ({distilled}) is the former name of `use_distillation_token` ({use_distillation_token}), and "
            "the two contradict each other: give `use_distillation_token` alone."
        )
    return use_distillation_token


def check_halting_epsilon(value: float) -> None:
    """Refuse an ε outside [0, 1): at 1 no token would compute anything."""
    check_number("halting_epsilon", value, maximum=1.0)
    if value == 1:
        raise ValueError("`halting_epsilon` must be below 1, got 1.")


__all__ = ["AViTConfig"]
