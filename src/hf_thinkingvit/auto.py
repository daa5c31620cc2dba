"""Registration with Transformers' Auto classes, which also makes saved models carry their own code."""

import functools
import os
from pathlib import Path
from typing import Any

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    BitImageProcessorPil,
    PreTrainedConfig,
)

# Imported from its module: some versions hide it at the top level without torchvision, although Pillow suffices.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
)
from transformers.utils import is_torchvision_available

from .families import FAMILIES
from .families.official import OWN_ARGUMENTS
from .families.record import IMAGE_CLASSIFICATION, IMAGE_SEGMENTATION
from .models.weights_from_official import hub_arguments, is_official


# For each task, its Auto class, and the names by which pipelines look up the models that they support.
TASKS = {
    IMAGE_CLASSIFICATION: (AutoModelForImageClassification, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    IMAGE_SEGMENTATION: (AutoModelForSemanticSegmentation, MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES),
}

TIMM_WRAPPER = "timm_wrapper"  # what Transformers takes every `config.json` with a `pretrained_cfg` for
_EXPLAINED = "_explains_official_sources"  # marks the method that `explain_official_sources` puts in place


def saved_task(config: PreTrainedConfig) -> str | None:
    """
    The task of a saved model, by the `architectures` of its configuration; `None` if they are of no model of this
    package with a head.
    """
    tasks = {head.__name__: task for family in FAMILIES.values() for task, head in family.heads.items()}
    return next((tasks[name] for name in config.architectures or () if name in tasks), None)


def register_models() -> None:
    """Register every family with the Auto classes and pipelines. Further calls change nothing."""
    image_processors = {"pil": BitImageProcessorPil}
    if is_torchvision_available():
        from transformers import BitImageProcessor

        image_processors["torchvision"] = BitImageProcessor
    for family in FAMILIES.values():
        AutoConfig.register(family.model_type, family.config_class, exist_ok=True)
        AutoModel.register(family.config_class, family.model_class, exist_ok=True)
        AutoImageProcessor.register(family.config_class, image_processor_classes=image_processors, exist_ok=True)
        # From now on `save_pretrained` writes the code files and the `auto_map`.
        family.config_class.register_for_auto_class("AutoConfig")
        family.model_class.register_for_auto_class("AutoModel")
        if family.backbone_class is not None:
            AutoBackbone.register(family.config_class, family.backbone_class, exist_ok=True)
            family.backbone_class.register_for_auto_class("AutoBackbone")
        for task, head in family.heads.items():
            auto_class, pipeline_names = TASKS[task]
            auto_class.register(family.config_class, head, exist_ok=True)
            pipeline_names[family.model_type] = head.__name__  # without it, pipelines log that the model is unsupported
            head.register_for_auto_class(auto_class.__name__)


def explain_official_sources() -> None:
    """
    Have `AutoConfig`, and with it every Auto class, say how an official checkpoint, or adapters of one, are loaded,
    where it would miss a `model_type`, or take the checkpoint for a plain model of timm. Further calls change nothing.
    """
    original = AutoConfig.from_pretrained.__func__
    if _EXPLAINED in vars(original):
        return

    @functools.wraps(original)
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        source = pretrained_model_name_or_path
        try:
            found = original(cls, source, **kwargs)
        except (ImportError, OSError, ValueError) as error:
            is_missing = isinstance(error, OSError) and not Path(source).exists()
            if is_missing or not _needs_conversion(source, kwargs):
                raise
            raise _not_converted(source) from error
        config = found[0] if isinstance(found, tuple) else found
        if config.model_type == TIMM_WRAPPER and _needs_conversion(source, kwargs):
            raise _not_converted(source)
        return found

    setattr(from_pretrained, _EXPLAINED, True)
    AutoConfig.from_pretrained = classmethod(from_pretrained)


def _needs_conversion(source: str | os.PathLike, kwargs: dict[str, Any]) -> bool:
    """Whether `source` is an official checkpoint, as its files and `config.json` tell, and no plain model of timm."""
    if not is_official(source, kwargs):
        return False
    try:
        config, _ = PreTrainedConfig.get_config_dict(source, **hub_arguments(kwargs))
    except OSError:  # without a `config.json`
        return True
    return config.get("model_type") != TIMM_WRAPPER or not OWN_ARGUMENTS.isdisjoint(config.get("model_args") or ())


def _not_converted(source: str | os.PathLike) -> ValueError:
    return ValueError(
        f"{source} is an official checkpoint, which Auto classes do not convert. Load it, or adapters of it, by its "
        "class, such as `ThinkingViTForImageClassification.from_pretrained(...)`, or convert it into a folder: "
        "`hf-thinkingvit convert`."
    )
