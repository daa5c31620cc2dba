"""Segments the images of a folder. `options.py` has its options and description."""

import argparse
import colorsys
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import PreTrainedModel

from ..evaluation import calibration_status
from ..families.record import IMAGE_SEGMENTATION
from ..inference import ImageViews, SlidingResult, SlidingWindowSegmenter, scaled_views
from ..models.image_files import read_image
from ..windows import WindowPlan
from . import command
from .evaluation import sides_of
from .loading import best_device, load_model, start


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


def _size(plan: WindowPlan) -> str:
    if plan.short_side is None:
        return "as they are"
    return f"shorter side {plan.short_side}" + (f", longer at most {plan.long_side}" if plan.long_side else "")


def _calibration(arguments: argparse.Namespace, model: PreTrainedModel, plan: WindowPlan) -> str | None:
    """Whether the calibration of the model's τ holds for these windows; `None` if it has none, or another τ is used."""
    calibration = getattr(model.config, "calibration", None)
    if not calibration or arguments.threshold is not None:
        return None
    preprocessing = plan.facts() | {"scales": arguments.scales, "flip": arguments.flip}
    if arguments.scales == [1.0] and not arguments.flip:
        preprocessing = plan.facts()
    return str(calibration_status(model, calibration, preprocessing))


def run(arguments: argparse.Namespace) -> None:
    output_dir = arguments.output_dir.resolve()
    files = command.find_images_or_fail(arguments.dataset)
    files = [path for path in files if output_dir not in path.resolve().parents]  # not what an earlier run has drawn
    if not files:
        raise FileNotFoundError(f"All images in `{arguments.dataset}` (--dataset) are in the output folder.")
    model, processor = load_model(arguments.model, IMAGE_SEGMENTATION)
    model.to(best_device())
    if model.config.num_labels > 256:
        raise ValueError(f"A palette PNG holds 256 classes, the model has {model.config.num_labels}.")
    segmenter = SlidingWindowSegmenter(
        model,
        window_size=arguments.window,
        stride=arguments.stride,
        batch_size=arguments.batch_size,
        threshold=command.one_or_list(arguments.threshold),
        progress=True,
    )
    short_side, long_side = sides_of(arguments, model.config)
    plan = WindowPlan((segmenter.window_size,) * 2, short_side, long_side, (segmenter.stride,) * 2)
    start(
        model,
        images=f"{len(files)} in {arguments.dataset}, {_size(plan)}, windows {segmenter.window_size}",
        calibration=_calibration(arguments, model, plan),
        saved_to=arguments.output_dir,
    )
    read: deque[tuple[Path, Image.Image]] = deque()  # the images whose windows run
    skipped = 0

    def views() -> Iterator[ImageViews]:
        nonlocal skipped
        for path in files:
            try:
                image = read_image(path).convert("RGB")
            except Exception as error:  # decoders raise many types
                print(f"skipped {path}: {error}", file=sys.stderr)
                skipped += 1
                continue
            pixel_values = processor(image, do_resize=False, return_tensors="pt")["pixel_values"][0]
            read.append((path, image))
            yield scaled_views(pixel_values, short_side, arguments.scales, arguments.flip, long_side)

    for result in segmenter(views()):
        path, image = read.popleft()
        name = arguments.output_dir / path.relative_to(arguments.dataset)
        name.parent.mkdir(parents=True, exist_ok=True)
        labels = label_map(result)
        labels.save(f"{name}.labels.png")
        Image.blend(image, labels.convert("RGB"), 0.5).save(f"{name}.overlay.png")
        window_picture(image, result, segmenter.window_size).save(f"{name}.windows.png")
    exits = segmenter.stats.exits
    print(f"windows that left at each stage: {exits}; written to {arguments.output_dir}")
    command.say(segmented=f"{len(files) - skipped} images, {skipped} could not be read")


def main(words: list[str] | None = None, prog: str | None = None) -> None:
    command.run_command("segment", words, prog)


if __name__ == "__main__":
    main()
