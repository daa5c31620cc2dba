"""
Image classification that takes τ per call and says at which stage each image left.

This file travels with the models: `custom_pipelines` in their configuration names it, so that
`pipeline("adaptive-image-classification", model=…, trust_remote_code=True)` needs no package.
"""

import inspect
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import ImageClassificationPipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from .image_files import read_image
from .image_inputs import as_8_bits, check_one_image, each_image, is_one_image


class StagedImageClassificationPipeline(ImageClassificationPipeline):
    r"""
    `ImageClassificationPipeline` for models that think in stages. Each result has, beside `label` and `score`,
    `exit_stage` (`int`, counted from 0) and `entropy` (`float`, in nats) of the image's accepted answer.

    A call takes what `ImageClassificationPipeline` takes, and any other iterable of images: a tuple, a `DataLoader`, a
    stream that has a length and no indices. Lists, tuples, and tensors or arrays of four dimensions give a list of
    results, everything else an iterator. Dataset rows that are dicts are refused: pass their images.

    Args, of the pipeline or of a call:
        threshold (`float` or `list[float]`, *optional*):
            τ, one or one per exit, instead of `model.config.threshold`. `pipeline("image-classification")` refuses this
            argument; there τ is set on loading: `pipeline(..., model_kwargs={"threshold": 0.9})`.
        max_stages (`int`, *optional*):
            Run at most this many stages.
        keep_rate (`float` or `list[float]`, *optional*):
            Of a model with pruning layers: the share of patches that remain, instead of `config.pruning_keep_rate`.
        interpolate_pos_encoding (`bool`, *optional*):
            As in the model's `forward`.
        generator (`torch.Generator`, *optional*):
            As in the model's `forward`, of models whose answers are random: each image gets its next number.
        on_error (`"raise"` or `"return"`, *optional*, defaults to `"raise"`):
            Whether an image that cannot be read raises an exception. With `"return"` its result is
            `[{"error": message}]`, a list like any result, and the other images are classified.
        top_k, function_to_apply, timeout, batch_size, num_workers:
            As in `ImageClassificationPipeline`.

    Raises:
        ValueError: if the model does not think in stages; if the input is neither an image nor a stream of images; or,
            unless `on_error="return"`, if an image cannot be read (the message names it).

    Example:

    ```python
    >>> from transformers import pipeline

    >>> classifier = pipeline("adaptive-image-classification", model="org/thinkingvit-3-6", trust_remote_code=True)
    >>> classifier("cat.jpg", threshold=0.9, top_k=1)
    [{'label': 'tabby', 'score': 0.81, 'exit_stage': 0, 'entropy': 0.64}]
    ```"""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        model = getattr(self.model, "_orig_mod", self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # within PEFT's adapters
        if "threshold" not in inspect.signature(model.forward).parameters:
            raise ValueError(
                f"{type(self.model).__name__} does not think in stages: its forward takes no `threshold`. "
                'Use `pipeline("image-classification")` for it.'
            )

    def check_model_type(self, supported_models) -> None:
        """Does nothing: Transformers would log an error for every class that is not its own."""

    def __call__(self, inputs: Any, **kwargs):
        """As in `ImageClassificationPipeline`, for more kinds of streams. An empty list gives an empty list."""
        images = each_image(inputs)
        if is_one_image(inputs) or isinstance(inputs, Dataset):
            return super().__call__(inputs, **kwargs)
        if isinstance(inputs, (list, tuple)) or hasattr(inputs, "ndim"):
            images = list(images)
            return super().__call__(images, **kwargs) if images else []
        return super().__call__((image for image in images), **kwargs)

    def _sanitize_parameters(
        self,
        threshold: float | Sequence[float] | None = None,
        max_stages: int | None = None,
        keep_rate: float | Sequence[float] | None = None,
        interpolate_pos_encoding: bool | None = None,
        generator: torch.Generator | None = None,
        on_error: str | None = None,
        **kwargs,
    ) -> tuple[dict, dict, dict]:
        preprocess_params, forward_params, postprocess_params = super()._sanitize_parameters(**kwargs)
        if on_error not in (None, "raise", "return"):
            raise ValueError(f'`on_error` must be "raise" or "return", got {on_error!r}.')
        steering = {
            "threshold": threshold,
            "max_stages": max_stages,
            "keep_rate": keep_rate,
            "interpolate_pos_encoding": interpolate_pos_encoding,
            "generator": generator,
        }
        forward_params.update({name: value for name, value in steering.items() if value is not None})
        if on_error is not None:
            postprocess_params["on_error"] = on_error
        return preprocess_params, forward_params, postprocess_params

    def preprocess(self, image: Any, timeout: float | None = None):
        image = os.fspath(image) if isinstance(image, os.PathLike) else image
        try:
            check_one_image(image)
            image = read_image(image, timeout) if isinstance(image, (str, Image.Image)) else image
            return super().preprocess(as_8_bits(image))
        except Exception as error:  # decoders raise many types, without the name of the image
            name = image if isinstance(image, str) else getattr(image, "filename", "") or repr(image)
            raise ValueError(
                f"Cannot read the image {name[:200]}: {type(error).__name__}: {error} "
                "Expected a path, a URL or a PIL image of a file that Pillow can decode."
            ) from error

    def read(self, image: Any, **preprocess_params) -> torch.Tensor | Exception:
        """Pixel values `(channels, height, width)`, or the exception if the image cannot be read."""
        try:
            return self.preprocess(image, **preprocess_params)["pixel_values"][0]
        except ValueError as error:
            return error

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params) -> list[dict[str, Any]]:
        readings = [self.read(inputs, **preprocess_params)]
        return next(self._results(self._run_batch(readings, forward_params), **postprocess_params))

    def get_iterator(
        self, inputs, num_workers: int, batch_size: int, preprocess_params, forward_params, postprocess_params
    ) -> Iterator[list[dict[str, Any]]]:
        if num_workers:
            if isinstance(inputs, list) or (isinstance(inputs, Dataset) and not isinstance(inputs, IterableDataset)):
                images = PipelineDataset(inputs, self.read, preprocess_params)
            else:  # one worker, because each would read the whole stream
                images, num_workers = PipelineIterator(each_image(inputs), self.read, preprocess_params), 1
            readings = DataLoader(images, batch_size=None, num_workers=num_workers)
        else:
            readings = (self.read(image, **preprocess_params) for image in each_image(inputs))
        return self._results(self.run_stream(iter(readings), batch_size, forward_params), **postprocess_params)

    def run_stream(
        self, readings: Iterable[torch.Tensor | Exception], batch_size: int, forward_params: dict[str, Any]
    ) -> Iterator[dict[str, Any] | Exception]:
        """The model's outputs for each image, or its reading error, in order. The images of a batch have one size."""
        waiting: list[torch.Tensor | Exception] = []
        size = None  # shape of the images in `waiting`
        for reading in readings:
            if isinstance(reading, torch.Tensor):
                if size not in (None, reading.shape):
                    yield from self._run_batch(waiting, forward_params)
                    waiting = []
                size = reading.shape
            waiting.append(reading)
            if len(waiting) == batch_size:
                yield from self._run_batch(waiting, forward_params)
                waiting, size = [], None
        yield from self._run_batch(waiting, forward_params)

    def _run_batch(self, readings: list, forward_params: dict[str, Any]) -> Iterator[dict[str, Any] | Exception]:
        images = [reading for reading in readings if isinstance(reading, torch.Tensor)]
        outputs = self.forward({"pixel_values": torch.stack(images)}, **forward_params) if images else None
        row = 0
        for reading in readings:
            if isinstance(reading, Exception):
                yield reading
            else:
                yield {name: outputs[name][row : row + 1] for name in ("logits", "exit_stage", "entropy")}
                row += 1

    def _results(
        self, outputs: Iterator[dict[str, Any] | Exception], on_error: str = "raise", **postprocess_params
    ) -> Iterator[list[dict[str, Any]]]:
        with closing(outputs):
            for output in outputs:
                if not isinstance(output, Exception):
                    yield self.postprocess(output, **postprocess_params)
                elif on_error == "return":
                    yield [{"error": str(output)}]
                else:
                    raise output

    def _forward(self, model_inputs, **forward_params):
        if self.model.training:  # it may have been trained since the pipeline was created
            self.model.eval()
        return self.model(**model_inputs, **forward_params)

    def postprocess(self, model_outputs, **postprocess_params) -> list[dict[str, Any]]:
        exit_facts = {
            "exit_stage": int(model_outputs["exit_stage"][0]),
            "entropy": float(model_outputs["entropy"][0]),
        }
        return [{**result, **exit_facts} for result in super().postprocess(model_outputs, **postprocess_params)]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save model and image processor. The pipeline is saved with the model's code and configuration."""
        self.model.save_pretrained(save_directory, **kwargs)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(save_directory, **kwargs)


__all__ = ["StagedImageClassificationPipeline"]
