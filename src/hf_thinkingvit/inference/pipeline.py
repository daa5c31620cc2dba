"""The pipeline for models that think in stages, run by the engine, and its registration with Transformers."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

import torch
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from ..models.configuration_staged import ADAPTIVE_IMAGE_CLASSIFICATION
from ..models.staged_pipeline import StagedImageClassificationPipeline
from .engine import AdaptiveEngine
from .runtimes import ExportedModel, with_runtime


class AdaptiveImageClassificationPipeline(StagedImageClassificationPipeline):
    """
    [`StagedImageClassificationPipeline`] with the same arguments and results, which runs lists, datasets and other
    streams through [`AdaptiveEngine`], in full batches at every stage.

    Args:
        runtime, precision (`str`, *optional*):
            What runs the stages, and in what precision, as in [`AdaptiveEngine`]. `model` may also be what
            `from_exported` returned, of which the image processor is then the default.

    Importing this package registers it. It then runs every model that thinks in stages, instead of the class in the
    model's folder, with or without `trust_remote_code`.

    Example:

    ```python
    >>> from transformers import pipeline
    >>> import hf_thinkingvit

    >>> classifier = pipeline("adaptive-image-classification", model="org/thinkingvit-3-6")
    >>> classifier("cat.jpg", threshold=0.9, top_k=1)
    [{'label': 'tabby', 'score': 0.81, 'exit_stage': 0, 'entropy': 0.64}]
    ```"""

    def __init__(
        self,
        model: PreTrainedModel | ExportedModel,
        image_processor: BaseImageProcessor | None = None,
        *,
        runtime: str | None = None,
        precision: str | None = None,
        **kwargs,
    ):
        if isinstance(model, ExportedModel):
            image_processor = image_processor or model.processor
            kwargs["device"] = "cpu"
        super().__init__(model=model, image_processor=image_processor, **kwargs)
        self.model = with_runtime(self.model, runtime, precision)
        if isinstance(self.model, ExportedModel):  # which takes host memory, whatever device the model was on
            self.device = self.model.device

    def run_stream(
        self, readings: Iterable[torch.Tensor | Exception], batch_size: int, forward_params: dict[str, Any]
    ) -> Iterator[dict[str, Any] | Exception]:
        engine = AdaptiveEngine(self.model, batch_size=batch_size, on_error="return", **forward_params)
        with closing(engine(readings)) as results:
            for result in results:
                yield result.error or {
                    "logits": result.logits[None],
                    "exit_stage": [result.exit_stage],
                    "entropy": [result.entropy],
                }


def register_pipeline() -> None:
    """Register `pipeline("adaptive-image-classification")` with Transformers. Idempotent."""
    if ADAPTIVE_IMAGE_CLASSIFICATION not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            ADAPTIVE_IMAGE_CLASSIFICATION,
            pipeline_class=AdaptiveImageClassificationPipeline,
            pt_model=AutoModelForImageClassification,
            type="image",
        )
