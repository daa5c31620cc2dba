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
earlier. With token pruning it counts the layers of the last stage, which every image runs here (τ = 0) and whose answer
is the prediction shown; earlier stages remove nothing.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import datasets
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap, Normalize
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import logging

from hf_thinkingvit import AViTConfig
from hf_thinkingvit.commands.command import DEBUG_HELP, find_image_files, user_errors
from hf_thinkingvit.commands.options import positive
from hf_thinkingvit.data import decode
from hf_thinkingvit.flags import HelpFormatter, LineParser
from hf_thinkingvit.models.configuration_avit import check_halting_epsilon
from hf_thinkingvit.models.configuration_checks import as_pair
from hf_thinkingvit.models.configuration_pruning import resolve_keep_rates


ENLARGED_SIZE = 600  # pixels: images are enlarged to at least this, so that the pixels' edges stay sharp
SHEET_IMAGES, SHEET_COLUMNS = 24, 4
LEGEND = "layers until the patch leaves"
NUMBERED_GRID = 16  # patches a side, up to which the mean depths are written out
DPI = 110


@dataclass
class Tokens:
    """One image: its predicted label, the depth of every patch (rows, columns), and RGB as the model sees it."""

    name: str
    label: str
    depth: np.ndarray
    pixels: np.ndarray | None  # only for images that get a picture


class ImageSource:
    """Iterates over the readable images of a folder or data set, with their names; warns of the others."""

    def __init__(self, source: str, split: str | None = None):
        path = Path(source)
        self.skipped = 0
        if path.is_dir() and (files := find_image_files(path)):
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


def load_model(name: str) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The model in evaluation mode, on the GPU if there is one, and its image processor."""
    config = AutoConfig.from_pretrained(name)
    if not isinstance(config, AViTConfig) and not getattr(config, "pruning_layers", None):
        raise ValueError(
            f"{name} lets no patch leave: it is neither an A-ViT nor a model with `pruning_layers`, but of type "
            f"{config.model_type!r}"
        )
    model = AutoModelForImageClassification.from_pretrained(name, config=config).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoImageProcessor.from_pretrained(name)


def undo_normalisation(pixel_values: torch.Tensor, processor: BaseImageProcessor) -> np.ndarray:
    """One image (height, width, channels) with 8 bits a channel, as it was before the processor normalised it."""
    pixels = pixel_values.permute(1, 2, 0).numpy()
    if processor.do_normalize:
        pixels = pixels * np.array(processor.image_std) + np.array(processor.image_mean)
    return (pixels * 255).round().clip(0, 255).astype(np.uint8)


# (model, pixel values) → predicted classes (images,); the depth of every patch (images, patches); of an A-ViT for each
# layer the halting scores of the tokens that were active in it.
Reader = Callable[[PreTrainedModel, torch.Tensor], tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]]


def read_halting(
    model: PreTrainedModel, pixel_values: torch.Tensor, halting_epsilon: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """A [`Reader`] of an A-ViT."""
    predicted = model(pixel_values, halting_epsilon=halting_epsilon).logits.argmax(dim=1)
    tokens = model.avit(pixel_values, halting_epsilon=halting_epsilon)
    scores = [each[tokens.token_depth > layer] for layer, each in enumerate(tokens.halting_scores)]
    return predicted, tokens.token_depth[:, model.config.num_prefix_tokens :], scores


def read_pruning(
    model: PreTrainedModel, pixel_values: torch.Tensor, keep_rate: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """A [`Reader`] of a model that prunes tokens."""
    config = model.config
    outputs = model(pixel_values, threshold=0.0, keep_rate=keep_rate, output_kept_tokens=True)
    rows, columns = config.patch_grid
    leaves = [*config.pruning_layers, config.num_hidden_layers]  # layers that a patch has run when it leaves
    depth = torch.full((len(pixel_values), rows * columns), leaves[0], device=pixel_values.device)
    for kept, layers in zip(outputs.kept_tokens, leaves[1:], strict=True):
        depth.scatter_(1, kept, layers)
    return outputs.logits.argmax(dim=1), depth, []


def reader_for(config: PreTrainedConfig, halting_epsilon: float | None, keep_rate: float | None) -> Reader:
    """
    The reader of a model, with what is asked of it.

    Raises:
        ValueError: for an argument that is invalid, or of the other kind of model.
    """
    if isinstance(config, AViTConfig):
        if keep_rate is not None:
            raise ValueError("--keep-rate is of models that prune tokens, and this is an A-ViT")
        if halting_epsilon is not None:
            check_halting_epsilon(halting_epsilon)
        return partial(read_halting, halting_epsilon=halting_epsilon)
    if halting_epsilon is not None:
        raise ValueError("--halting-epsilon is of an A-ViT, and this model prunes tokens")
    if keep_rate is not None:
        resolve_keep_rates(keep_rate, len(config.pruning_layers))
    return partial(read_pruning, keep_rate=keep_rate)


@torch.no_grad()
def analyse(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    images: Iterable[tuple[str, Image.Image]],
    read: Reader,
    batch_size: int,
    pictures: int,
) -> tuple[list[Tokens], list[np.ndarray]]:
    """Every image's tokens, and of each layer of an A-ViT the halting scores of all tokens that were active in it."""
    config, images, results = model.config, iter(images), []
    scores: list[list[np.ndarray]] = [[] for _ in range(config.num_hidden_layers)]
    with tqdm(desc="images", unit="image") as progress:
        while batch := list(islice(images, batch_size)):
            pixel_values = processor([image for _, image in batch], return_tensors="pt")["pixel_values"]
            inputs = pixel_values.to(model.device, model.dtype)
            labels, depths, found = read(model, inputs)
            for layer, layer_scores in enumerate(found):
                scores[layer].append(layer_scores.cpu().numpy())
            depths = depths.unflatten(1, config.patch_grid).cpu().numpy()
            for (name, _), label, depth, image_values in zip(batch, labels.tolist(), depths, pixel_values):
                pixels = undo_normalisation(image_values, processor) if len(results) < pictures else None
                results.append(Tokens(name, config.id2label[label], depth, pixels))
            progress.update(len(batch))
    return results, [np.concatenate(layer) for layer in scores if layer]


