"""
Classify many images with full batches at every stage, and write a line for each:

    python examples/classify_folder.py --model examples/checkpoints/thinkingvit-cifar10 --images examples/images
    python examples/classify_folder.py --model MODEL --images uoft-cs/cifar10 --split test --output results.parquet

`--images` is a folder of images, searched with its subfolders, or what `datasets` reads. The output is JSONL or, by its
suffix, Parquet. Started again with the same output it goes on where it stopped. Unreadable images are reported and left
out. `accelerate launch` on several GPUs shares the images out.
"""

import argparse
import json
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
from hf_thinkingvit.inference import AdaptiveEngine


def find_images(name: str, split: str | None, column: str | None) -> tuple[list[str], Callable[[int], Any]]:
    """A name for each image, and how to get the image at a place in that list."""
    folder = Path(name)
    if folder.is_dir():
        suffixes = Image.registered_extensions()
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
        if files:
            return [path.relative_to(folder).as_posix() for path in files], lambda place: files[place]
    rows, column = as_images(find_split(load_splits(name), split, name, ("test", "validation", "train")), name, column)
    # As a function: an image that cannot be decoded is then met, and reported, like a file that cannot.
    return [str(place) for place in range(len(rows))], lambda place: partial(decode_row, rows, place, column)


def decode_row(rows: datasets.Dataset, place: int, column: str) -> Image.Image:
    return decode(rows[place][column])


def read_lines(path: Path) -> list[dict]:
    """What an earlier run wrote; a last line that was cut short is dropped from the file."""
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    path.write_bytes(whole + b"\n" if whole else b"")
    return [json.loads(line) for line in whole.decode("utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--images", required=True, help="folder, Hub id, Parquet file")
    parser.add_argument("--split", help="of a dataset; by default test, else validation, else train")
    parser.add_argument("--image-column")
    parser.add_argument("--output", type=Path, default=Path("outputs/classified.jsonl"), help=".jsonl or .parquet")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threshold", type=float, nargs="+", help="τ, one or one per exit")
    arguments = parser.parse_args()
    if arguments.output.suffix not in (".jsonl", ".parquet"):
        parser.error("--output must end in .jsonl or .parquet")

    # Several processes on CPUs must be told that they are on CPUs.
    state = PartialState(cpu=not torch.accelerator.is_available())
    model = AutoModelForImageClassification.from_pretrained(arguments.model).to(state.device)
    threshold = arguments.threshold
    engine = AdaptiveEngine(
        model,
        AutoImageProcessor.from_pretrained(arguments.model),
        batch_size=arguments.batch_size,
        threshold=threshold[0] if threshold and len(threshold) == 1 else threshold,
        on_error="return",
    )
    names, image_at = find_images(arguments.images, arguments.split, arguments.image_column)
    part = arguments.output.with_name(f".{arguments.output.stem}.{state.process_index}.jsonl")
    part.parent.mkdir(parents=True, exist_ok=True)
    if arguments.output.exists():
        parser.error(f"{arguments.output} is there already: it is complete. Choose another --output.")
    mine = range(state.process_index, len(names), state.num_processes)
    done = {line["name"] for line in read_lines(part)}
    places = [place for place in mine if names[place] not in done]
    exits: Counter = Counter()
    bar = tqdm(total=len(mine), initial=len(done), unit="image", disable=not state.is_main_process)
    with part.open("a", encoding="utf-8") as file, bar:
        for result in engine(image_at(place) for place in places):
            line = {"place": places[result.index], "name": names[places[result.index]]}
            if result.error is not None:
                bar.write(str(result.error))
                line["error"] = str(result.error)
            else:
                score, label = result.logits.softmax(dim=-1).max(dim=-1)
                exits[result.exit_stage] += 1
                line |= {"label": model.config.id2label[label.item()], "score": round(score.item(), 6)}
                line |= {"exit_stage": result.exit_stage, "entropy": round(result.entropy, 6)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()
            shares = ", ".join(f"{stage}: {count / exits.total():.0%}" for stage, count in sorted(exits.items()))
            bar.set_postfix_str(f"leave at stage {shares}", refresh=False)
    state.wait_for_everyone()
    if state.is_main_process:
        gather(arguments.output, state.num_processes)


def gather(output: Path, num_processes: int) -> None:
    """The processes' parts in the order of the input, as one file."""
    parts = [output.with_name(f".{output.stem}.{rank}.jsonl") for rank in range(num_processes)]
    lines = sorted((line for part in parts for line in read_lines(part)), key=lambda line: line["place"])
    good = [{name: value for name, value in line.items() if name != "place"} for line in lines if "error" not in line]
    temporary = output.with_name(f".{output.name}.partial")
    if output.suffix == ".parquet":
        datasets.Dataset.from_list(good).to_parquet(temporary)
    else:
        temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in good), encoding="utf-8")
    temporary.replace(output)
    for part in parts:
        part.unlink()
    print(f"{len(good)} images classified, {len(lines) - len(good)} could not be read: {output}")


if __name__ == "__main__":
    main()
