"""The names of the package; importing this module registers its models and pipelines with Transformers."""

from . import needs_torch  # noqa: F401
from .auto import register_models
from .conversion import convert_checkpoint
from .conversion.loading import load_arguments
from .inference import AdaptiveImageClassificationPipeline
from .inference.pipeline import register_pipeline
from .models.configuration_avit import AViTConfig
from .models.configuration_early_exit_vit import EarlyExitViTConfig
from .models.configuration_elastic_vit import ElasticViTConfig
from .models.configuration_thinking_swin import SwinRound, ThinkingSwinConfig
from .models.configuration_thinkingvit import ThinkingViTConfig
from .models.exit_criteria import EXIT_CRITERIA, ExitCriterion
from .models.exit_rules import ExitRule
from .models.modeling_avit import (
    AViTForImageClassification,
    AViTImageClassifierOutput,
    AViTModel,
    AViTModelOutput,
    AViTPreTrainedModel,
)
from .models.modeling_early_exit_vit import (
    EarlyExitImageClassifierOutput,
    EarlyExitViTForImageClassification,
    EarlyExitViTModel,
    EarlyExitViTPreTrainedModel,
)
from .models.modeling_elastic_vit import (
    ElasticImageClassifierOutput,
    ElasticViTForImageClassification,
    ElasticViTModel,
    ElasticViTPreTrainedModel,
)
from .models.modeling_thinking_swin import (
    ThinkingSwinForImageClassification,
    ThinkingSwinModel,
    ThinkingSwinPreTrainedModel,
)
from .models.modeling_thinking_swin_backbone import ThinkingSwinBackbone
from .models.modeling_thinkingvit import (
    ThinkingViTForImageClassification,
    ThinkingViTModel,
    ThinkingViTPreTrainedModel,
)
from .models.modeling_thinkingvit_backbone import ThinkingViTBackbone
from .models.modeling_thinkingvit_segmentation import ThinkingViTForSemanticSegmentation
from .models.sub_networks import SubNetwork
from .models.task_classification import StagedImageClassifierOutput
from .models.task_segmentation import StagedSemanticSegmenterOutput
from .models.weights_from_official import set_converter
from .version import __version__


__all__ = [
    "AViTConfig",
    "AViTForImageClassification",
    "AViTImageClassifierOutput",
    "AViTModel",
    "AViTModelOutput",
    "AViTPreTrainedModel",
    "AdaptiveImageClassificationPipeline",
    "EXIT_CRITERIA",
    "ElasticImageClassifierOutput",
    "ElasticViTConfig",
    "ElasticViTForImageClassification",
    "ElasticViTModel",
    "ElasticViTPreTrainedModel",
    "EarlyExitImageClassifierOutput",
    "EarlyExitViTConfig",
    "EarlyExitViTForImageClassification",
    "EarlyExitViTModel",
    "EarlyExitViTPreTrainedModel",
    "ExitCriterion",
    "ExitRule",
    "SubNetwork",
    "StagedImageClassifierOutput",
    "StagedSemanticSegmenterOutput",
    "SwinRound",
    "ThinkingSwinBackbone",
    "ThinkingSwinConfig",
    "ThinkingSwinForImageClassification",
    "ThinkingSwinModel",
    "ThinkingSwinPreTrainedModel",
    "ThinkingViTBackbone",
    "ThinkingViTConfig",
    "ThinkingViTForImageClassification",
    "ThinkingViTForSemanticSegmentation",
    "ThinkingViTModel",
    "ThinkingViTPreTrainedModel",
    "__version__",
    "convert_checkpoint",
]

register_models()
register_pipeline()
set_converter(load_arguments)  # `from_pretrained` takes official checkpoints
