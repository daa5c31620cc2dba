"""Running adaptive models: full batches at every stage, the pipeline that steers and reports exits, and export."""

from .. import needs_torch  # noqa: F401
from .distributed import classify_across_processes
from .engine import AdaptiveEngine, EngineResult, EngineStats
from .export import OnnxFiles, export_adaptive, export_onnx, export_stages
from .pipeline import ADAPTIVE_IMAGE_CLASSIFICATION, AdaptiveImageClassificationPipeline
from .resumable import ResumableOutput
from .runtimes import ExportedModel, export_model, from_exported, with_runtime
from .service import EngineService, ServiceClosed, ServiceFull
from .sliding import ImageView, ImageViews, SlidingResult, SlidingWindowSegmenter, WindowExit, scaled_views
from .stream import WithThreshold


__all__ = [
    "ADAPTIVE_IMAGE_CLASSIFICATION",
    "AdaptiveEngine",
    "AdaptiveImageClassificationPipeline",
    "EngineResult",
    "EngineService",
    "EngineStats",
    "ExportedModel",
    "ImageView",
    "ImageViews",
    "OnnxFiles",
    "ResumableOutput",
    "ServiceClosed",
    "ServiceFull",
    "SlidingResult",
    "SlidingWindowSegmenter",
    "WindowExit",
    "WithThreshold",
    "classify_across_processes",
    "export_adaptive",
    "export_model",
    "export_onnx",
    "export_stages",
    "from_exported",
    "scaled_views",
    "with_runtime",
]
