"""
Classify many images with full batches at every stage, and write one line per image:

    python examples/classify_folder.py --model examples/checkpoints/thinkingvit-cifar10 --images examples/images
    python examples/classify_folder.py --model MODEL --images uoft-cs/cifar10 --split test --output results.parquet

`--images` is a folder of images, searched with its subfolders, or what `datasets` reads. The output is JSONL or, by its
suffix, Parquet; `OUTPUT.run.json` beside it records model, τ and source. A further run with the same output resumes,
with any number of processes. If model, τ or source differ, it is refused. A source is identified by the names, sizes
and modification times of its files, or by the fingerprint that `datasets` computes and the number of rows. Unreadable
images are reported and skipped; a resumed run tries them again. `accelerate launch` splits the images among processes.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageClassification

from hf_thinkingvit.auto import AutoImageProcessor
from hf_thinkingvit.data import as_images, decode, find_split, load_splits
from hf_thinkingvit.inference import AdaptiveEngine, ResumableOutput
from hf_thinkingvit.inference.resumable import fingerprint, model_fingerprint, printable
from hf_thinkingvit.public_names import public_name


def find_images(name: str, split: str | None, column: str | None) -> tuple[list[str], str, Callable[[int], Any]]:
    """The images' names, a fingerprint of all images, and a function from an index in the names to the image."""
    folder = Path(name)
    if folder.is_dir():
        suffixes = Image.registered_extensions()
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
        if files:
            names = [path.relative_to(folder).as_posix() for path in files]
            # Names alone do not identify the images: another folder has the same ones, or a file has changed.
            found = (path.stat() for path in files)
            contents = fingerprint(f"{file.st_size} {file.st_mtime_ns}" for file in found)
            return names, contents, lambda place: files[place]
    rows, column = as_images(find_split(load_splits(name), split, name, ("test", "validation", "train")), name, column)
    # Decoded by the engine, which reports an image that cannot be decoded as it does a broken file.
    names = [str(place) for place in range(len(rows))]
    contents = fingerprint([str(getattr(rows, "_fingerprint", None)), column, str(len(rows))])
    return names, contents, lambda place: partial(decode_row, rows, place, column)


def decode_row(rows: datasets.Dataset, place: int, column: str) -> Image.Image:
    return decode(rows[place][column])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--images", required=True, help="folder, Hub id, Parquet file")
    parser.add_argument("--split", help="of a dataset; by default test, else validation, else train")
    parser.add_argument("--image-column")
    parser.add_argument("--output", type=Path, default=Path("outputs/classified.jsonl"), help=".jsonl or .parquet")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threshold", type=float, nargs="+", help="τ, one or one per exit")
    parser.add_argument("--max-stages", type=int, help="run at most this many stages")
    arguments = parser.parse_args()

    # Accelerate does not find out by itself that several processes run on CPUs.
    state = PartialState(cpu=not torch.accelerator.is_available())
    model = AutoModelForImageClassification.from_pretrained(arguments.model).to(state.device)
    processor = AutoImageProcessor.from_pretrained(arguments.model)
    threshold = arguments.threshold
    threshold = threshold[0] if threshold and len(threshold) == 1 else threshold
    engine = AdaptiveEngine(
        model,
        processor,
        batch_size=arguments.batch_size,
        threshold=threshold,
        max_stages=arguments.max_stages,
        on_error="return",
    )
    names, contents, image_at = find_images(arguments.images, arguments.split, arguments.image_column)
    facts = {
        "model": public_name(arguments.model),
        "model_fingerprint": model_fingerprint(model, processor),
        "threshold": getattr(model.config, "threshold", None) if threshold is None else threshold,
        "max_stages": arguments.max_stages,
        "source": public_name(arguments.images),
        "split": arguments.split,
        "contents": contents,
    }
    try:
        output = ResumableOutput(arguments.output, facts, names, state)
    except (FileExistsError, ValueError) as error:
        parser.error(str(error))

    exits: Counter = Counter()
    with tqdm(total=len(output.places), unit="image", disable=not state.is_main_process) as bar:
        for result in engine(image_at(place) for place in output.places):
            place = output.places[result.index]
            if result.error is not None:
                error = printable(str(result.error))
                bar.write(error, file=sys.stderr)
                output.write(place, error=error)
            else:
                score, label = result.logits.softmax(dim=-1).max(dim=-1)
                exits[result.exit_stage] += 1
                output.write(
                    place,
                    label=model.config.id2label[label.item()],
                    score=round(score.item(), 6),
                    exit_stage=result.exit_stage,
                    entropy=round(result.entropy, 6),
                )
            bar.update()
            shares = ", ".join(f"{stage}: {count / exits.total():.0%}" for stage, count in sorted(exits.items()))
            bar.set_postfix_str(f"leave at stage {shares}", refresh=False)
    counts = output.finish()
    if counts is not None:
        print(f"{counts[0]} images classified, {counts[1]} could not be read: {printable(str(arguments.output))}")


if __name__ == "__main__":
    main()
