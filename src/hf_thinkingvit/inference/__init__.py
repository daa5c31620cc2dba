"""Running adaptive models: full batches at every stage, the pipeline that steers and reports exits, and export."""

from .distributed import classify_across_processes
from .engine import AdaptiveEngine, EngineResult, EngineStats
from .export import OnnxFiles, export_adaptive, export_onnx, export_stages
from .pipeline import ADAPTIVE_IMAGE_CLASSIFICATION, AdaptiveImageClassificationPipeline
from .resumable import ResumableOutput
from .sliding import ImageView, ImageViews, SlidingResult, SlidingWindowSegmenter, WindowExit, scaled_views


__all__ = [
    "ADAPTIVE_IMAGE_CLASSIFICATION",
    "AdaptiveEngine",
    "AdaptiveImageClassificationPipeline",
    "EngineResult",
    "EngineStats",
    "ImageView",
    "ImageViews",
    "OnnxFiles",
    "ResumableOutput",
    "SlidingResult",
    "SlidingWindowSegmenter",
    "WindowExit",
    "classify_across_processes",
    "export_adaptive",
    "export_onnx",
    "export_stages",
    "scaled_views",
]