def depth_scale(num_layers: int, discrete: bool) -> tuple[Colormap, Normalize]:
    """
    Colormap and norm for depths from 1 to `num_layers`; discrete or not, an integer depth has the same colour. A patch
    that is removed before the first layer has the colour of 1.
    """
    if discrete or num_layers == 1:
        return plt.get_cmap("viridis", num_layers), BoundaryNorm(np.arange(num_layers + 1) + 0.5, num_layers)
    return plt.get_cmap("viridis"), Normalize(1, num_layers)


def add_legend(figure: plt.Figure, axes: plt.Axes | np.ndarray, num_layers: int, discrete: bool, label: str) -> None:
    """A colour bar from 1 to `num_layers` beside `axes`, at which only integers are marked."""
    colors, norm = depth_scale(num_layers, discrete)
    ticks = np.unique(np.linspace(1, num_layers, min(num_layers, 16)).round())
    if isinstance(axes, plt.Axes):
        place = {"cax": axes.inset_axes([1.025, 0, 0.02, 1])}
    else:
        place = {"ax": axes, "shrink": 0.6, "aspect": 30, "pad": 0.01}
    bar = figure.colorbar(ScalarMappable(norm, colors), ticks=ticks, label=label, **place)
    bar.ax.set_yticklabels([f"{tick:.0f}" for tick in ticks])
    bar.ax.minorticks_off()


