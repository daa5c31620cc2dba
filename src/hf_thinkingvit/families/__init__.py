"""The families of models: one record each, in a module of its own. Imports `models/` only."""

from torch import nn
from transformers import PreTrainedConfig

from ..models.configuration_staged import configuration_of
from . import avit, early_exit_vit, elastic_vit, thinking_swin, thinkingvit
from .record import Family


# By model type. Order matters for conversion: every ThinkingViT checkpoint also matches the A-ViT test.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (thinkingvit.FAMILY, thinking_swin.FAMILY, avit.FAMILY, early_exit_vit.FAMILY, elastic_vit.FAMILY)
}

# The family that a plain model of Transformers becomes, by its `model_type`.
FAMILY_OF_PLAIN = {"vit": "thinkingvit", "deit": "thinkingvit", "swin": "thinking_swin"}


def family_of(model_or_config: nn.Module | PreTrainedConfig) -> Family:
    """
    The record of a model's family. Classes that were loaded as remote code, and subclasses, belong to the same family.

    Args:
        model_or_config (`nn.Module` or `PreTrainedConfig`): a model may be compiled or wrapped.

    Raises:
        ValueError: if it is of none of the known families.
    """
    config = configuration_of(model_or_config)
    for kind in type(config).__mro__:  # by name, because remote code has classes of its own
        family = FAMILIES.get(vars(kind).get("model_type"))
        if family is not None:
            return family
    raise ValueError(
        f"Expected a model or a configuration of one of the families {', '.join(FAMILIES)}, got "
        f"{type(model_or_config).__name__} of the model type {getattr(config, 'model_type', None)!r}."
    )


def task_of(model: nn.Module) -> str:
    """
    The task of a model with a head, under its name in `pipeline`. By the names of classes, because a model that was
    loaded as remote code has a class of its own.

    Raises:
        ValueError: if the model has no head that this package knows.
    """
    heads = {head.__name__: task for family in FAMILIES.values() for task, head in family.heads.items()}
    for kind in type(model).__mro__:
        if kind.__name__ in heads:
            return heads[kind.__name__]
    raise ValueError(f"`model` must be one of {', '.join(heads)}, unwrapped, got {type(model).__name__}.")


__all__ = ["FAMILIES", "FAMILY_OF_PLAIN", "Family", "family_of", "task_of"]
