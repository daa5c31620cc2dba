"""Exports a model to ONNX or for a runtime, and compares it with what was exported. Options: `options.py`."""

import argparse
import time
from pathlib import Path

import torch

from ..evaluation import compare_precisions
from ..inference import export_model, export_onnx, from_exported
from ..inference.runtimes import RUNTIMES
from ..models.exit_rules import ExitRule
from ..models.image_files import read_image
from . import command
from .loading import load_model, start


def run(arguments: argparse.Namespace) -> None:
    model, processor = load_model(arguments.model, dtype=torch.float32)
    # Before the export, which is slow.
    thresholds = ExitRule.from_config(model.config, command.one_or_list(arguments.threshold)).thresholds
    paths = [] if arguments.dataset is None else command.find_images_or_fail(arguments.dataset)
    if arguments.precision and not arguments.runtime:
        raise ValueError("`--precision` is of the folder for a runtime: choose a `--runtime`.")
    if arguments.precision == "int8" and len(paths) < 2:
        raise ValueError("int8 is calibrated on images: give at least two, by `--dataset`; a few hundred are better.")
    start(model, images=len(paths) or None, saved_to=arguments.output_dir)
    if arguments.runtime:
        export_for_runtime(model, processor, arguments, paths, thresholds)
        return
    files = export_onnx(model, arguments.output_dir)
    for path in (files.adaptive, *files.stages):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    if paths:
        compare(model, processor, files.adaptive, paths, thresholds)
    command.say(next=f'python -c "import onnxruntime; onnxruntime.InferenceSession({str(files.adaptive)!r})"')


def export_for_runtime(
    model, processor, arguments: argparse.Namespace, paths: list[Path], thresholds: tuple[float, ...]
) -> None:
    """Write the folder, and print what its answers to the images are beside the model's."""
    precision = arguments.precision or "fp32"
    images = [processor(read_image(path), return_tensors="pt")["pixel_values"] for path in paths]
    calibration, compared = (images[::2], images[1::2]) if precision == "int8" else (None, images)
    folder = export_model(
        model,
        arguments.output_dir,
        RUNTIMES[arguments.runtime].file_format,
        precision=precision,
        processor=processor,
        calibration=None if calibration is None else torch.cat(calibration),
    )
    if compared:
        model.config.threshold = list(thresholds)
        batches = [{"pixel_values": image} for image in compared]
        print(f"\n{compare_precisions(model, from_exported(folder), batches).table()}\n")
    name = repr(str(folder))
    command.say(next=f'python -c "from hf_thinkingvit.inference import from_exported; print(from_exported({name}))"')


@torch.no_grad()
def compare(model, processor, program: Path, paths: list[Path], thresholds: tuple[float, ...]) -> None:
    """Print the predictions of the exported program for each image, beside the model's."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(program)
    print("\nimage | label | exit stage | entropy | ms | the model's")
    for path in paths:
        try:
            image = read_image(path)
        except Exception as error:  # decoders raise many types
            print(f"{path.name} | cannot be read: {error}")
            continue
        pixel_values = processor(image, return_tensors="pt")["pixel_values"]
        started = time.perf_counter()
        feed = {"pixel_values": pixel_values.numpy(), "threshold": np.array(thresholds, dtype=np.float32)}
        logits, exit_stage, entropy = session.run(None, feed)
        milliseconds = 1e3 * (time.perf_counter() - started)
        expected = model(pixel_values, threshold=list(thresholds))
        label, theirs = (model.config.id2label[int(answer[0].argmax())] for answer in (logits, expected.logits))
        print(
            f"{path.name} | {label} | {exit_stage[0]} | {entropy[0]:.4f} | {milliseconds:.1f} | "
            f"{theirs}, {expected.exit_stage[0]}, {expected.entropy[0]:.4f}"
        )


def main(words: list[str] | None = None, prog: str | None = None) -> None:
    command.run_command("export", words, prog)


if __name__ == "__main__":
    main()
