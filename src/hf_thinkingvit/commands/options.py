"""
The options of the commands that take no fields of a training run, and what they say of themselves.

Nothing here imports torch or Transformers, which takes seconds, so that a wrong word is refused at once.
"""

import argparse
from pathlib import Path
from typing import Any


DTYPES = ("float32", "float16", "bfloat16")  # the first by default
CHECKED = 0.5  # share of the images to check a calibration on
DELTA = 0.05  # probability with which a promise may fail
MASK_VALUES = {"--mask-values": [], "--ignored-mask-values": ["255"]}  # defaults


def add_model(
    parser: argparse._ActionsContainer, help: str = "folder or Hub id, or the file of an official checkpoint"
) -> None:
    parser.add_argument("--model", required=True, help=help)


def add_dataset(parser: argparse._ActionsContainer, help: str | None = None, *others: str) -> None:
    text = "Hub id, folder of images (one folder a label) or Parquet files, Parquet file"
    parser.add_argument("--dataset", *others, required=True, help=help or text)


def add_output_dir(parser: argparse._ActionsContainer, default: str, help: str) -> None:
    parser.add_argument("--output-dir", type=Path, default=Path(default), help=help)


def positive(word: str) -> int:
    """The type of an option that is an integer of at least 1."""
    try:
        number = int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {word!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {word}")
    return number


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """The options of commands that evaluate a model on labelled images."""
    images = parser.add_argument_group("images")
    add_dataset(images)
    images.add_argument(
        "--split", help="by default validation, else test; first what is new to the model. Slices as test[:50%%] work"
    )
    images.add_argument(
        "--label-map", type=_label_map, help="JSON file from the dataset's labels to the model's, or \"index\""
    )
    images.add_argument("--max-samples", type=positive, help="use this many random images; of a stream, the first ones")
    images.add_argument(
        "--batch-size",
        type=positive,
        help="images in a forward pass, by default 64; windows of a segmentation model, by default 16",
    )
    images.add_argument("--num-workers", type=int, default=0, help="processes that read images")
    masks = parser.add_argument_group("masks, of a segmentation model")
    for flag, help in (
        ("--mask-values", "of each class in the masks, such as 1-150"),
        ("--ignored-mask-values", "of pixels that do not count"),
    ):
        masks.add_argument(flag, nargs="+", default=MASK_VALUES[flag], help=help)
    add_sides(masks)


def add_sides(parser: argparse._ActionsContainer) -> None:
    """Options of the size of images, whose default is the same in every command: see `sides_of`."""
    parser.add_argument(
        "--short-side",
        type=int,
        help="pixels of the shorter side, 0 for images as they are; by default (with the longer side) as the model was "
        "calibrated, or else trained, if that is recorded, else images as they are",
    )
    parser.add_argument("--long-side", type=positive, help="the most pixels of the longer side")


def _label_map(text: str) -> Any:
    from ..evaluation import label_map_argument  # where the option is given

    return label_map_argument(text)


def _heads(word: str) -> list[int]:
    return [int(heads) for heads in word.split(",")]


CONVERT = """
Convert an official checkpoint to a folder that from_pretrained and pipeline load:

    hf-thinkingvit convert NCPS/thinkingvit_deit-3h-6h-imagenet1k outputs/thinkingvit-3-6
"""


def convert(parser: argparse.ArgumentParser) -> None:
    parser.description = CONVERT
    parser.add_argument("source", help="folder or Hub id in the timm-style layout, or a .pth / .pth.tar file")
    parser.add_argument("output_dir", help="folder to write")
    parser.add_argument("--threshold", type=float, nargs="+", metavar="τ", help="τ to store: one, or one per exit")
    unstated = parser.add_argument_group("what the source does not state")
    unstated.add_argument("--thinking-stages", type=int, nargs="+", metavar="HEADS", help="heads per stage")
    unstated.add_argument(
        "--head-rounds",
        type=_heads,
        nargs="+",
        metavar="HEADS,HEADS,...",
        help="of a Swin, heads per layer for each round: 3,3,6,12 3,6,12,24",
    )
    unstated.add_argument("--gate-scale", type=float, metavar="γ", help="of an A-ViT")
    unstated.add_argument("--gate-center", type=float, metavar="β", help="of an A-ViT")
    unstated.add_argument(
        "--pruning-layers",
        type=int,
        nargs="+",
        metavar="LAYER",
        help="of a model that prunes tokens, the layers before which it does",
    )
    unstated.add_argument(
        "--pruning-keep-rate", type=float, metavar="ρ", help="of a model that prunes tokens, the share that it keeps"
    )


SWEEP = """
Accuracy and cost of a model at every τ, from one pass over the images:

    hf-thinkingvit sweep --model MODEL --dataset uoft-cs/cifar10

prints a table, and writes `results.json` (which `push` takes) and plots as PNG and SVG. Without `--thresholds`, τ lies
at quantiles of the scores, where images change their exit. Needs `pip install "hf-thinkingvit[examples]"`; several GPUs
share the images under `accelerate launch`.
"""


def sweep(parser: argparse.ArgumentParser) -> None:
    parser.description = SWEEP
    add_model(parser)
    add_output_dir(parser, "outputs/sweep", "results and plots")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="to measure in")
    parser.add_argument("--thresholds", type=float, nargs="+", help="τ to measure; by default where exits change")
    parser.add_argument("--points", type=positive, default=12, help="values of τ, where none are given")
    add_evaluation(parser)
    parser.add_argument("--streaming", action="store_true", help="read the images without downloading them first")


