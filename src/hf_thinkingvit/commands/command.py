"""What the commands share: options, errors without a traceback, loading of models, and summaries for the console."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from ..auto import TASKS, AutoImageProcessor, saved_task
from ..data import is_missing_path
from ..families.record import IMAGE_CLASSIFICATION
from ..flags import HelpFormatter, LineParser, quiet_pipe, with_flags


DEBUG_HELP = "show where an error was raised"
DTYPES = ("float32", "float16", "bfloat16")
USER_ERRORS = (OSError, ValueError, ImportError)  # what the package raises for wrong arguments, files and data


@quiet_pipe()
def run_command(module: ModuleType, words: list[str] | None = None, prog: str | None = None) -> None:
    """
    Parse the words of a command line and run a command.

    Args:
        module: of the command: its docstring is the description, `add_arguments(parser)` adds the options, and
            `run(arguments)` does the work.
        words (`list[str]`, *optional*): by default those of this process.
        prog (`str`, *optional*): how the command was called.

    Raises:
        SystemExit: with code 2 after an error of the user, which is printed in one or two lines.
    """
    parser = LineParser(prog=prog, description=module.__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    arguments = parser.parse_args(words)
    logging.disable_progress_bar()  # of loading weights, which takes no time
    with user_errors(parser, arguments.debug):
        module.run(arguments)


@contextmanager
def user_errors(parser: argparse.ArgumentParser, debug: bool) -> Iterator[None]:
    """
    A context in which an error of the user is printed in one or two lines, with flags instead of the names of
    arguments, and ends the process with code 2. With `debug` it is raised as it is.
    """
    try:
        yield
    except KeyboardInterrupt:
        if debug:
            raise
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise
    except USER_ERRORS as error:
        if debug:
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        message = with_flags(" ".join(lines[:2]), parser)
        print(f"{parser.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def add_model(parser: argparse._ActionsContainer, help: str = "folder or Hub id") -> None:
    parser.add_argument("--model", required=True, help=help)


def add_dataset(parser: argparse._ActionsContainer, help: str | None = None, *others: str) -> None:
    text = "Hub id, folder of images (one folder a label) or Parquet files, Parquet file"
    parser.add_argument("--dataset", *others, required=True, help=help or text)


def add_output_dir(parser: argparse._ActionsContainer, default: str, help: str) -> None:
    parser.add_argument("--output-dir", type=Path, default=Path(default), help=help)


def positive(word: str) -> int:
    """The type of an option that is an integer of at least 1."""
    try:
        number = int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {word!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {word}")
    return number


def one_or_list(values: list[float] | None) -> float | list[float] | None:
    """What `--threshold` gives: one τ, or one per exit."""
    return values[0] if values and len(values) == 1 else values


def _check_folder(name: str) -> None:
    """That a local folder has a model and an image processor; errors of `load_model`."""
    if is_missing_path(name):
        raise FileNotFoundError(f"There is no folder `{name}` (--model).")
    path = Path(name)
    if path.is_file():
        raise ValueError(
            f"`{name}` is a file: --model takes the folder of a model. `convert` makes one of a checkpoint."
        )
    if path.is_dir():
        for file, what in (("config.json", "model"), ("preprocessor_config.json", "image processor")):
            if not (path / file).is_file():
                inside = [other for other in ("best", "last") if (path / other / file).is_file()]
                hint = f" Did you mean `{path / inside[0]}`?" if inside else ""
                raise FileNotFoundError(f"The folder `{name}` has no {what} (there is no {file} in it).{hint}")


def load_model(
    name: str, task: str | None = IMAGE_CLASSIFICATION, **options: Any
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """
    A model in evaluation mode, and its image processor.

    Args:
        name (`str`): folder or Hub id.
        task (`str`, *optional*): that the model must be for; `None` for any, which its configuration says.
        options: of `from_pretrained`.

    Raises:
        OSError, ValueError: if there is none, or it is for another task (another head would get random weights); the
            message says what is missing.
    """
    _check_folder(name)
    try:
        config = AutoConfig.from_pretrained(name)
        saved = saved_task(config)
        if task is None and saved is None:
            raise ValueError(f"`{name}` is no model of this package with a head: its class is {config.architectures}.")
        if task is not None and saved not in (task, None):
            raise ValueError(f"`{name}` is a model for {saved}, and this command is for {task}.")
        model = TASKS[saved or task][0].from_pretrained(name, **options).eval()
        return model, AutoImageProcessor.from_pretrained(name)
    except OSError as error:
        if Path(name).exists():
            raise
        raise OSError(
            f"`{name}` is no folder here, and cannot be loaded from the Hub: it is not there, or needs "
            "`hf auth login`, or the Hub cannot be reached."
        ) from error


def find_image_files(folder: Path) -> list[Path]:
    """The images in a folder and below, by their suffixes, without hidden files and folders."""
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def find_images_or_fail(folder: Path) -> list[Path]:
    """The same; `FileNotFoundError` if there is no such folder, or no image in it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder `{folder}` (--dataset).")
    files = find_image_files(folder)
    if not files:
        raise FileNotFoundError(f"There are no images in `{folder}` (--dataset), nor in folders below.")
    return files


def start(model: PreTrainedModel, **facts: Any) -> None:
    """Print what a command is about to do: device, precision and model, then `facts`."""
    device = next(model.parameters()).device
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    stages = getattr(model.config, "num_stages", None)
    size = f"{model.num_parameters() / 1e6:.2f} M parameters, {model.config.num_labels} classes"
    say(
        device=f"{device}, {dtype}",
        model=f"{type(model).__name__}, {size}" + (f", {stages} stages" if stages else ""),
        **facts,
    )


def say(**facts: Any) -> None:
    """Print facts with their names, one a line; those that are `None` are left out."""
    for name, value in facts.items():
        if value is not None:
            print(f"{name.replace('_', ' '):<14}{value}")


def best_device() -> torch.device:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
