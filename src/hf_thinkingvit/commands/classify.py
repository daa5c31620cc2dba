"""Classifies many images, one line each. `options.py` has its options and description."""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from ..data import as_images, decode, find_split, load_splits
from ..inference import AdaptiveEngine, ExportedModel, ResumableOutput
from ..inference.class_scores import best_classes
from ..inference.resumable import fingerprint, model_fingerprint, printable
from ..public_names import public_name
from . import command
from .loading import answers_are_random, best_device, load_classifier, start


class ImageSource(NamedTuple):
    """
    Attributes:
        names: of the images, in order.
        identities: one per image, which changes when the image does.
        read: from an index in the names to the image.
    """

    names: list[str]
    identities: list[str]
    read: Callable[[int], Any]


def find_images(name: str, split: str | None, column: str | None) -> ImageSource:
    """The images of a folder and its subfolders, or those that `datasets` reads under that name."""
    folder = Path(name)
    if folder.is_dir() and (files := command.find_image_files(folder)):
        names = [path.relative_to(folder).as_posix() for path in files]
        # Names alone do not identify the images: another folder has the same ones, or a file has changed.
        identities = [f"{found.st_size} {found.st_mtime_ns}" for found in (path.stat() for path in files)]
        return ImageSource(names, identities, lambda place: files[place])
    rows, column = as_images(find_split(load_splits(name), split, name, ("test", "validation", "train")), name, column)
    # Decoded by the engine, which reports an image that cannot be decoded as it does a broken file.
    contents = fingerprint([str(getattr(rows, "_fingerprint", None)), column, str(len(rows))])
    names = [str(place) for place in range(len(rows))]
    return ImageSource(names, [contents] * len(rows), lambda place: partial(decode_row, rows, place, column))


def decode_row(rows: datasets.Dataset, place: int, column: str) -> Image.Image:
    return decode(rows[place][column])


def run(arguments: argparse.Namespace) -> None:
    # Accelerate does not find out by itself that several processes run on CPUs.
    state = PartialState(cpu=best_device().type == "cpu")
    source = find_images(arguments.dataset, arguments.split, arguments.image_column)
    path = arguments.output or arguments.output_dir / f"classified.{arguments.format}"
    model, processor = load_classifier(arguments.model, arguments.precision)
    if not isinstance(model, ExportedModel):
        model.to(state.device)
    threshold, keep_rate = command.one_or_list(arguments.threshold), command.one_or_list(arguments.keep_rate)
    engine = AdaptiveEngine(
        model,
        processor,
        batch_size=arguments.batch_size,
        threshold=threshold,
        max_stages=arguments.max_stages,
        keep_rate=keep_rate,
        # So that the command can be repeated; processes must not draw the same numbers.
        generator=torch.Generator().manual_seed(state.process_index) if answers_are_random(model) else None,
        on_error="return",
    )
    facts = {
        "model": public_name(arguments.model),
        "model_fingerprint": model_fingerprint(model, processor),
        "threshold": getattr(model.config, "threshold", None) if threshold is None else threshold,
        "keep_rate": getattr(model.config, "pruning_keep_rate", None) if keep_rate is None else keep_rate,
        "max_stages": arguments.max_stages,
        "source": public_name(arguments.dataset),
        "split": arguments.split,
    }
    output = ResumableOutput(path, facts, source.names, state, source.identities)
    if state.is_main_process:
        answered = f", {output.done} of them are classified already" if output.done else ""
        start(model, images=f"{len(source.names)}{answered}", saved_to=printable(str(path)))
        if output.is_update and not output.places and state.num_processes == 1:
            print("nothing is new: every image is classified already")

    classify(engine, source, output, state)
    counts = output.finish()
    if counts is not None:
        command.say(
            classified=f"{counts[0]} images ({counts[0] - output.done} in this run), {counts[1]} could not be read "
            f"{'or have no answer (see their `error`)' if counts[1] else ''}".rstrip(),
            file=printable(str(path)),
            next=f'python -c "import pandas; print(pandas.read_{"parquet" if path.suffix == ".parquet" else "json"}('
            f'{str(path)!r}{"" if path.suffix == ".parquet" else ", lines=True"}))"',
        )


def classify(engine: AdaptiveEngine, source: ImageSource, output: ResumableOutput, state: PartialState) -> None:
    """Write a line for each image that is not classified yet."""
    config = engine.model.config
    exits: Counter = Counter()
    with tqdm(total=len(output.places), unit="image", disable=not (state.is_main_process and output.places)) as bar:
        for result in engine(source.read(place) for place in output.places):
            place = output.places[result.index]
            error = result.error
            if error is None:
                try:
                    [(label, score)] = best_classes(result.logits, config)
                except ArithmeticError as failure:
                    error = ArithmeticError(f"The image {source.names[place]} has no answer. {failure}")
            if error is not None:
                message = printable(str(error))
                bar.write(message, file=sys.stderr)
                output.write(place, error=message)
            else:
                exits[result.exit_stage] += 1
                output.write(
                    place,
                    label=label,
                    score=round(score, 6),
                    exit_stage=result.exit_stage,
                    entropy=round(result.entropy, 6),
                )
            bar.update()
            shares = ", ".join(f"{stage}: {count / exits.total():.0%}" for stage, count in sorted(exits.items()))
            bar.set_postfix_str(f"leave at stage {shares}", refresh=False)


def main(words: list[str] | None = None, prog: str | None = None) -> None:
    command.run_command("classify", words, prog)


if __name__ == "__main__":
    main()
