"""Official checkpoints as `from_pretrained` of a model class loads them: converted in memory, nothing is written."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..families import FAMILIES
from ..models.configuration_labels import complete_labels
from ..models.weights_from_official import config_fields, hub_arguments
from .checkpoint import read_checkpoint
from .convert import Converted, build_image_processor, convert


# Arguments of `from_pretrained` that choose or rename files in Transformers' layout.
TRANSFORMERS_FILES = ("variant", "use_safetensors", "key_mapping")
LABELS = ("num_labels", "id2label", "label2id")


def load_arguments(
    model_class: type[PreTrainedModel], source: str | os.PathLike, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], Callable[[PreTrainedModel], BaseImageProcessor]]:
    """
    What `model_class.from_pretrained(source, **kwargs)` passes on for an official checkpoint.

    Args:
        model_class: any class of a family: bare model, head or backbone.
        source (`str` or `os.PathLike`): file, folder or Hub id.
        kwargs: arguments of `from_pretrained` and fields of the configuration.

    Returns:
        Keyword arguments for Transformers' `from_pretrained(None, ...)`, with a `config` and a `state_dict`; and a
        function from the loaded model to its image processor.

    Raises:
        FileNotFoundError: if there is no such source.
        ValueError: if it is damaged, of another family or task than the class, or an argument cannot apply to it.
    """
    if chosen := [name for name in TRANSFORMERS_FILES if kwargs.get(name) is not None]:
        raise ValueError(f"`{chosen[0]}` is about files in Transformers' layout, and {source} is in its authors'.")
    if kwargs.get("config") is not None:
        raise ValueError(
            f"`config` follows from the files of {source}, an official checkpoint: give fields of it instead, such as "
            "`threshold=0.9`."
        )
    checkpoint = read_checkpoint(source, **hub_arguments(kwargs))
    fields = config_fields(model_class.config_class)
    overrides = {name: value for name, value in kwargs.items() if name in fields and value is not None}
    labels = {name: overrides.pop(name) for name in LABELS if name in overrides}
    converted = convert(checkpoint, **overrides)
    _check_class(model_class, converted, source)
    config = _with_labels(converted.config, labels)
    config.architectures, config.dtype = [converted.model_class.__name__], converted.dtype
    rest = {name: value for name, value in kwargs.items() if name not in fields and name not in hub_arguments(kwargs)}
    arguments = {**rest, "config": config, "state_dict": converted.state_dict}
    return arguments, lambda model: build_image_processor(checkpoint, model)


def _with_labels(config: PreTrainedConfig, labels: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration with other labels, if `labels` are another number or have names."""
    if not labels or (labels.keys() == {"num_labels"} and labels["num_labels"] == config.num_labels):
        return config
    return type(config)(**{**config.to_dict(), **complete_labels(labels)})


def _check_class(model_class: type[PreTrainedModel], converted: Converted, source: str | os.PathLike) -> None:
    """`ValueError` for a checkpoint of another family, or one with another head than that of the class."""
    family, right = converted.family, converted.model_class
    heads = [head for other in FAMILIES.values() for head in other.heads.values()]
    has_other_head = issubclass(model_class, tuple(heads)) and not issubclass(model_class, right)
    if model_class.config_class is not family.config_class or has_other_head:
        raise ValueError(
            f"{source} is a checkpoint for {right.__name__}, and not for {model_class.__name__}: load it with "
            f"`{right.__name__}.from_pretrained`."
        )
