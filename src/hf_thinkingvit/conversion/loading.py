"""Official checkpoints as `from_pretrained` of a model class loads them: converted in memory, nothing is written."""

import os
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..families import FAMILIES
from ..models.configuration_labels import complete_labels
from ..models.weights_from_official import ConvertedArguments, config_fields, hub_arguments
from .checkpoint import read_checkpoint
from .convert import build_image_processor, convert, detect


# Arguments of `from_pretrained` that choose or rename files in Transformers' layout.
TRANSFORMERS_FILES = ("variant", "use_safetensors", "key_mapping")
LABELS = ("num_labels", "id2label", "label2id")


def load_official_source(source: str | os.PathLike, **kwargs: Any) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """
    The model of an official checkpoint of any family and task, with its head, and its image processor.

    Args:
        source (`str` or `os.PathLike`): file, folder or Hub id.
        kwargs: arguments of `from_pretrained` and fields of the configuration.

    Raises:
        FileNotFoundError: if there is no such source.
        ValueError: if it is damaged or of no known family, or an argument cannot apply to it.
    """
    converted = load_arguments(None, source, kwargs)
    return converted.model_class._load_converted(source, converted)


def load_arguments(
    model_class: type[PreTrainedModel] | None, source: str | os.PathLike, kwargs: Mapping[str, Any]
) -> ConvertedArguments:
    """
    What `model_class.from_pretrained(source, **kwargs)` passes on for an official checkpoint.

    Args:
        model_class (`type`, *optional*): any class of a family: bare model, head or backbone; by default that of the
            checkpoint with its head.
        source (`str` or `os.PathLike`): file, folder or Hub id.
        kwargs: arguments of `from_pretrained` and fields of the configuration.

    Raises:
        FileNotFoundError: if there is no such source.
        ValueError: if it is damaged, of another family or task than the class, or an argument cannot apply to it.
    """
    if chosen := [name for name in TRANSFORMERS_FILES if kwargs.get(name) is not None]:
        raise ValueError(f"`{chosen[0]}` is about files in Transformers' layout, and {source} is in its authors'.")
    checkpoint = read_checkpoint(source, **hub_arguments(kwargs))
    family, official = detect(checkpoint, kwargs)
    right = family.heads[official.task]
    model_class = right if model_class is None else model_class
    fields = config_fields(family.config_class)
    overrides = {name: value for name, value in kwargs.items() if name in fields}
    labels = {name: overrides.pop(name) for name in LABELS if name in overrides}
    if not _suits(model_class, right):
        convert(checkpoint, **overrides)  # says more of what no class takes, such as a plain DeiT of timm
        raise ValueError(
            f"{source} is a checkpoint for {right.__name__}, and not for {model_class.__name__}: load it with "
            f"`{right.__name__}.from_pretrained`."
        )
    if kwargs.get("config") is not None:
        place = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path", source)
        raise ValueError(
            f"`config` follows from the files of {source}, an official checkpoint: leave it out and give fields of it "
            f'instead, as in `{model_class.__name__}.from_pretrained("{place}", threshold=0.9)`.'
        )
    converted = convert(checkpoint, **overrides)
    config = _with_labels(converted.config, {name: value for name, value in labels.items() if value is not None})
    config.architectures, config.dtype = [right.__name__], converted.dtype
    rest = {name: value for name, value in kwargs.items() if name not in fields and name not in hub_arguments(kwargs)}
    arguments = {**rest, "config": config, "state_dict": converted.state_dict}
    return ConvertedArguments(arguments, lambda model: build_image_processor(checkpoint, model), model_class)


def _with_labels(config: PreTrainedConfig, labels: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration with other labels, if `labels` are another number or have names."""
    if not labels or (labels.keys() == {"num_labels"} and labels["num_labels"] == config.num_labels):
        return config
    return type(config)(**{**config.to_dict(), **complete_labels(labels)})


def _suits(model_class: type[PreTrainedModel], right: type[PreTrainedModel]) -> bool:
    """Whether a checkpoint for the class `right` is of the family of `model_class`, which has no other head."""
    heads = [head for family in FAMILIES.values() for head in family.heads.values()]
    has_other_head = issubclass(model_class, tuple(heads)) and not issubclass(model_class, right)
    return model_class.config_class is right.config_class and not has_other_head
