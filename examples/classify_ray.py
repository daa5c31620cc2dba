"""
Classify many images on a cluster with Ray Data, an engine in each actor of a pool:

    pip install "hf-thinkingvit[ray]"
    python examples/classify_ray.py --model outputs/openvino --dataset photos --output classified --actors 4

`--dataset` is a folder of images, searched with its subfolders, or Parquet (a file or a folder) with a column of
images: their files as bytes, or structs with `bytes`, as `datasets` writes them. `--model` is a folder that
`export_model` wrote, or a model with PyTorch weights; every node must reach it. The output is a new or empty folder,
which gets Parquet files: a row for each image, in no particular order, with the columns of the input but the image,
`predicted_label`, `predicted_score`, `exit_stage`, `entropy`, and `error` for those that cannot be read or have no
answer. An input that has one of these columns is refused.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import ray
from PIL import Image

from hf_thinkingvit.commands.loading import load_classifier
from hf_thinkingvit.inference import AdaptiveEngine
from hf_thinkingvit.inference.class_scores import best_classes
from hf_thinkingvit.inference.runtimes import is_exported
from hf_thinkingvit.models.image_files import as_rgb, open_photo


BATCH = 256  # rows that an actor gets at once: several batches of the engine, so that later stages fill theirs
ANSWERS = ("predicted_label", "predicted_score", "exit_stage", "entropy", "error")  # columns of the output


def decode(content: Any) -> Image.Image:
    if isinstance(content, dict):
        content = content["bytes"]
    if content is None:
        raise ValueError("the row has no bytes of an image")
    return as_rgb(open_photo(content))


class Classifier:
    """Lives in an actor: the engine is made once, and classifies batches of rows."""

    def __init__(
        self,
        model: str,
        column: str,
        batch_size: int,
        threshold: float | None,
        precision: str | None,
        threads: int | None = None,
    ):
        # PyTorch takes the actor's CPUs, which Ray tells it (OMP_NUM_THREADS); other runtimes take all of the node's.
        network, processor = load_classifier(model, precision, threads if is_exported(model) else None)
        self.column, self.config = column, network.config
        self.engine = AdaptiveEngine(network, processor, batch_size=batch_size, threshold=threshold, on_error="return")

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = rows.pop(self.column)
        found = {name: [] for name in ANSWERS}
        for result in self.engine(partial(decode, image) for image in images):
            row = ("", np.nan, -1, np.nan, str(result.error))
            if result.error is None:
                try:
                    row = (*best_classes(result.logits, self.config)[0], result.exit_stage, result.entropy, "")
                except ArithmeticError as error:
                    row = ("", np.nan, -1, np.nan, str(error))
            for name, value in zip(found, row):
                found[name].append(value)
        return {**rows, **{name: np.array(values) for name, values in found.items()}}


def read(dataset: str, column: str | None) -> tuple[ray.data.Dataset, str]:
    """The rows, and the column that has the images."""
    path = Path(dataset)
    parquet = path.suffix == ".parquet" or (path.is_dir() and any(path.rglob("*.parquet")))
    if not parquet:
        endings = sorted(ending.removeprefix(".") for ending in Image.registered_extensions())
        return ray.data.read_binary_files(dataset, include_paths=True, file_extensions=endings), "bytes"
    rows = ray.data.read_parquet(dataset)
    column = column or "image"
    if column not in rows.columns():
        raise ValueError(f"{dataset!r} has no column {column!r} but {rows.columns()}: choose one by --image-column.")
    taken = sorted(set(ANSWERS) & set(rows.columns()) - {column})
    if taken:
        raise ValueError(f"{dataset!r} has columns {taken}, which are those of the answers: rename or drop them.")
    return rows, column


def check_output(output: str) -> None:
    """Refuse a folder with files: Ray would add its own to them, and they would be read as one table."""
    files, path = pyarrow.fs.FileSystem.from_uri(output) if "://" in output else (pyarrow.fs.LocalFileSystem(), output)
    found = files.get_file_info(path)
    is_folder = found.type == pyarrow.fs.FileType.Directory
    if found.is_file or (is_folder and files.get_file_info(pyarrow.fs.FileSelector(path))):
        raise FileExistsError(f"{output!r} is not an empty folder: choose another output, or remove it first.")


def classify(
    model: str,
    dataset: str,
    output: str,
    actors: int = 1,
    cpus: float = 1,
    batch_size: int = 16,
    threshold: float | None = None,
    precision: str | None = None,
    column: str | None = None,
) -> None:
    check_output(output)
    rows, column = read(dataset, column)
    classified = rows.map_batches(
        Classifier,
        fn_constructor_args=(model, column, batch_size, threshold, precision, max(1, int(cpus))),
        batch_size=max(BATCH, 4 * batch_size),
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=cpus,
    )
    classified.write_parquet(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output", required=True, help="new or empty folder")
    parser.add_argument("--image-column", help="of Parquet; image by default")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--cpus", type=float, default=1, help="of each actor, which has as many threads")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threshold", type=float, help="τ; by default the model's")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16", "int8"], help="of an exported folder")
    words = parser.parse_args()
    model, dataset, output = (
        str(Path(name).resolve()) if "://" not in name and (Path(name).exists() or name == words.output) else name
        for name in (words.model, words.dataset, words.output)
    )
    classify(
        model,
        dataset,
        output,
        words.actors,
        words.cpus,
        words.batch_size,
        words.threshold,
        words.precision,
        words.image_column,
    )


if __name__ == "__main__":
    main()
