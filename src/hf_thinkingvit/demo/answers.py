"""
What the page shows: answers of the models that were used last to the images that were shown last. A session holds no
answers, only the names of its model and image.

Importing this module imports torch and Transformers, which takes seconds: the page is painted before (`app.py`).
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..commands.loading import best_device, load_model
from ..evaluation.inspection import ImageInspection, inspect_image
from ..models.configuration_checks import configured_problem_type
from ..models.configuration_staged import thinks_in_stages
from ..models.exit_criteria import EXIT_CRITERIA
from ..models.image_files import read_image
from .rendering import render
from .style import error_html


LOADED_MODELS = 2  # at a time
INSPECTED_IMAGES = 8  # of which the answers are kept
STEPS = 100  # of the slider


class Models:
    """
    The models that were used last, in evaluation mode on the best device.

    Args:
        hub_only (`bool`): refuse names that are paths, and read models that are not listed without a token, as a public
            page must: its own token may open private ones.
        listed (`Sequence[str]`): names that are taken nevertheless.
    """

    def __init__(self, hub_only: bool = False, listed: Sequence[str] = ()):
        self.hub_only, self.listed = hub_only, set(listed)
        self._lock = threading.Lock()
        self._loaded: OrderedDict[str, tuple[PreTrainedModel, BaseImageProcessor]] = OrderedDict()

    def get(self, name: str) -> tuple[PreTrainedModel, BaseImageProcessor]:
        """The model and its image processor; errors are those of `load_model`."""
        if self.hub_only and name not in self.listed and (Path(name).exists() or name.startswith((".", "/", "~"))):
            raise ValueError(f"`{name}` is no id of a model on the Hub.")
        with self._lock:
            if name not in self._loaded:
                options = {"token": False} if self.hub_only and name not in self.listed else {}
                model, processor = load_model(name, task=None, dtype=torch.float32, **options)
                self._loaded[name] = model.to(best_device()), processor
            self._loaded.move_to_end(name)
            while len(self._loaded) > LOADED_MODELS:
                self._loaded.popitem(last=False)
            return self._loaded[name]


class Answers:
    """
    Answers as HTML. Those to an image are computed once, as long as it is among the last ones; the exit rule is asked
    in each call.

    Args:
        models ([`Models`]): where they come from.
    """

    def __init__(self, models: Models):
        self.models = models
        self._inspect = lru_cache(INSPECTED_IMAGES)(self._inspected)

    def slider(self, name: str) -> dict[str, Any]:
        """The properties of the slider for the model `name`; errors are those of `load_model`."""
        return slider_of(self.models.get(name)[0].config)

    def html(self, name: str, path: str, threshold: float) -> str:
        """The answer of the model `name` to the image at `path` under τ; in its place, why there is none."""
        try:
            inspection = self._inspect(name, path)
            return render(inspection, used_threshold(inspection, threshold))
        except (OSError, ValueError) as error:
            return error_html(error)

    def _inspected(self, name: str, path: str) -> ImageInspection:
        if not Path(path).is_file():
            raise ValueError("This image is no longer kept here: drop it again.")
        return inspect_image(*self.models.get(name), read_image(path))


def used_threshold(inspection: ImageInspection, threshold: float) -> float | None:
    """The slider's τ; `None`, which means the model's own, where it has none, or has not been moved from there."""
    properties = slider_of(inspection.config)
    return threshold if properties["visible"] and threshold != properties["value"] else None


def has_slider(config: PreTrainedConfig) -> bool:
    """Whether τ can be chosen: not where one stage answers, nor of a regression, which no criterion judges."""
    return thinks_in_stages(config) and config.num_stages > 1 and configured_problem_type(config) != "regression"


def slider_of(config: PreTrainedConfig) -> dict[str, Any]:
    """
    The properties of the slider for a model: its range is that of the exit criterion's scores, and where these have no
    bound, twice the model's τ. It begins at the model's τ, of several at the first.
    """
    if not has_slider(config):
        return {"visible": False}
    criterion = EXIT_CRITERIA[config.exit_criterion]
    own = config.threshold if isinstance(config.threshold, (list, tuple)) else [config.threshold]
    several = f" Here the exits have τ = {', '.join(f'{tau:g}' for tau in own)}." if len(set(own)) > 1 else ""
    threshold, maximum = own[0], criterion.maximum(config.num_labels, config.entropy_top_k)
    if math.isfinite(maximum):
        maximum = round(maximum, 4)
    else:
        maximum = 2 * threshold if 0 < threshold < math.inf else float(config.num_stages)
    if math.isfinite(threshold):
        maximum = max(maximum, threshold)
    comparison = "below" if criterion.exits_below else "above"
    if config.exit_at_threshold:
        comparison += " or at"
    score = criterion.description.format(top_k=config.entropy_top_k)
    return {
        "visible": True,
        "minimum": 0.0,
        "maximum": maximum,
        "step": maximum / STEPS if maximum < 1 else 0.01,
        "value": min(threshold, maximum),
        "label": "τ",
        "info": f"An image leaves once {score} is {comparison} τ.{several}",
    }
