"""
`from_pretrained` of checkpoints in their authors' layout, which are converted in memory.

The conversion is part of the package `hf_thinkingvit`, which hands it over when it is imported (`set_converter`).
Models that were loaded with the code of their own folder do not have it, and say so.
"""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

# Imported from its module: some versions hide it at the top level without torchvision, although Pillow suffices.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import cached_file, find_adapter_config_file, is_peft_available
from transformers.utils.hub import _CACHED_NO_EXIST, try_to_load_from_cache

from .official_layout import (
    ADAPTER_FILE,
    CONFIG_FILE,
    has_own_names,
    is_official_config,
    is_official_folder,
    weight_files,
)


# Keyword arguments of `from_pretrained` that say where files come from.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# Where a configuration names the official checkpoint while Transformers loads it, for its report.
_SOURCE = "_official_source"


class ConvertedArguments(NamedTuple):
    """
    What Transformers loads an official checkpoint from.

    Attributes:
        arguments (`dict`): keyword arguments of Transformers' `from_pretrained(None, ...)`.
        processor_of (`Callable`): from the loaded model to its image processor.
        model_class (`type`): that of the checkpoint, with its head.
    """

    arguments: dict[str, Any]
    processor_of: Callable[[PreTrainedModel], BaseImageProcessor]
    model_class: type[PreTrainedModel]


# Called with the model class, the source, and the keyword arguments of `from_pretrained`.
Converter = Callable[..., ConvertedArguments]
_converter: Converter | None = None


def set_converter(converter: Converter) -> None:
    """Have `from_pretrained` convert official checkpoints by `converter`."""
    global _converter
    _converter = converter


def is_official(source: str | os.PathLike | None, kwargs: dict[str, Any]) -> bool:
    """
    Whether `source` is a file of weights, or a folder or Hub id whose `config.json` has no `model_type`, which every
    configuration of Transformers has; without a `config.json`, if it has weights that are no adapters, and if a
    `config` is given, only if they do not have the names of this package's models.

    Args:
        source (`str` or `os.PathLike`, *optional*): as of `from_pretrained`.
        kwargs (`dict`): the others of its arguments.
    """
    if source is None or kwargs.get("state_dict") is not None or kwargs.get("gguf_file") is not None:
        return False
    if Path(source).is_file():
        return True
    if Path(source).is_dir():
        folder = Path(source) / (kwargs.get("subfolder") or "")
        if not is_official_folder(folder):
            return False
        has_config = (folder / CONFIG_FILE).is_file()
    else:
        try:
            config_file = cached_file(str(source), CONFIG_FILE, **hub_arguments(kwargs))
        except OSError:
            # Without the Hub, only the cache tells that a repository has no such file.
            if not _is_cached_as_missing(source, CONFIG_FILE, kwargs):
                return False  # Transformers' own loading has more to say
            config_file = None
        if config_file is None and _find(source, ADAPTER_FILE, kwargs) is not None:
            return False
        has_config = config_file is not None
        if has_config and not is_official_config(config_file):
            return False
    if has_config or kwargs.get("config") is None:
        return True
    # Transformers would take weights of any names, and draw all those of the model.
    return kwargs.get("key_mapping") is None and not _has_own_weights(source, kwargs)


def _has_own_weights(source: str | os.PathLike, kwargs: dict[str, Any]) -> bool:
    """Whether the file that Transformers would load has the names of this package's models."""
    files = (_find(source, name, kwargs) for name in weight_files(kwargs.get("variant")))
    return next((has_own_names(file) for file in files if file is not None), False)


def _find(source: str | os.PathLike, name: str, kwargs: dict[str, Any]) -> str | None:
    """A file of a folder or Hub id; `None` if there is none of that name."""
    return cached_file(str(source), name, _raise_exceptions_for_missing_entries=False, **hub_arguments(kwargs))


def _is_cached_as_missing(source: str | os.PathLike, name: str, kwargs: dict[str, Any]) -> bool:
    """Whether the Hub has said before that a repository does not have a file."""
    name = str(PurePosixPath(kwargs.get("subfolder") or "", name))
    try:
        found = try_to_load_from_cache(str(source), name, kwargs.get("cache_dir"), kwargs.get("revision"))
    except ValueError:  # no name of a repository
        return False
    return found is _CACHED_NO_EXIST


class AdapterBase(NamedTuple):
    """
    Attributes:
        source (`str`): the model that adapters are of, as `from_pretrained` takes it.
        kwargs (`dict`): the arguments with which it is loaded: those for the adapters, with the base's own revision.
    """

    source: str
    kwargs: dict[str, Any]


