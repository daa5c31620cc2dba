"""
A page in the browser that shows how a model decides: the answers of its stages, the exit under any τ, and its compute.

Every answer is computed once for each image; the slider of τ asks the exit rule again, and no model runs. Needs gradio.
The page loads nothing from other servers: fonts are the system's, and gradio's analytics are off.
"""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..commands.command import DEBUG_HELP, check_model_folder, find_image_files, import_package, user_errors
from ..flags import HelpFormatter, LineParser
from .style import STYLE, error_html


try:
    import gradio as gr
except ImportError as error:
    raise ImportError('The demo needs gradio: pip install "hf-thinkingvit[space]"') from error

if TYPE_CHECKING:
    from .answers import Answers


TITLE = "Vision transformers that think as long as they need"
INTRODUCTION = f"""
# {TITLE}

A model answers in stages. If it is certain enough, the image leaves; if not, it thinks again with more of its weights.
Drop an image or pick one, and move τ: the stages' answers stay, only the decision changes. An A-ViT has no stages: it
lets each patch of the image stop at its own layer.
"""
LOADING = '<div class="tv-small">Loading the model…</div>'
WAITING = '<div class="tv-small">Drop an image, or pick one of the samples.</div>'
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONOSPACE = ["ui-monospace", "Consolas", "monospace"]
LARGEST = "20mb"  # of an uploaded file
KEPT = 3600  # seconds that an uploaded file is kept


class LaterAnswers:
    """
    The answers of models. torch and Transformers are imported and the first model is loaded when they are first asked
    for, since that takes longer than painting the page.

    Args:
        models (`Sequence[str]`): folders, Hub ids, or files of official checkpoints to choose from; the first is shown
            first.
        hub_only (`bool`): take no other folders than those of `models`, as a public page must.

    Raises:
        FileNotFoundError, ValueError: if the first model is a folder that is not there, or has no model in it.
    """

    def __init__(self, models: Sequence[str], hub_only: bool = False):
        if not models:
            raise ValueError("`models` must have the folder or Hub id of at least one model, got none.")
        check_model_folder(models[0])
        self.names, self.hub_only = list(models), hub_only
        self._lock, self._answers = threading.Lock(), None

    def get(self) -> "Answers":
        """The answers; the errors of the first call are those of loading the first model."""
        with self._lock:  # two threads that import the same modules may find them half done
            if self._answers is None:
                import_package()
                from .answers import Answers, Models

                models = Models(self.hub_only, self.names)
                models.get(self.names[0])
                self._answers = Answers(models)
            return self._answers


def build_demo(answers: LaterAnswers, samples: Sequence[str | Path] = ()) -> gr.Blocks:
    """
    The page.

    Args:
        answers ([`LaterAnswers`]): what it shows.
        samples (`Sequence[path]`): images to pick from, the first of which is shown first.
    """

    def show(name: str, image: str | None, threshold: float) -> str:
        """The answers to an image under τ."""
        return WAITING if image is None else answers.get().html(name, image, threshold)

    def choose(name: str, image: str | None) -> tuple[Any, str]:
        """Show another model."""
        try:
            properties = answers.get().slider(name)
        except (OSError, ValueError) as error:
            return gr.skip(), error_html(error)
        return gr.update(**properties), show(name, image, properties.get("value"))

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEPT, KEPT)) as demo:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                image = gr.Image(
                    str(samples[0]) if samples else None,
                    type="filepath",
                    image_mode=None,
                    label="Image",
                    sources=["upload", "clipboard"],
                    height=280,
                    elem_id="image",
                )
                if samples:
                    paths = [[str(path)] for path in samples]
                    gr.Examples(paths, [image], label="Samples", examples_per_page=24, elem_id="samples")
                model = gr.Dropdown(
                    [(Path(name).name if Path(name).exists() else name, name) for name in answers.names],
                    value=answers.names[0],
                    allow_custom_value=True,
                    label="Model",
                    info=_model_words(answers.hub_only),
                    elem_id="model",
                )
            with gr.Column(scale=3, min_width=320):
                threshold = gr.Slider(0.0, 1.0, visible=False, elem_id="threshold")
                answer = gr.HTML(LOADING, elem_id="answer")
        chosen = {"inputs": [model, image], "outputs": [threshold, answer], "api_visibility": "private"}
        shown = {"inputs": [model, image, threshold], "outputs": answer, "api_visibility": "private"}
        gr.on([demo.load, model.change], choose, **chosen)
        image.change(show, **shown)
        threshold.input(show, **shown, show_progress="hidden", trigger_mode="always_last")
    return demo


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
        answers = LaterAnswers(models, hub_only="SPACE_ID" in os.environ)
        demo = build_demo(answers, samples)
        launch_demo(demo, server_port=arguments.port, prevent_thread_lock=True)
        try:
            answers.get()  # while the page is painted
            demo.block_thread()
        finally:
            demo.close(verbose=False)


__all__ = ["LaterAnswers", "build_demo", "launch_demo", "listed_models", "main"]
