"""
One picture of a segmentation model on images of a data set: the image, its true classes, what the first stage answers,
what is accepted at τ, and at which stage (from 1) and with which entropy each window left:

    python -m benchmarks.segmentation_pictures --model MODEL --dataset FOLDER --split test --rows 0 60 120 180 \
        --threshold 0.8 --short-side 120 --output docs/camvid.png

Masks are of class indices; 255 is drawn in black.
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from transformers import AutoModelForSemanticSegmentation

from hf_thinkingvit.auto import AutoImageProcessor
from hf_thinkingvit.commands.segment import label_map, palette, window_picture
from hf_thinkingvit.data import find_split, load_splits
from hf_thinkingvit.inference import SlidingWindowSegmenter, scaled_views


matplotlib.use("Agg")
from matplotlib import pyplot as plt


def true_classes(mask: Image.Image) -> Image.Image:
    """A mask of class indices in the colours of `label_map`, pixels that do not count in black."""
    indices = Image.frombytes("P", mask.size, mask.tobytes())
    indices.putpalette([*palette()[: 3 * 255], 0, 0, 0])
    return indices.convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a segmentation model")
    parser.add_argument("--dataset", required=True, help="with columns image and annotation")
    parser.add_argument("--split", default="test")
    parser.add_argument("--rows", type=int, nargs="+", default=[0, 60, 120, 180], help="of the split")
    parser.add_argument("--threshold", type=float, nargs="+", help="τ; by default the model's")
    parser.add_argument("--short-side", type=int, help="pixels; by default a window")
    parser.add_argument("--output", type=Path, default=Path("outputs/segmentation.png"))
    arguments = parser.parse_args()

    model = AutoModelForSemanticSegmentation.from_pretrained(arguments.model)
    processor = AutoImageProcessor.from_pretrained(arguments.model)
    split = find_split(load_splits(arguments.dataset), arguments.split, arguments.dataset)
    rows = [split[index] for index in arguments.rows]
    ways = {
        "stage 1 alone": SlidingWindowSegmenter(model, max_stages=1),
        "accepted": SlidingWindowSegmenter(model, threshold=arguments.threshold),
    }
    short_side = arguments.short_side or ways["accepted"].window_size
    titles = ["image", "truth", *ways, "where windows leave"]
    figure, axes = plt.subplots(
        len(rows), len(titles), figsize=(3.2 * len(titles), 2.5 * len(rows)), squeeze=False, layout="constrained"
    )
    for number, (line, row) in enumerate(zip(axes, rows)):
        image = row["image"].convert("RGB")
        pixel_values = processor(image, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"][0]
        pictures = [image, true_classes(row["annotation"])]
        for segmenter in ways.values():
            (result,) = segmenter([scaled_views(pixel_values, short_side)])
            pictures.append(label_map(result).convert("RGB"))
        pictures.append(window_picture(image, result, segmenter.window_size))
        for axis, title, picture in zip(line, titles, pictures):
            axis.imshow(picture)
            axis.set_title("" if number else title, fontsize=11)
            axis.axis("off")
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    colours = torch.tensor(palette()).view(256, 3) / 255
    patches = [matplotlib.patches.Patch(color=colours[index].tolist(), label=name) for index, name in enumerate(names)]
    if len(patches) <= 40:
        figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 11), frameon=False)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=90)
    print(arguments.output)


if __name__ == "__main__":
    main()