def base_of_adapters(source: str | os.PathLike | None, kwargs: dict[str, Any]) -> AdapterBase | None:
    """
    The base of adapters that PEFT has saved, if `source` is a folder or Hub id of those alone, and PEFT is installed.

    Args:
        source, kwargs: as of `is_official`.
    """
    if source is None or Path(source).is_file() or not is_peft_available():
        return None
    hub = hub_arguments(kwargs)
    if (Path(source) / hub.get("subfolder", "") / CONFIG_FILE).is_file():  # a model with adapters beside it
        return None
    try:
        file = find_adapter_config_file(str(source), **hub)
    except OSError:
        return None
    adapters = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    if not adapters.get("base_model_name_or_path"):
        return None
    for_base = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
    revision = {"revision": adapters["revision"]} if adapters.get("revision") else {}
    return AdapterBase(adapters["base_model_name_or_path"], {**for_base, **revision})


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `kwargs` that say where files come from, if they say it."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}


class OfficialSourcesMixin:
    """`from_pretrained` that takes official checkpoints as well. Before `PreTrainedModel` in the bases of a model."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args, **kwargs):
        r"""
        As of every model in Transformers, and for checkpoints as their authors published them: a Hub id or folder with
        timm's `config.json`, or a `.pth` or `.pth.tar` file, which are converted in memory; and for adapters of these.

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
        source = pretrained_model_name_or_path
        if (base := base_of_adapters(source, kwargs)) is not None and is_official(*base):
            return cls._with_official_base(source, base, *model_args, **kwargs)[0]
        if is_official(source, kwargs):
            return cls._from_official(source, *model_args, **kwargs)[0]
        return super().from_pretrained(source, *model_args, **kwargs)

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
        if (base := base_of_adapters(source, kwargs)) is not None and is_official(*base):
            loaded, processor = cls._with_official_base(source, base, **kwargs)
        elif is_official(source, kwargs):
            loaded, processor = cls._from_official(source, **kwargs)
        else:
            loaded = super().from_pretrained(source, **kwargs)
            place, options = (source, kwargs) if base is None else base
            processor = AutoImageProcessor.from_pretrained(place, **hub_arguments(options))
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
        return cls._load_converted(source, _converter(cls, source, kwargs), *model_args)

    @classmethod
    def _load_converted(
        cls, source: str | os.PathLike, converted: ConvertedArguments, *model_args
    ) -> tuple[Any, BaseImageProcessor]:
        """The same, of what the converter made of the checkpoint."""
        arguments = dict(converted.arguments)
        arguments["config"] = copy.deepcopy(arguments["config"])
        setattr(arguments["config"], _SOURCE, str(source))
        loaded = super().from_pretrained(None, *model_args, **arguments)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        vars(model.config).pop(_SOURCE, None)
        model.name_or_path = model.config.name_or_path = str(source)  # which Transformers takes from its argument
        return loaded, converted.processor_of(model)

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        """As in Transformers, whose report of weights that did not fit names the official checkpoint."""
        source = vars(model.config).pop(_SOURCE, None)
        if source is not None:
            load_config = replace(load_config, pretrained_model_name_or_path=source)
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    @classmethod
    def _with_official_base(
        cls, source: str | os.PathLike, base: AdapterBase, *model_args, **kwargs
    ) -> tuple[Any, BaseImageProcessor]:
        """What `from_pretrained` returns for adapters of an official checkpoint, and the image processor."""
        adapter_kwargs = {**hub_arguments(kwargs), **(kwargs.get("adapter_kwargs") or {})}
        rest = {name: value for name, value in base.kwargs.items() if name != "adapter_name"}
        rest["adapter_kwargs"] = {"_adapter_model_path": str(source)}  # as Auto classes say which adapters these are
        loaded, processor = cls._from_official(base.source, *model_args, **rest)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        info = model.load_adapter(str(source), kwargs.get("adapter_name", "default"), adapter_kwargs=adapter_kwargs)
        return ((model, info.to_dict()) if isinstance(loaded, tuple) else model), processor


def config_fields(config_class: type[PreTrainedConfig]) -> set[str]:
    """Names of keyword arguments of `from_pretrained` that are fields of the configuration."""
    own = set(config_class.__dataclass_fields__) | set(config_class.attribute_map) | {"num_labels"}
    return own - {"dtype", "torch_dtype", "quantization_config"}  # which Transformers' loading reads


__all__ = [
    "ConvertedArguments",
    "OfficialSourcesMixin",
    "base_of_adapters",
    "config_fields",
    "hub_arguments",
    "is_official",
    "set_converter",
]
