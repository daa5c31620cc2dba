"""
Draw at what layer each patch of an image leaves the computation: where an A-ViT halts it, or token pruning removes it
(a ThinkingViT or DynamicViT with `pruning_layers`):

    python examples/visualize_tokens.py --model MODEL --dataset IMAGES --output-dir outputs/tokens

MODEL is a folder or Hub id. IMAGES is a folder of image files, a Parquet file or a folder of them, or a data set on the
Hub, of which only the rows in use are fetched. Writes one picture per image, and:

- tokens.png: images beside their token depths, the first of them on one sheet,
- mean_depth.png: the mean depth at each patch position (figure 3 of A-ViT's paper, arXiv 2112.07658),
- halting_scores.png, of an A-ViT: the halting scores of each layer (figure 4 of the paper).

A patch's depth is the number of layers that it runs. In an A-ViT that is until it halts, even if the class token halts
earlier. With token pruning it counts the layers of the last stage, which every image runs here whatever τ is, and whose
answer is the prediction shown; earlier stages remove nothing.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from hf_thinkingvit.commands import command, loading, options
from hf_thinkingvit.data import decode
from hf_thinkingvit.evaluation import token_pictures
from hf_thinkingvit.evaluation.token_depths import check_token_arguments, token_depths
from hf_thinkingvit.evaluation.token_pictures import ImageTokens, save_picture, undo_normalisation
from hf_thinkingvit.flags import HelpFormatter, LineParser


SHEET_IMAGES = 24


class ImageSource:
    """Iterates over the readable images of a folder or data set, with their names; warns of the others."""

    def __init__(self, source: str, split: str | None = None):
        path = Path(source)
        self.skipped = 0
        if path.is_dir() and (files := command.find_image_files(path)):
            self.rows = ((str(file.relative_to(path)), {"path": str(file), "bytes": None}) for file in files)
        elif path.is_dir() and not any(path.rglob("*.parquet")):
            raise ValueError(f"found neither images nor Parquet files in {source}")
        elif path.is_file() and path.suffix != ".parquet":
            self.rows = iter([(path.name, {"path": str(path), "bytes": None})])
        else:
            self.rows = dataset_rows(source, split)

    def __iter__(self) -> Iterator[tuple[str, Image.Image]]:
        for name, encoded in self.rows:
            if (image := self.decode(name, encoded)) is not None:
                yield name, image

    def decode(self, name: str, encoded: dict | None) -> Image.Image | None:
        """The image as RGB, upright; None and a warning where it cannot be read."""
        try:
            return decode(encoded)
        except Exception as error:  # broken files raise whatever their format's decoder does
            self.skipped += 1
            tqdm.write(f"warning: skipped {name}, which is unreadable: {error}", file=sys.stderr)
            return None


def dataset_rows(source: str, split: str | None) -> Iterator[tuple[str, dict | None]]:
    """Names and encoded images of a split of a `datasets` source, by default of test or validation if there is one."""
    if source.endswith(".parquet"):
        splits = datasets.load_dataset("parquet", data_files=source, streaming=True)
    else:
        splits = datasets.load_dataset(source, streaming=True)
    if split is None:
        split = next((name for name in ("test", "validation") if name in splits), next(iter(splits)))
    if split not in splits:
        raise ValueError(f"{source} has no split {split!r}, but {', '.join(splits)}")
    features = splits[split].features or {}
    column = next((name for name, feature in features.items() if isinstance(feature, datasets.Image)), None)
    if column is None:
        raise ValueError(f"{source} has no column of images, but {', '.join(features)}")
    encoded = splits[split].select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return ((f"row {index}", row[column]) for index, row in enumerate(encoded))


def analyse(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    images: Iterable[tuple[str, Image.Image]],
    batch_size: int,
    pictures: int,
    **arguments: float | None,
) -> tuple[list[ImageTokens], list[np.ndarray]]:
    """
    Every image's tokens, the first `pictures` with their pixels; and of each layer of an A-ViT the halting scores of
    all tokens that were active in it. `arguments` are those of `token_depths`.
    """
    images, results = iter(images), []
    scores: list[list[np.ndarray]] = [[] for _ in range(model.config.num_hidden_layers)]
    with tqdm(desc="images", unit="image") as progress:
        while batch := list(islice(images, batch_size)):
            pixel_values = processor([image for _, image in batch], return_tensors="pt")["pixel_values"]
            found = token_depths(model, pixel_values.to(model.device, model.dtype), **arguments)
            for layer, layer_scores in enumerate(found.halting_scores):
                scores[layer].append(layer_scores.cpu().numpy())
            depths, labels = found.depth.cpu().numpy(), found.predicted.tolist()
            for (name, _), label, depth, image_values in zip(batch, labels, depths, pixel_values):
                pixels = undo_normalisation(image_values, processor) if len(results) < pictures else None
                results.append(ImageTokens(name, model.config.id2label[label], depth, pixels))
            progress.update(len(batch))
    return results, [np.concatenate(layer) for layer in scores if layer]


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def main() -> None:
    parser = LineParser(description=__doc__, formatter_class=HelpFormatter)
    positive = options.positive
    parser.add_argument("--model", required=True, help="folder or Hub id of an A-ViT, or of a model that prunes tokens")
    parser.add_argument(
        "--dataset", required=True, help="folder of images, Parquet file or folder of them, or Hub id of a data set"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/tokens"), help="the pictures")
    parser.add_argument("--limit", type=positive, default=16, help="images to look at")
    parser.add_argument("--pictures", type=positive, default=16, help="of which get a picture")
    parser.add_argument("--split", help="of a data set (default: test or validation if there is one, else the first)")
    parser.add_argument("--halting-epsilon", type=float, help="instead of the A-ViT's; a greater one halts earlier")
    parser.add_argument("--keep-rate", type=float, nargs="+", help="instead of the model's, one or one per layer")
    parser.add_argument("--batch-size", type=positive, default=32, help="images in a forward pass")
    parser.add_argument("--debug", action="store_true", help=command.DEBUG_HELP)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    with command.user_errors(parser, arguments.debug):
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    model, processor = loading.load_model(arguments.model)
    tokens = {
        "halting_epsilon": arguments.halting_epsilon,
        "keep_rate": command.one_or_list(arguments.keep_rate),
    }
    check_token_arguments(model.config, **tokens)  # before images are read
    model.to(loading.best_device())
    source = ImageSource(arguments.dataset, arguments.split)
    images = islice(source, arguments.limit)
    results, scores = analyse(model, processor, images, arguments.batch_size, arguments.pictures, **tokens)
    if not results:
        raise ValueError(f"There are no readable images in {arguments.dataset} ({source.skipped} unreadable).")

    folder, config = arguments.output_dir, model.config
    folder.mkdir(parents=True, exist_ok=True)
    shown = results[: arguments.pictures]
    for index, image in enumerate(shown):
        stem = re.sub(r"\W+", "-", Path(image.name).stem)[:60]
        save_picture(token_pictures.plot_image(image, config), folder / f"tokens_{index:03d}_{stem}.png")
    depths = np.stack([image.depth for image in results])
    plots = {
        "tokens.png": partial(token_pictures.plot_sheet, shown[:SHEET_IMAGES], config),
        "mean_depth.png": partial(token_pictures.plot_mean_depth, depths, config),
    }
    if scores:
        plots["halting_scores.png"] = partial(token_pictures.plot_halting_scores, scores)
    for name, plot in plots.items():
        save_picture(plot(), folder / name)

    by_image = depths.mean(axis=(1, 2))
    low, high = by_image.argmin(), by_image.argmax()
    print(f"{count(len(results), 'image')}, {source.skipped} unreadable and skipped")
    print(f"mean depth of the patches: {by_image.mean():.2f} of {config.num_hidden_layers} layers")
    print(f"from {by_image[low]:.2f} ({results[low].name}) to {by_image[high]:.2f} ({results[high].name})")
    print(f"pictures: {folder} (start with {', '.join(plots)})")


if __name__ == "__main__":
    main()
