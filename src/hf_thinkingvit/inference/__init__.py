"""Running adaptive models: full batches at every stage, and the pipeline that steers and reports exits."""

from .engine import AdaptiveEngine, EngineResult, EngineStats
from .pipeline import ADAPTIVE_IMAGE_CLASSIFICATION, AdaptiveImageClassificationPipeline


__all__ = [
    "ADAPTIVE_IMAGE_CLASSIFICATION",
    "AdaptiveEngine",
    "AdaptiveImageClassificationPipeline",
    "EngineResult",
    "EngineStats",
]
