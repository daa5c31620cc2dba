"""Registration with Transformers' Auto classes, which also makes saved models carry their own code."""

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
from .families.record import IMAGE_CLASSIFICATION, IMAGE_SEGMENTATION


# For each task, its Auto class, and the names by which pipelines look up the models that they support.
TASKS = {
    IMAGE_CLASSIFICATION: (AutoModelForImageClassification, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    IMAGE_SEGMENTATION: (AutoModelForSemanticSegmentation, MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES),
}


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