def side_by_side(tokens: Tokens, config: PreTrainedConfig) -> np.ndarray:
    """The image, and beside it the depths of its patches: 8-bit RGB, enlarged by an integer, without interpolation."""
    colors, norm = depth_scale(config.num_hidden_layers, discrete=True)
    height, width = tokens.pixels.shape[:2]
    patch_height, patch_width = as_pair(config.patch_size)
    patches = colors(norm(tokens.depth), bytes=True)[..., :3]
    patches = patches.repeat(patch_height, axis=0).repeat(patch_width, axis=1)
    right = np.full((height, width, 3), 255, dtype=np.uint8)
    right[: patches.shape[0], : patches.shape[1]] = patches
    factor = -(-ENLARGED_SIZE // max(height, width))
    left, right = (
        np.broadcast_to(half, (height, width, 3)).repeat(factor, axis=0).repeat(factor, axis=1)
        for half in (tokens.pixels, right)
    )
    gap = np.full((left.shape[0], left.shape[1] // 30, 3), 255, dtype=np.uint8)
    return np.concatenate([left, gap, right], axis=1)


def describe(tokens: Tokens, width: int) -> str:
    """Title of an image's picture, in lines of at most `width` characters."""
    lines = (tokens.name, f"predicted: {tokens.label}", f"mean depth {tokens.depth.mean():.2f}")
    return "\n".join(line if len(line) <= width else f"{line[: width - 1]}…" for line in lines)


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)


def draw_image(tokens: Tokens, config: PreTrainedConfig, path: Path) -> None:
    """One image beside its depths."""
    picture = side_by_side(tokens, config)
    height = 9.0 * picture.shape[0] / picture.shape[1]  # inches
    figure, axis = plt.subplots(figsize=(10.0, height + 0.8), layout="constrained")
    axis.imshow(picture)
    axis.set_title(describe(tokens, 90), fontsize=11, parse_math=False)
    axis.set_axis_off()
    add_legend(figure, axis, config.num_hidden_layers, discrete=True, label=LEGEND)
    save(figure, path)


def draw_sheet(shown: list[Tokens], config: PreTrainedConfig, path: Path) -> None:
    """Many images beside their depths, under one legend."""
    pictures = [side_by_side(tokens, config) for tokens in shown]
    columns = min(len(shown), SHEET_COLUMNS)
    rows = -(-len(shown) // columns)
    height = 3.8 * pictures[0].shape[0] / pictures[0].shape[1] + 0.75  # inches
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.9 * columns + 0.9, height * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, tokens, picture in zip(axes.flat, shown, pictures):
        axis.imshow(picture)
        axis.set_title(describe(tokens, 44), fontsize=9, parse_math=False)
    add_legend(figure, axes, config.num_hidden_layers, discrete=True, label=LEGEND)
    save(figure, path)


def draw_mean_depth(mean_depth: np.ndarray, num_images: int, config: PreTrainedConfig, path: Path) -> None:
    """The mean depth of each patch position, with numbers where they have room."""
    rows, columns = mean_depth.shape
    patch_height, patch_width = as_pair(config.patch_size)
    height = 7.3 * (rows * patch_height) / (columns * patch_width)  # inches
    colors, norm = depth_scale(config.num_hidden_layers, discrete=False)
    figure, axis = plt.subplots(figsize=(8.4, height + 0.4), layout="constrained")
    axis.imshow(mean_depth, cmap=colors, norm=norm, aspect=patch_height / patch_width)
    if max(rows, columns) <= NUMBERED_GRID:
        for (row, column), value in np.ndenumerate(mean_depth):
            color = "black" if norm(value) > 0.6 else "white"
            axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=9, color=color)
    axis.set(xticks=[], yticks=[], title=f"Mean depth at each patch position, over {count(num_images, 'image')}")
    add_legend(figure, axis, config.num_hidden_layers, discrete=False, label="mean number of layers")
    save(figure, path)


def draw_halting_scores(scores: list[np.ndarray], path: Path) -> None:
    """One box per layer, with the share of tokens that are active in it."""
    figure, axis = plt.subplots(figsize=(max(7.0, 1.5 + 0.7 * len(scores)), 5.0), layout="constrained")
    axis.boxplot(
        scores,
        whis=(1, 99),
        showfliers=False,
        showmeans=True,
        widths=0.6,
        patch_artist=True,
        boxprops={"facecolor": "#cfe0f0"},
        medianprops={"color": "black"},
        meanprops={"marker": "D", "markersize": 5, "markerfacecolor": "tab:orange", "markeredgecolor": "tab:orange"},
    )
    active = [len(layer) / len(scores[0]) for layer in scores]
    axis.set_xticks(range(1, len(scores) + 1), [f"{layer}\n{share:.0%}" for layer, share in enumerate(active, 1)])
    axis.set(xlabel="layer, and share of tokens that are active in it", ylabel="halting score", ylim=(-0.03, 1.03))
    axis.set_title(
        "Halting scores of active tokens\nbox: quartiles; line: median; diamond: mean; whiskers: percentiles 1 and 99",
        fontsize=11,
    )
    axis.grid(axis="y", alpha=0.3)
    save(figure, path)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def main() -> None:
    parser = LineParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of an A-ViT, or of a model that prunes tokens")
    parser.add_argument(
        "--dataset", required=True, help="folder of images, Parquet file or folder of them, or Hub id of a data set"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/tokens"), help="the pictures")
    parser.add_argument("--limit", type=positive, default=16, help="images to look at")
    parser.add_argument("--pictures", type=positive, default=16, help="of which get a picture")
    parser.add_argument("--split", help="of a data set (default: test or validation if there is one, else the first)")
    parser.add_argument("--halting-epsilon", type=float, help="instead of the A-ViT's; a greater one halts earlier")
    parser.add_argument("--keep-rate", type=float, help="instead of the model's `pruning_keep_rate`")
    parser.add_argument("--batch-size", type=positive, default=32, help="images in a forward pass")
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    with user_errors(parser, arguments.debug):
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    model, processor = load_model(arguments.model)
    read = reader_for(model.config, arguments.halting_epsilon, arguments.keep_rate)
    source = ImageSource(arguments.dataset, arguments.split)
    results, scores = analyse(
        model,
        processor,
        islice(source, arguments.limit),
        read,
        arguments.batch_size,
        arguments.pictures,
    )
    if not results:
        raise ValueError(f"There are no readable images in {arguments.dataset} ({source.skipped} unreadable).")

    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    shown = results[: arguments.pictures]
    for index, tokens in enumerate(shown):
        stem = re.sub(r"\W+", "-", Path(tokens.name).stem)[:60]
        draw_image(tokens, model.config, arguments.output_dir / f"tokens_{index:03d}_{stem}.png")
    draw_sheet(shown[:SHEET_IMAGES], model.config, arguments.output_dir / "tokens.png")
    depths = np.stack([tokens.depth for tokens in results])
    draw_mean_depth(depths.mean(axis=0), len(results), model.config, arguments.output_dir / "mean_depth.png")
    drawn = ["tokens.png", "mean_depth.png"]
    if scores:
        drawn.append("halting_scores.png")
        draw_halting_scores(scores, arguments.output_dir / "halting_scores.png")

    by_image = depths.mean(axis=(1, 2))
    low, high = by_image.argmin(), by_image.argmax()
    print(f"{count(len(results), 'image')}, {source.skipped} unreadable and skipped")
    print(f"mean depth of the patches: {by_image.mean():.2f} of {model.config.num_hidden_layers} layers")
    print(f"from {by_image[low]:.2f} ({results[low].name}) to {by_image[high]:.2f} ({results[high].name})")
    print(f"pictures: {arguments.output_dir} (start with {', '.join(drawn)})")


if __name__ == "__main__":
    main()
