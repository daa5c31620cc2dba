"""
`from_pretrained` of checkpoints in their authors' layout, which are converted in memory.

The conversion is part of the package `hf_thinkingvit`, which hands it over when it is imported (`set_converter`).
Models that were loaded with the code of their own folder do not have it, and say so.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

# Imported from its module: some versions hide it at the top level without torchvision, although Pillow suffices.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import cached_file


# Keyword arguments of `from_pretrained` that say where files come from.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# Suffixes of weights, and the files beside them by which Transformers loads a folder itself.
_WEIGHTS = (".safetensors", ".bin", ".pth", ".tar", ".pt")
_ADAPTERS = "adapter_config.json"

# `(model class, source, keyword arguments of from_pretrained)` to the keyword arguments with which Transformers' own
# `from_pretrained(None, ...)` loads the converted checkpoint, and a function from the model to its image processor.
Converter = Callable[..., tuple[dict[str, Any], Callable[[PreTrainedModel], BaseImageProcessor]]]
_converter: Converter | None = None


def set_converter(converter: Converter) -> None:
    """Have `from_pretrained` convert official checkpoints by `converter`."""
    global _converter
    _converter = converter


def is_official(source: str | os.PathLike | None, kwargs: dict[str, Any]) -> bool:
    """
    Whether `source` is a file of weights, a folder of such a file alone, or a folder or Hub id whose `config.json` has
    no `model_type`, which every configuration of Transformers has. `kwargs` are those of `from_pretrained`.
    """
    if source is None or kwargs.get("state_dict") is not None or kwargs.get("gguf_file") is not None:
        return False
    path, has_config = Path(source), kwargs.get("config") is not None
    if path.is_file():
        return True
    if path.is_dir():
        path = path / (kwargs.get("subfolder") or "")
        if not (path / "config.json").is_file():
            files = [file.name for file in path.iterdir()] if path.is_dir() else []
            return not has_config and _ADAPTERS not in files and any(name.endswith(_WEIGHTS) for name in files)
        config_file = path / "config.json"
    else:
        try:
            config_file = cached_file(str(source), "config.json", **hub_arguments(kwargs))
        except OSError:  # of which Transformers' own loading has more to say
            return False
        if config_file is None:
            return False
    try:
        config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(config, dict) and "model_type" not in config


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `kwargs` that say where files come from, if they say it."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}


class OfficialSourcesMixin:
    """`from_pretrained` that takes official checkpoints as well. Before `PreTrainedModel` in the bases of a model."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args, **kwargs):
        r"""
        As of every model in Transformers, and for checkpoints as their authors published them: a Hub id or folder with
        timm's `config.json`, or a `.pth` or `.pth.tar` file, which are converted in memory.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                Hub id, folder, or file of an official checkpoint.
            kwargs:
                Arguments of Transformers' `from_pretrained`, and fields of the configuration, such as `threshold`.
                Official checkpoints need those that their files do not state: `thinking_stages` or `head_rounds` for a
                bare file, `gate_scale` and `gate_center` for an A-ViT, `pruning_keep_rate` where tokens are pruned.

        Raises:
            OSError: if there is no such source.
            ValueError: if an official checkpoint is damaged, or of another family or task than this class.
        """
        if is_official(pretrained_model_name_or_path, kwargs):
            return cls._from_official(pretrained_model_name_or_path, *model_args, **kwargs)[0]
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def from_pretrained_with_processor(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple:
        r"""
        The model of `from_pretrained` and its image processor, which official checkpoints have no file for.

        Args:
            pretrained_model_name_or_path, kwargs: as of `from_pretrained`.

        Returns:
            `(model, image processor)`; with `output_loading_info=True`, the loading info in the third place.

        Example:

        ```python
        >>> model, processor = ThinkingViTForImageClassification.from_pretrained_with_processor(
        ...     "NCPS/thinkingvit_deit-3h-6h-imagenet1k", threshold=0.9
        ... )
        >>> outputs = model(**processor(image, return_tensors="pt"))
        ```"""
        source = pretrained_model_name_or_path
        if is_official(source, kwargs):
            loaded, processor = cls._from_official(source, **kwargs)
        else:
            loaded = super().from_pretrained(source, **kwargs)
            processor = AutoImageProcessor.from_pretrained(source, **hub_arguments(kwargs))
        model, *info = loaded if isinstance(loaded, tuple) else (loaded,)
        return (model, processor, *info)

    @classmethod
    def _from_official(cls, source: str | os.PathLike, *model_args, **kwargs) -> tuple[Any, BaseImageProcessor]:
        """What `from_pretrained` returns for an official checkpoint, and the image processor."""
        if _converter is None:
            raise ValueError(
                f"{source} is in the layout of its authors, and not of Transformers: its config.json has no "
                "`model_type`. The package hf-thinkingvit converts it: install it, and load it by the package's "
                f"`{cls.__name__}`, or convert it into a folder with `hf-thinkingvit convert`."
            )
        arguments, processor_of = _converter(cls, source, kwargs)
        loaded = super().from_pretrained(None, *model_args, **arguments)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = str(source)  # which Transformers takes from its argument
        return loaded, processor_of(model)


def config_fields(config_class: type[PreTrainedConfig]) -> set[str]:
    """Names of keyword arguments of `from_pretrained` that are fields of the configuration."""
    own = set(config_class.__dataclass_fields__) | set(config_class.attribute_map) | {"num_labels"}
    return own - {"dtype", "torch_dtype", "quantization_config"}  # which Transformers' loading reads


__all__ = ["OfficialSourcesMixin", "config_fields", "hub_arguments", "is_official", "set_converter"]