ANALYZE = """
Look at a model's answers image by image:

    hf-thinkingvit analyze --model MODEL --dataset uoft-cs/cifar10
    hf-thinkingvit analyze --model AVIT --dataset photographs/ --classes --baseline facebook/deit-tiny-patch16-224

`--classes`: which classes gain and which lose, from the first stage to the last, or against another model
(`--baseline`), and how deep an A-ViT's tokens go. `--histograms`: the entropies of every stage's answers, right and
wrong ones apart. `--examples`: the images that leave first and those that go on longest, with their answers. Without
these flags, all three. Tables are written as CSV, pictures as PNG. Needs `pip install "hf-thinkingvit[examples]"`.
"""


def analyze(parser: argparse.ArgumentParser) -> None:
    parser.description = ANALYZE
    add_model(parser)
    add_output_dir(parser, "outputs/analysis", "tables and pictures")
    parser.add_argument("--classes", action="store_true", help="the table by class")
    parser.add_argument("--histograms", action="store_true", help="of the entropies of every stage")
    parser.add_argument(
        "--examples",
        type=positive,
        nargs="?",
        const=12,
        metavar="COUNT",
        help="how many of the easiest and of the hardest images to draw, 12 if no number is given",
    )
    parser.add_argument("--baseline", help="folder or Hub id of a classifier, also of Transformers, to compare classes")
    parser.add_argument("--threshold", type=float, nargs="+", help="τ, one or one per exit; by default the model's")
    add_evaluation(parser)


CALIBRATE = """
Choose τ for a limit on the loss of accuracy, or for a budget of compute:

    hf-thinkingvit calibrate --model MODEL --dataset uoft-cs/cifar10 --max-drop 0.01 --delta 0.05
    hf-thinkingvit calibrate --model MODEL --dataset uoft-cs/cifar10 --gmacs 0.03

A share of the images (`--check`) is held out from the calibration; accuracy and cost at τ are printed for both parts.
`--output-dir` gets the model with the new τ, in the dtype in which it was measured, and `calibration.json`.

A classifier loses an image that the last stage gets right and its exit wrong; a segmentation model loses shares of an
image's pixels so. The limit is statistical: it holds only with images that were used neither to train the model nor to
select its best epoch.
"""


def calibrate(parser: argparse.ArgumentParser) -> None:
    parser.description = CALIBRATE
    add_model(parser)
    add_output_dir(parser, "outputs/calibrated", "the model with the new τ")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="to measure in")
    goals = parser.add_argument_group("goal, one of")
    goal = goals.add_mutually_exclusive_group(required=True)
    goal.add_argument("--max-drop", type=float, help="greatest share of answers that only the last stage gets right")
    goal.add_argument("--max-error", type=float, help="greatest share of wrong answers, a fraction")
    goal.add_argument("--gmacs", type=float, help="mean multiply-accumulates per image, in 10^9")
    goal.add_argument("--milliseconds", type=float, help="mean time per image, on this device in this batch size")
    parser.add_argument("--delta", type=float, default=DELTA, help="probability that the limit on accuracy is exceeded")
    parser.add_argument("--per-exit", action="store_true", help="one τ per exit")
    add_evaluation(parser)
    parser.add_argument("--allow-training-images", action="store_true", help="also on those that chose the epoch")
    parser.add_argument("--check", type=float, default=CHECKED, help="share of the images to check on")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these images")


CLASSIFY = """
Classify many images with full batches at every stage, and write one line per image:

    hf-thinkingvit classify --model MODEL --dataset examples/images
    hf-thinkingvit classify --model MODEL --dataset uoft-cs/cifar10 --split test --format parquet

`--model` may also be a folder that `export --runtime` wrote. `--dataset` is a folder of images, searched with its
subfolders, or what `datasets` reads. The output is JSONL or Parquet; `OUTPUT.run.json` beside it records model, τ, keep
rate and source. A further run with the same output resumes, with any number of processes; with a complete output, it
classifies the images of the folder that are new or changed (by names, sizes and modification times). If model, τ, rate
or source differ, it is refused. Images that cannot be read are lines with an `error`, and further runs try them again.
`accelerate launch` splits the images among processes.
"""


