"""
Segment the images of a folder in sliding windows, each of which leaves at its own stage:

    python examples/segment_images.py --model MODEL --images FOLDER --output outputs/segmented --threshold 0.5

For each image `NAME` of the folder, three files are written: `NAME.labels.png`, a palette PNG whose values are class
indices, at the size of the image; `NAME.overlay.png`, the image with its classes in colour; and `NAME.windows.png`, the
exit stage (from 1) and the entropy of each window. `--scales` and `--flip` average several views, as the papers'
multi-scale evaluation does; the windows shown are those of the first view. Unreadable images are reported and skipped.
"""

import argparse
import colorsys
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForSemanticSegmentation

from hf_thinkingvit.auto import AutoImageProcessor
from hf_thinkingvit.inference import ImageViews, SlidingResult, SlidingWindowSegmenter, scaled_views
from hf_thinkingvit.models.image_files import read_image


def palette() -> list[int]:
    """256 colours as Pillow wants them; the hues of neighbouring classes are far apart."""
    golden = 0.618034
    colours = [colorsys.hsv_to_rgb(index * golden % 1.0, 0.65, 1.0 - 0.15 * (index % 4)) for index in range(256)]
    return [round(255 * channel) for colour in colours for channel in colour]


def label_map(result: SlidingResult) -> Image.Image:
    """The class indices as a palette image."""
    indices = Image.fromarray(result.labels.to(torch.uint8).numpy())
    indices.putpalette(palette())
    return indices


def window_picture(image: Image.Image, result: SlidingResult, window_size: int) -> Image.Image:
    """The windows of the first view, in a colour for each exit stage, with the stage (from 1) and the entropy."""
    windows = [window for window in result.windows if window.view == 0]
    # The last windows end at the borders of the view.
    scale_x = image.width / (max(window.left for window in windows) + window_size)
    scale_y = image.height / (max(window.top for window in windows) + window_size)
    picture = image.convert("RGB")
    draw = ImageDraw.Draw(picture, "RGBA")
    colours = palette()
    corners = [(window.left * scale_x, window.top * scale_y) for window in windows]
    for window, (left, top) in zip(windows, corners):
        colour = tuple(colours[3 * window.exit_stage : 3 * window.exit_stage + 3])
        right, bottom = left + window_size * scale_x - 1, top + window_size * scale_y - 1
        draw.rectangle((left, top, right, bottom), fill=(*colour, 60), outline=(*colour, 255), width=2)
    for window, (left, top) in zip(windows, corners):  # last, since windows overlap
        draw.text((left + 4, top + 4), f"{window.exit_stage + 1}: {window.entropy:.2f}", fill=(255, 255, 255, 255))
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a segmentation model")
    parser.add_argument("--images", required=True, type=Path, help="folder, searched with its subfolders")
    parser.add_argument("--output", type=Path, default=Path("outputs/segmented"))
    parser.add_argument("--threshold", type=float, nargs="+", help="τ, one or one per exit")
    parser.add_argument("--short-side", type=int, help="pixels of the shorter side at scale 1; by default a window")
    parser.add_argument("--window", type=int, help="pixels; by default the model's image size")
    parser.add_argument("--stride", type=int, help="pixels; by default 32 less than a window")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0])
    parser.add_argument("--flip", action="store_true", help="average with the mirror images")
    parser.add_argument("--batch-size", type=int, default=16, help="windows")
    arguments = parser.parse_args()

    suffixes = Image.registered_extensions()
    files = sorted(path for path in arguments.images.rglob("*") if path.suffix.lower() in suffixes)
    if not files:
        parser.exit(1, f"error: no images in {arguments.images}\n")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = AutoModelForSemanticSegmentation.from_pretrained(arguments.model).to(device)
    if model.config.num_labels > 256:
        parser.exit(1, f"error: a palette PNG holds 256 classes, the model has {model.config.num_labels}\n")
    processor = AutoImageProcessor.from_pretrained(arguments.model)
    threshold = arguments.threshold
    threshold = threshold[0] if threshold and len(threshold) == 1 else threshold
    try:
        segmenter = SlidingWindowSegmenter(
            model,
            window_size=arguments.window,
            stride=arguments.stride,
            batch_size=arguments.batch_size,
            threshold=threshold,
            progress=True,
        )
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    short_side = arguments.short_side or segmenter.window_size
    read: deque[tuple[Path, Image.Image]] = deque()  # the images whose windows run

    def views() -> Iterator[ImageViews]:
        for path in files:
            try:
                image = read_image(path).convert("RGB")
            except Exception as error:  # decoders raise many types
                print(f"skipped {path}: {error}", file=sys.stderr)
                continue
            pixel_values = processor(image, do_resize=False, return_tensors="pt")["pixel_values"][0]
            read.append((path, image))
            yield scaled_views(pixel_values, short_side, arguments.scales, arguments.flip)

    for result in segmenter(views()):
        path, image = read.popleft()
        name = arguments.output / path.relative_to(arguments.images)
        name.parent.mkdir(parents=True, exist_ok=True)
        labels = label_map(result)
        labels.save(f"{name}.labels.png")
        Image.blend(image, labels.convert("RGB"), 0.5).save(f"{name}.overlay.png")
        window_picture(image, result, segmenter.window_size).save(f"{name}.windows.png")
    exits = segmenter.stats.exits
    print(f"windows that left at each stage: {exits}; written to {arguments.output}")


if __name__ == "__main__":
    main()
