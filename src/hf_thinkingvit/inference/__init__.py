"""Running adaptive models: the pipeline that steers and reports exits."""

from .pipeline import ADAPTIVE_IMAGE_CLASSIFICATION, AdaptiveImageClassificationPipeline


__all__ = ["ADAPTIVE_IMAGE_CLASSIFICATION", "AdaptiveImageClassificationPipeline"]
