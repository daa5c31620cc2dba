"""
Checks that configurations share. Each error names the field, the value and what was expected. Imports no torch, since
exported models run without it.
"""

import math
from collections.abc import Sequence
from typing import Any


class OwnLayoutMixin:
    """Configurations that are read from files of Transformers' layout alone. Before `PreTrainedConfig` in the bases."""

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        As in `PreTrainedConfig`; `ValueError` for a `config.json` of timm or of the papers' authors, in which every
        field would be missing, and so have its default.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict and config_dict.get("model_type", "timm_wrapper") == "timm_wrapper":  # as Transformers fills in
            raise ValueError(
                f"The config.json of {pretrained_model_name_or_path} has no `model_type`, so it is none of "
                f"{cls.__name__}. If it is of an official checkpoint, load the model by its class (`from_pretrained`), "
                "which converts it, and take `model.config`."
            )
        return config_dict, kwargs


def check_integer(name: str, value, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {value!r}.")


def check_boolean(name: str, value) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be true or false, got {value!r}.")


def check_number(name: str, value, minimum: float = 0.0, maximum: float = math.inf) -> None:
    """Refuse a value that is not a number in [`minimum`, `maximum`], such as NaN. `maximum` may be infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not minimum <= value <= maximum:
        limits = f"of at least {minimum:g}" if maximum == math.inf else f"between {minimum:g} and {maximum:g}"
        raise ValueError(f"`{name}` must be a number {limits}, got {value!r}.")


def check_choice(name: str, value, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}.")


def as_plain_numbers(value: Any) -> Any:
    """Convert tensors, NumPy arrays and NumPy scalars, also within a list, to Python numbers; else `value` itself."""
    if type(value) in (int, float):  # what `torch.compile` traces must not be asked for attributes
        return value
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        plain = [as_plain_numbers(entry) for entry in value]
        return tuple(plain) if isinstance(value, tuple) else plain
    return value


def configured_problem_type(config) -> str | None:
    """The problem type that the configuration determines; `None` if it depends on the labels."""
    if config.problem_type is None and config.num_labels == 1:
        return "regression"
    return config.problem_type


def check_label_smoothing(config) -> None:
    """Refuse a `label_smoothing` outside [0, 1), or above 0 for other problems than single-label classification."""
    check_number("label_smoothing", config.label_smoothing, maximum=1.0)
    if config.label_smoothing == 1:
        raise ValueError("`label_smoothing` must be below 1, got 1: the labels would have no effect.")
    if config.label_smoothing and configured_problem_type(config) not in (None, "single_label_classification"):
        raise ValueError(
            f"`label_smoothing` is of single-label classification: it must be 0 for "
            f"{configured_problem_type(config)!r}, got {config.label_smoothing!r}."
        )


def check_loss_weights(name: str, weights, count: int, each: str = "one for each") -> None:
    """Refuse weights that are not `None` or `count` finite numbers of at least 0 with a sum above 0."""
    if weights is None:
        return
    if not isinstance(weights, Sequence) or isinstance(weights, str) or len(weights) != count:
        raise ValueError(f"`{name}` must be a list of {count} numbers, {each}, got {weights!r}.")
    for weight in weights:
        check_number(name, weight)
    if not 0 < sum(weights) < math.inf:
        raise ValueError(f"`{name}` must be finite with a sum above 0, got {weights!r}.")


def check_size(name: str, value) -> None:
    """An image or patch size: one positive integer, or (height, width)."""
    sides = value if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(sides) != 2:
        raise ValueError(f"`{name}` must be an integer or a pair (height, width), got {value!r}.")
    for side in sides:
        check_integer(name, side, minimum=1)


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size given as one integer or as a pair."""
    return (size, size) if isinstance(size, int) else tuple(size)


def check_backbone_fields(config) -> None:
    """Check the fields of every backbone: image and patch size, channels, dropout rates, norms, activation, biases."""
    from transformers.activations import ACT2FN  # which imports torch

    check_integer("num_channels", config.num_channels, minimum=1)
    for name in ("image_size", "patch_size"):
        check_size(name, getattr(config, name))
    if any(side < patch for side, patch in zip(as_pair(config.image_size), as_pair(config.patch_size))):
        raise ValueError(f"`image_size` ({config.image_size}) is smaller than `patch_size` ({config.patch_size}).")
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
        check_number(name, getattr(config, name), maximum=1.0)
    check_number("layer_norm_eps", config.layer_norm_eps)
    check_number("initializer_range", config.initializer_range)
    check_boolean("qkv_bias", config.qkv_bias)
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"`hidden_act` must be one of {sorted(ACT2FN)}, got {config.hidden_act!r}.")
