"""
What int8 costs in accuracy: a trained classifier in float32 and in int8, on the same test images.

    python -m benchmarks.int8 --model examples/checkpoints/thinkingvit-cifar10 --dataset uoft-cs/cifar10
    python -m benchmarks.int8 --model examples/checkpoints/avit-cifar10 --dataset uoft-cs/cifar10 --ways torchao

Ways are exports for OpenVINO (quantised by NNCF) and ONNX Runtime (by its own tool), and torchao's weight-only int8 of
the PyTorch model. Images of the training split calibrate the ranges of activations, others of it move τ so that as many
images exit at each stage as before; accuracy is of the test split. A model that does not think in stages is not
exported; of it, the answers are compared. Goal: top-1 within 0.5 points, at every stage and at the exits.
"""

import argparse
import copy
import tempfile
from collections.abc import Iterable

import torch
from accelerate import Accelerator

from benchmarks.measure import describe_run
from hf_thinkingvit.commands.loading import load_model
from hf_thinkingvit.data import as_image_split, evaluation_batches, find_split, load_splits
from hf_thinkingvit.evaluation import compare_precisions, evaluate_accuracy
from hf_thinkingvit.inference import export_model, from_exported
from hf_thinkingvit.inference.runtimes import RUNTIMES
from hf_thinkingvit.models.configuration_staged import thinks_in_stages


WAYS = (*RUNTIMES, "torchao")
GOAL = 0.5  # points


def in_int8(model, way: str, processor, calibration: torch.Tensor, folder: str, threads: int):
    """The model in int8, in PyTorch or from a folder."""
    if way == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantised = copy.deepcopy(model)
        quantize_(quantised, Int8WeightOnlyConfig())
        return quantised
    file_format = RUNTIMES[way].file_format
    export_model(model, folder, file_format, precision="int8", calibration=calibration, processor=processor)
    return from_exported(folder, threads=threads)


def goal(losses: Iterable[float]) -> str:
    """The greatest loss of accuracy, in points, beside the goal."""
    greatest = max(losses)
    return (
        f"Greatest loss {greatest:+.2f} points (goal: at most {GOAL}): {'reached' if greatest <= GOAL else 'missed'}."
    )


@torch.no_grad()
def compare(model, quantised, moving: Iterable[dict], test: Iterable[dict]) -> None:
    """Print the answers of both to the test images, and what is lost."""
    if not thinks_in_stages(model):
        found = evaluate_accuracy(Accelerator(cpu=True), {"float32": model, "int8": quantised}, test)
        first, second = (found[name]["top1"] for name in ("float32", "int8"))
        print(f"Top-1: {first[-1]:.2f} % → {second[-1]:.2f} %, of {found['int8']['images']} images.")
        print(goal([first[-1] - second[-1]]), flush=True)
        return
    new_threshold = compare_precisions(model, quantised, moving).new_threshold
    report = compare_precisions(model, quantised, test, new_threshold=new_threshold)
    print(report.table())
    before, _, after = report.accepted_top1
    losses = [100 * (one - other) for one, other in (*zip(*report.top1), (before, after))]
    print(goal(losses), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a classifier")
    parser.add_argument("--dataset", required=True, help="with the splits train and test, and the model's labels")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--calibration-images", type=int, default=300, help="for the ranges of activations")
    parser.add_argument("--threshold-images", type=int, default=2000, help="to move τ on")
    parser.add_argument("--test-images", type=int, help="of the test split; by default all")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, processor = load_model(arguments.model, dtype=torch.float32)
    splits = load_splits(arguments.dataset)
    train, test = (
        as_image_split(find_split(splits, name, arguments.dataset), arguments.dataset) for name in ("train", "test")
    )
    if test.label_names != [model.config.id2label[place] for place in range(model.config.num_labels)]:
        raise ValueError(f"{arguments.dataset!r} has other labels than the model, or another order.")
    wanted = arguments.calibration_images + arguments.threshold_images
    images = [batch["pixel_values"] for batch in evaluation_batches(train.sample(wanted), processor, 100)]
    images = torch.cat(images)[torch.randperm(wanted, generator=torch.Generator().manual_seed(0))]
    calibration, moving = images.split([arguments.calibration_images, arguments.threshold_images])
    moving = [{"pixel_values": part} for part in moving.split(arguments.batch_size)]
    test = list(evaluation_batches(test.sample(arguments.test_images), processor, arguments.batch_size))
    print(f"{arguments.model}, {describe_run(torch.device('cpu'), 'float32 and int8')}", flush=True)
    for way in arguments.ways:
        if way in RUNTIMES and not thinks_in_stages(model):
            print(f"{way}: {type(model).__name__} does not think in stages, and is not exported.")
            continue
        print(f"\n{way}\n", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            compare(model, in_int8(model, way, processor, calibration, folder, arguments.threads), moving, test)


if __name__ == "__main__":
    main()
