"""
Export a model to ONNX, and compare its predictions under onnxruntime with the PyTorch model's:

    python examples/export_onnx.py --model examples/checkpoints/thinkingvit-cifar10 --images examples/images

`adaptive.onnx` takes one image and runs the stages until it exits; `stage_0.onnx` and so on hold one stage each, for
batches of any size. Needs the extra `onnx`.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image
from transformers import AutoModelForImageClassification

from hf_thinkingvit.auto import AutoImageProcessor
from hf_thinkingvit.inference import export_onnx
from hf_thinkingvit.models.exit_rules import ExitRule
from hf_thinkingvit.models.image_files import read_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--images", type=Path, required=True, help="folder of images to classify")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/onnx"))
    parser.add_argument("--threshold", type=float, nargs="+", help="τ for these images, one or one per exit")
    arguments = parser.parse_args()
    model = AutoModelForImageClassification.from_pretrained(arguments.model, dtype=torch.float32).eval()
    threshold = arguments.threshold
    threshold = threshold[0] if threshold and len(threshold) == 1 else threshold
    try:  # before the export, which is slow
        thresholds = ExitRule.from_config(model.config, threshold).thresholds
    except ValueError as error:
        parser.error(str(error))
    processor = AutoImageProcessor.from_pretrained(arguments.model)
    suffixes = Image.registered_extensions()
    paths = sorted(path for path in arguments.images.iterdir() if path.suffix.lower() in suffixes)
    if not paths:
        parser.error(f"no images in {arguments.images}")

    files = export_onnx(model, arguments.output_dir)
    for path in (files.adaptive, *files.stages):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")

    session = onnxruntime.InferenceSession(files.adaptive)
    print("\nimage | label | exit stage | entropy | ms | the model's")
    for path in paths:
        pixel_values = processor(read_image(path), return_tensors="pt")["pixel_values"]
        started = time.perf_counter()
        feed = {"pixel_values": pixel_values.numpy(), "threshold": np.array(thresholds, dtype=np.float32)}
        logits, exit_stage, entropy = session.run(None, feed)
        milliseconds = 1e3 * (time.perf_counter() - started)
        with torch.no_grad():
            expected = model(pixel_values, threshold=list(thresholds))
        label, theirs = (model.config.id2label[int(answer[0].argmax())] for answer in (logits, expected.logits))
        print(
            f"{path.name} | {label} | {exit_stage[0]} | {entropy[0]:.4f} | {milliseconds:.1f} | "
            f"{theirs}, {expected.exit_stage[0]}, {expected.entropy[0]:.4f}"
        )


if __name__ == "__main__":
    main()
