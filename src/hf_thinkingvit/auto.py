"""Registration with Transformers' Auto classes, and with the code saving that lets models load without this package."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    BitImageProcessorPil,
)

# From its module: at the top level, some versions hide it where torchvision is missing, though Pillow suffices.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from .models.configuration_avit import AViTConfig
from .models.configuration_thinking_swin import ThinkingSwinConfig
from .models.configuration_thinkingvit import ThinkingViTConfig
from .models.modeling_avit import AViTForImageClassification, AViTModel
from .models.modeling_thinking_swin import ThinkingSwinForImageClassification, ThinkingSwinModel
from .models.modeling_thinkingvit import ThinkingViTForImageClassification, ThinkingViTModel


# One line per family: configuration, bare model, classifier.
FAMILIES = [
    (ThinkingViTConfig, ThinkingViTModel, ThinkingViTForImageClassification),
    (ThinkingSwinConfig, ThinkingSwinModel, ThinkingSwinForImageClassification),
    (AViTConfig, AViTModel, AViTForImageClassification),
]


def register_models() -> None:
    """Make the Auto classes and pipelines know every family. Calling it again changes nothing."""
    image_processors = {"pil": BitImageProcessorPil}
    if is_torchvision_available():
        from transformers import BitImageProcessor

        image_processors["torchvision"] = BitImageProcessor
    for config_class, model_class, classifier_class in FAMILIES:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, model_class, exist_ok=True)
        AutoModelForImageClassification.register(config_class, classifier_class, exist_ok=True)
        AutoImageProcessor.register(config_class, image_processor_classes=image_processors, exist_ok=True)
        # Pipelines look supported models up by name here, and log an error for those that they do not find.
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[config_class.model_type] = classifier_class.__name__
        # From now on `save_pretrained` writes the code files and the `auto_map`.
        config_class.register_for_auto_class("AutoConfig")
        model_class.register_for_auto_class("AutoModel")
        classifier_class.register_for_auto_class("AutoModelForImageClassification")
