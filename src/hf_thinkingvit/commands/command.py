"""What the commands share: errors without a traceback, paths that are looked for, and lines for the console."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from ..flags import HelpFormatter, LineParser, quiet_pipe, stdout_is_closed, with_flags
from ..models.official_layout import ADAPTER_FILE, CONFIG_FILE, WEIGHT_SUFFIXES, is_official_folder
from ..public_names import is_missing_path
from . import options


DEBUG_HELP = "show where an error was raised"
USER_ERRORS = (OSError, ValueError, ImportError)  # what the package raises for wrong arguments, files and data


@quiet_pipe()
def run_command(name: str, words: list[str] | None = None, prog: str | None = None) -> None:
    """
    Parse the words of a command line, look for the paths in them, and only then import and run a command.

    Args:
        name (`str`): of the command: `options.py` has a function of that name which adds the options, and the module of
            that name a function `run(arguments)` which does the work.
        words (`list[str]`, *optional*): by default those of this process.
        prog (`str`, *optional*): how the command was called.

    Raises:
        SystemExit: with code 2 after an error of the user, which is printed in one or two lines.
    """
    parser = LineParser(prog=prog, formatter_class=HelpFormatter, allow_abbrev=False)
    getattr(options, name)(parser)
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    arguments = parser.parse_args(words)
    with user_errors(parser, arguments.debug):
        check_paths(arguments)
        import_command(name).run(arguments)


def import_command(name: str) -> ModuleType:
    """The module of a command, and the package, which the console command has not imported so far."""
    import_package()
    return import_module(f".{name}", __package__)


def import_package() -> None:
    """Register the models, and leave progress bars out that show nothing."""
    import_module("..library", __package__)
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading weights, which takes no time


def check_paths(arguments: argparse.Namespace) -> None:
    """`FileNotFoundError` or `ValueError` for inputs that are written as paths and are not there."""
    given = {name: getattr(arguments, name, None) for name in ("model", "dataset", "source", "results")}
    if given["model"] is not None:
        check_model_folder(given["model"])
    if given["dataset"] is not None and is_missing_path(str(given["dataset"])):
        raise FileNotFoundError(f"There is no dataset `{given['dataset']}` (--dataset): no such file or folder.")
    if given["source"] is not None and is_missing_path(given["source"]):
        raise FileNotFoundError(f"There is no file or folder `{given['source']}` to start from.")
    if given["results"] is not None and not given["results"].is_file():
        raise FileNotFoundError(f"There is no file `{given['results']}` (--results).")


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
    except USER_ERRORS as error:
        if debug or (isinstance(error, BrokenPipeError) and stdout_is_closed()):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        message = with_flags(" ".join(lines[:2]), parser)
        print(f"{parser.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def one_or_list(values: list[float] | None) -> float | list[float] | None:
    """What `--threshold` gives: one τ, or one per exit."""
    return values[0] if values and len(values) == 1 else values


def check_model_folder(name: str) -> None:
    """
    `FileNotFoundError` or `ValueError` for a local folder without a model or an image processor, which official
    checkpoints need none of, and for a file that is none of these.
    """
    if is_missing_path(name):
        raise FileNotFoundError(f"There is no folder `{name}` (--model).")
    path = Path(name)
    if path.is_file() and not name.endswith(WEIGHT_SUFFIXES):
        raise ValueError(
            f"`{name}` is a file: --model takes the folder of a model, or the weights of an official checkpoint "
            f"({', '.join(WEIGHT_SUFFIXES)})."
        )
    if path.is_dir() and not is_official_folder(path):
        for file, what in ((CONFIG_FILE, "model"), ("preprocessor_config.json", "image processor")):
            if not (path / file).is_file():
                inside = [other for other in ("best", "last") if (path / other / file).is_file()]
                hint = f" Did you mean `{path / inside[0]}`?" if inside else ""
                if (path / ADAPTER_FILE).is_file():
                    hint = " It holds adapters: merge them (`merge_and_unload`), and save the model."
                raise FileNotFoundError(f"The folder `{name}` has no {what} (there is no {file} in it).{hint}")


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


def say(**facts: Any) -> None:
    """Print facts with their names, one a line; those that are `None` are left out."""
    for name, value in facts.items():
        if value is not None:
            print(f"{name.replace('_', ' '):<14}{value}")
