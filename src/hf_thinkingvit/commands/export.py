"""
Export a model, and compare its predictions with the PyTorch model's:

    hf-thinkingvit export --model MODEL --dataset FOLDER
    hf-thinkingvit export --model MODEL --dataset FOLDER --runtime openvino --precision int8

Without `--runtime`, ONNX files for programs without Python: `adaptive.onnx` takes one image and runs stages until it
exits; `stage_0.onnx` and so on hold one stage each, for batches of any size. With it, a folder that `from_exported`
loads for the engine (docs/runtimes.md); for int8, one half of the images calibrates and the other is compared. Without
`--dataset`, nothing is compared. Needs the extra `onnx` or `openvino`.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from ..evaluation import compare_precisions
from ..inference import export_model, export_onnx, from_exported
from ..inference.runtimes import RUNTIMES
from ..models.exit_rules import ExitRule
from ..models.image_files import read_image
from . import command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.add_model(parser)
    parser.add_argument("--dataset", "--images", type=Path, help="folder of images to compare the predictions on")
    command.add_output_dir(parser, "outputs/onnx", "the exported programs")
    parser.add_argument("--threshold", type=float, nargs="+", help="τ for these images, one or one per exit")
    parser.add_argument("--runtime", choices=list(RUNTIMES), help="write a folder for the engine in this runtime")
    parser.add_argument("--precision", choices=["fp32", "fp16", "int8"], help="of that folder; fp32 by default")


def run(arguments: argparse.Namespace) -> None:
    model, processor = command.load_model(arguments.model, dtype=torch.float32)
    # Before the export, which is slow.
    thresholds = ExitRule.from_config(model.config, command.one_or_list(arguments.threshold)).thresholds
    paths = [] if arguments.dataset is None else command.find_images_or_fail(arguments.dataset)
    if arguments.precision and not arguments.runtime:
        raise ValueError("`--precision` is of the folder for a runtime: choose a `--runtime`.")
    if arguments.precision == "int8" and len(paths) < 2:
        raise ValueError("int8 is calibrated on images: give at least two, by `--dataset`; a few hundred are better.")
    command.start(model, images=len(paths) or None, saved_to=arguments.output_dir)
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
        pixel_values = processor(read_image(path), return_tensors="pt")["pixel_values"]
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
    command.run_command(sys.modules[__name__], words, prog)


if __name__ == "__main__":
    main()
