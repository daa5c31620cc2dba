"""Image classification that takes τ per call and says at which stage each image left."""

import inspect
import os
from collections.abc import Iterator, Sequence, Sized
from typing import Any

from PIL import Image
from transformers import AutoModelForImageClassification, ImageClassificationPipeline
from transformers.pipelines import PIPELINE_REGISTRY

from ..models.image_files import read_image
from .engine import AdaptiveEngine


ADAPTIVE_IMAGE_CLASSIFICATION = "adaptive-image-classification"


class AdaptiveImageClassificationPipeline(ImageClassificationPipeline):
    r"""
    `ImageClassificationPipeline` for models that think in stages. Each result has, beside `label` and `score`,
    `exit_stage` (`int`, counted from 0) and `entropy` (`float`, in nats) of the image's accepted answer.

    Args, of the pipeline or of a call:
        threshold (`float` or `list[float]`, *optional*):
            τ, one or one per exit, instead of `model.config.threshold`.
        max_stages (`int`, *optional*):
            Run at most this many stages.
        top_k, function_to_apply, timeout, batch_size:
            As in `ImageClassificationPipeline`.

    Raises:
        ValueError: if the model does not think in stages, or an image cannot be read; the message names it.

    Example:

    ```python
    >>> from transformers import pipeline
    >>> import hf_thinkingvit

    >>> classifier = pipeline("adaptive-image-classification", model="org/thinkingvit-3-6")
    >>> classifier("cat.jpg", threshold=0.9, top_k=1)
    [{'label': 'tabby', 'score': 0.81, 'exit_stage': 0, 'entropy': 0.64}]
    ```"""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if "threshold" not in inspect.signature(getattr(self.model, "_orig_mod", self.model).forward).parameters:
            raise ValueError(
                f"{type(self.model).__name__} does not think in stages: its forward takes no `threshold`. "
                'Use `pipeline("image-classification")` for it.'
            )

    def __call__(self, inputs: Any, **kwargs):
        """As `ImageClassificationPipeline`, of which an empty list is an error."""
        return [] if isinstance(inputs, list) and not inputs else super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self, threshold: float | Sequence[float] | None = None, max_stages: int | None = None, **kwargs
    ) -> tuple[dict, dict, dict]:
        preprocess_params, forward_params, postprocess_params = super()._sanitize_parameters(**kwargs)
        steering = {"threshold": threshold, "max_stages": max_stages}
        forward_params.update({name: value for name, value in steering.items() if value is not None})
        return preprocess_params, forward_params, postprocess_params

    def preprocess(self, image: Any, timeout: float | None = None):
        image = os.fspath(image) if isinstance(image, os.PathLike) else image
        try:
            image = read_image(image, timeout) if isinstance(image, (str, Image.Image)) else image
            return super().preprocess(image)
        except Exception as error:  # decoders raise many types, and none of them says which image it was
            name = image if isinstance(image, str) else getattr(image, "filename", "") or repr(image)
            raise ValueError(
                f"Cannot read the image {name[:200]}: {type(error).__name__}: {error} "
                "Expected a path, a URL or a PIL image of a file that Pillow can decode."
            ) from error

    def get_iterator(
        self, inputs, num_workers: int, batch_size: int, preprocess_params, forward_params, postprocess_params
    ) -> Iterator[list[dict[str, Any]]]:
        """Lists, datasets and generators go through the engine, which keeps the batches of every stage full."""
        if num_workers:  # whoever asks for processes that preprocess gets Transformers' own way
            return super().get_iterator(
                inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params
            )
        engine = AdaptiveEngine(self.model, batch_size=batch_size, **forward_params)
        images = (inputs[index] for index in range(len(inputs))) if isinstance(inputs, Sized) else inputs
        pixel_values = (self.preprocess(image, **preprocess_params)["pixel_values"][0] for image in images)
        outputs = (
            {"logits": result.logits[None], "exit_stage": [result.exit_stage], "entropy": [result.entropy]}
            for result in engine(pixel_values)
        )
        return (self.postprocess(output, **postprocess_params) for output in outputs)

    def _forward(self, model_inputs, **forward_params):
        return self.model(**model_inputs, **forward_params)

    def postprocess(self, model_outputs, **postprocess_params) -> list[dict[str, Any]]:
        exit_facts = {
            "exit_stage": int(model_outputs["exit_stage"][0]),
            "entropy": float(model_outputs["entropy"][0]),
        }
        return [{**result, **exit_facts} for result in super().postprocess(model_outputs, **postprocess_params)]


def register_pipeline() -> None:
    """Make `pipeline("adaptive-image-classification")` known to Transformers. Calling it again changes nothing."""
    if ADAPTIVE_IMAGE_CLASSIFICATION not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            ADAPTIVE_IMAGE_CLASSIFICATION,
            pipeline_class=AdaptiveImageClassificationPipeline,
            pt_model=AutoModelForImageClassification,
            type="image",
        )
