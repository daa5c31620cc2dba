"""
A page in the browser that shows how a model decides: the answers of its stages, the exit under any τ, and its compute.

Every answer is computed once for each image; the slider of τ asks the exit rule again, and no model runs. Needs gradio.
The page loads nothing from other servers: fonts are the system's, and gradio's analytics are off.
"""

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..commands.command import DEBUG_HELP, find_image_files, user_errors
from ..commands.loading import best_device, load_model
from ..evaluation.inspection import ImageInspection, inspect_image
from ..flags import HelpFormatter, LineParser
from ..models.configuration_checks import configured_problem_type
from ..models.configuration_staged import thinks_in_stages
from ..models.exit_criteria import EXIT_CRITERIA
from .rendering import STYLE, render


try:
    import gradio as gr
except ImportError as error:
    raise ImportError('The demo needs gradio: pip install "hf-thinkingvit[space]"') from error


TITLE = "Vision transformers that think as long as they need"
INTRODUCTION = f"""
# {TITLE}

A model answers in stages. If it is certain enough, the image leaves; if not, it thinks again with more of its weights.
Drop an image or pick one, and move τ: the stages' answers stay, only the decision changes. An A-ViT has no stages: it
lets each patch of the image stop at its own layer.
"""
WAITING = '<div class="tv-small">Drop an image, or pick one of the samples.</div>'
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONOSPACE = ["ui-monospace", "Consolas", "monospace"]
LOADED_MODELS = 2  # at a time
STEPS = 100  # of the slider
LARGEST = "20mb"  # of an uploaded file
KEPT = 3600  # seconds that an uploaded file is kept


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


def build_demo(models: Sequence[str], samples: Sequence[str | Path] = (), hub_only: bool = False) -> gr.Blocks:
    """
    The page.

    Args:
        models (`Sequence[str]`): folders, Hub ids, or files of official checkpoints to choose from; the first is shown
            first.
        samples (`Sequence[path]`): images to pick from, the first of which is shown first.
        hub_only (`bool`): take no other folders than those of `models`, as a public page must.

    Raises:
        OSError, ValueError: if the first model cannot be loaded.
    """
    if not models:
        raise ValueError("`models` must have the folder or Hub id of at least one model, got none.")
    loaded = Models(hub_only, models)
    first_model, _ = loaded.get(models[0])

    def look(name: str, image: Image.Image | None, threshold: float) -> tuple[ImageInspection | None, str]:
        """Compute all answers of an image."""
        if image is None:
            return None, WAITING
        try:
            model, processor = loaded.get(name)
            inspection = inspect_image(model, processor, image)
            return inspection, render(inspection, _used(inspection, threshold))
        except (OSError, ValueError) as error:
            return None, f'<div class="tv-verdict">{escape(str(error))}</div>'

    def choose(name: str, image: Image.Image | None) -> tuple[Any, ImageInspection | None, str]:
        """Show another model."""
        try:
            properties = slider_of(loaded.get(name)[0].config)
        except (OSError, ValueError) as error:
            return gr.skip(), None, f'<div class="tv-verdict">{escape(str(error))}</div>'
        return gr.update(**properties), *look(name, image, properties.get("value"))

    def decide(inspection: ImageInspection | None, threshold: float) -> str:
        """Decide again under another τ."""
        return WAITING if inspection is None else render(inspection, _used(inspection, threshold))

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEPT, KEPT)) as demo:
        gr.Markdown(INTRODUCTION)
        inspected = gr.State()
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                image = gr.Image(
                    str(samples[0]) if samples else None,
                    type="pil",
                    label="Image",
                    sources=["upload", "clipboard"],
                    height=280,
                    elem_id="image",
                )
                if samples:
                    paths = [[str(path)] for path in samples]
                    gr.Examples(paths, [image], label="Samples", examples_per_page=24, elem_id="samples")
                model = gr.Dropdown(
                    [(Path(name).name if Path(name).exists() else name, name) for name in models],
                    value=models[0],
                    allow_custom_value=True,
                    label="Model",
                    info=_model_words(hub_only),
                    elem_id="model",
                )
            with gr.Column(scale=3, min_width=320):
                threshold = gr.Slider(elem_id="threshold", **slider_of(first_model.config))
                answer = gr.HTML(WAITING, elem_id="answer")
        gr.on([demo.load, image.change], look, [model, image, threshold], [inspected, answer], api_visibility="private")
        model.change(choose, [model, image], [threshold, inspected, answer], api_visibility="private")
        threshold.change(
            decide,
            [inspected, threshold],
            answer,
            show_progress="hidden",
            trigger_mode="always_last",
            api_visibility="private",
        )
    return demo


def _used(inspection: ImageInspection, threshold: float) -> float | None:
    """The slider's τ; `None`, which means the model's own, where it has none, or has not been moved from there."""
    properties = slider_of(inspection.config)
    return threshold if properties["visible"] and threshold != properties["value"] else None


def _model_words(hub_only: bool) -> str:
    return "Or the Hub id of another one" + ("." if hub_only else ", or its folder.")


def launch_demo(demo: gr.Blocks, **options: Any) -> Any:
    """`demo.launch(...)` with what the page needs: its style, and nothing from other servers."""
    theme = gr.themes.Default(font=FONTS, font_mono=MONOSPACE).set(block_info_text_color="*neutral_600")
    defaults = {"footer_links": [], "max_file_size": LARGEST, "ssr_mode": False, "show_error": True}
    return demo.launch(theme=theme, css=STYLE, **{**defaults, **options})


def listed_models(folder: Path) -> list[str]:
    """The models that the page in `folder` names (`models` in the front matter of its README.md)."""
    from huggingface_hub import metadata_load

    readme = folder / "README.md"
    return list((metadata_load(readme) or {}).get("models") or []) if readme.is_file() else []


def main(folder: Path, words: list[str] | None = None) -> None:
    """
    The command of a page: `python app.py`.

    Args:
        folder (`Path`): of the page: its README.md names the models, `images` has the samples. Without these, those of
            the repository that it is an example of.
        words (`list[str]`, *optional*): by default those of this process.
    """
    parser = LineParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", nargs="+", help="folders or Hub ids to choose from; by default those of README.md")
    parser.add_argument("--images", type=Path, help="folder of samples")
    parser.add_argument("--port", type=int, help="of the page on this machine; by default one from 7860 that is free")
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    arguments = parser.parse_args(words)
    with user_errors(parser, arguments.debug):
        shipped = [str(path.parent) for path in sorted((folder.parent / "checkpoints").glob("*/config.json"))][::-1]
        models = arguments.model or listed_models(folder) or shipped
        images = arguments.images or next(
            (path for path in (folder / "images", folder.parent / "images") if path.is_dir()), None
        )
        samples = find_image_files(images) if images is not None else []
        demo = build_demo(models, samples, hub_only="SPACE_ID" in os.environ)
        launch_demo(demo, server_port=arguments.port)


__all__ = ["build_demo", "launch_demo", "listed_models", "main"]