def classify(parser: argparse.ArgumentParser) -> None:
    parser.description = CLASSIFY
    add_model(parser)
    add_dataset(parser, "folder of images, Hub id, Parquet file", "--images")
    parser.add_argument("--split", help="of a dataset; by default test, else validation, else train")
    parser.add_argument("--image-column", help="of a dataset; found by its type where not given")
    add_output_dir(parser, "outputs/classified", "the output and the record of the run")
    parser.add_argument("--format", choices=["jsonl", "parquet"], default="jsonl", help="of the output")
    parser.add_argument("--output", type=Path, help="file instead of OUTPUT_DIR/classified.FORMAT: .jsonl or .parquet")
    parser.add_argument("--batch-size", type=positive, default=64, help="images in a forward pass")
    parser.add_argument("--threshold", type=float, nargs="+", help="τ, one or one per exit; by default the model's")
    parser.add_argument(
        "--keep-rate", type=float, nargs="+", help="share of patches that remain, of a model that prunes tokens"
    )
    parser.add_argument("--max-stages", type=positive, help="run at most this many stages")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16", "int8"], help="of an exported folder, to compute in"
    )


SEGMENT = """
Segment the images of a folder in sliding windows, each of which leaves at its own stage:

    hf-thinkingvit segment --model MODEL --dataset FOLDER --output-dir outputs/segmented --threshold 0.5

For each image `NAME` of the folder, three files are written: `NAME.labels.png`, a palette PNG whose values are class
indices, at the size of the image; `NAME.overlay.png`, the image with its classes in colour; and `NAME.windows.png`, the
exit stage (from 1) and the entropy of each window. `--scales` and `--flip` average several views, as the papers'
multi-scale evaluation does; the windows shown are those of the first view. Unreadable images are reported and skipped.
"""


def segment(parser: argparse.ArgumentParser) -> None:
    parser.description = SEGMENT
    add_model(parser, "folder or Hub id of a segmentation model")
    parser.add_argument(
        "--dataset", "--images", required=True, type=Path, help="folder of images, searched with its subfolders"
    )
    parser.add_argument(
        "--output-dir", "--output", type=Path, default=Path("outputs/segmented"), help="three pictures per image"
    )
    parser.add_argument("--threshold", type=float, nargs="+", help="τ, one or one per exit; by default the model's")
    views = parser.add_argument_group("windows and views")
    add_sides(views)
    views.add_argument("--window", type=positive, help="pixels; by default the model's image size")
    views.add_argument("--stride", type=positive, help="pixels; by default 32 less than a window")
    views.add_argument("--scales", type=float, nargs="+", default=[1.0], help="of the views that are averaged")
    views.add_argument("--flip", action="store_true", help="average with the mirror images")
    views.add_argument("--batch-size", type=positive, default=16, help="windows in a forward pass")


EXPORT = """
Export a model to ONNX, and compare its predictions under onnxruntime with the PyTorch model's:

    hf-thinkingvit export --model MODEL --dataset FOLDER
    hf-thinkingvit export --model MODEL --dataset FOLDER --runtime openvino --precision int8

Without `--runtime`, ONNX files for programs without Python: `adaptive.onnx` takes one image and runs stages until it
exits; `stage_0.onnx` and so on hold one stage each, for batches of any size. With it, a folder that `from_exported`
loads for the engine (docs/runtimes.md); for int8, one half of the images calibrates and the other is compared. Without
`--dataset`, nothing is compared. Needs the extra `onnx` or `openvino`.
"""


def export(parser: argparse.ArgumentParser) -> None:
    parser.description = EXPORT
    add_model(parser)
    parser.add_argument("--dataset", "--images", type=Path, help="folder of images to compare the predictions on")
    add_output_dir(parser, "outputs/onnx", "the exported programs")
    parser.add_argument("--threshold", type=float, nargs="+", help="τ for these images, one or one per exit")
    parser.add_argument(
        "--runtime", choices=["openvino", "onnxruntime"], help="write a folder for the engine in this runtime"
    )
    parser.add_argument("--precision", choices=["fp32", "fp16", "int8"], help="of that folder; fp32 by default")


PUSH = """
Publish a trained model: weights, image processor, code and a model card with the measured results.

    hf-thinkingvit push --model MODEL --repo-id org/name --results results.json --dry-run FOLDER
    hf-thinkingvit push --model MODEL --repo-id org/name --results results.json --license mit

The first command writes everything to a folder for inspection. The second needs `hf auth login` and makes one commit.
With `--space`, a demo of the model is published as well, as a Space (in `space` of the folder, with `--dry-run`).
`hf_thinkingvit.hub.results` describes the results file.
"""


def push(parser: argparse.ArgumentParser) -> None:
    parser.description = PUSH
    add_model(parser, "folder or Hub id of the model and its image processor")
    parser.add_argument("--repo-id", required=True, help="organization/name of the repository; created if needed")
    parser.add_argument(
        "--results", type=Path, help="JSON file of what was measured; without it the card has no figures"
    )
    parser.add_argument("--license", help="of the weights, such as apache-2.0")
    parser.add_argument("--datasets", nargs="+", help="Hub ids of what the model was trained on")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--commit-message", default="Upload model", help="of the commit")
    parser.add_argument(
        "--space",
        nargs="?",
        const=True,
        metavar="REPO_ID",
        help="also publish a demo as a Space, by default with the same organization/name as the model",
    )
    parser.add_argument("--space-images", type=Path, metavar="FOLDER", help="samples for the Space, published with it")
    parser.add_argument("--dry-run", type=Path, metavar="FOLDER", help="write everything to this folder instead")
