"""
Trains a convolutional teacher for small images, a ResNet of Transformers, for `--teacher` of `examples/train.py`:

    python -m benchmarks.teacher --output-dir outputs/teacher
    python examples/train.py --config examples/configs/thinkingvit_cifar10_distilled.yaml

Images are enlarged to twice their size, since the first two layers of a ResNet take four pixels as one. The training
images are those that `examples/train.py` trains on: what it holds out to choose an epoch by, the teacher has not seen
either. Every epoch is saved, and an interrupted run goes on at its last one. `log.csv` has a line for each epoch.
"""

import argparse
import csv
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification

from benchmarks.measure import describe_run
from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.training import TrainingConfig
from hf_thinkingvit.training.batch_augmentation import BatchAugmentation
from hf_thinkingvit.training.data import Place, load_data
from hf_thinkingvit.training.memory_images import MemoryImages, load_in_memory


MEAN, STD = [0.491, 0.482, 0.447], [0.247, 0.243, 0.262]
ENLARGED = 2  # times the size of the images


def build(width: int, depths: list[int], id2label: dict[int, str]) -> ResNetForImageClassification:
    config = ResNetConfig(
        embedding_size=width,
        hidden_sizes=[width << stage for stage in range(len(depths))],
        depths=depths,
        layer_type="basic",
        id2label=id2label,
        label2id={name: index for index, name in id2label.items()},
    )
    return ResNetForImageClassification(config)


def enlarged(pixels: torch.Tensor) -> torch.Tensor:
    """As a `Teacher` enlarges the pixels of its student."""
    size = [ENLARGED * side for side in pixels.shape[-2:]]
    larger = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    return larger.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def accuracy(model: ResNetForImageClassification, images: MemoryImages) -> float:
    """Percent of the images that the model labels right."""
    model.eval()
    mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
    correct = 0
    for start in range(0, len(images.labels), 500):
        pixels = images.pixels[start : start + 500].permute(0, 2, 1, 3).float() / 255
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(enlarged((pixels - mean) / std)).logits
        correct += int((logits.argmax(dim=-1) == images.labels[start : start + 500]).sum())
    return 100 * correct / len(images.labels)


def train(arguments: argparse.Namespace) -> None:
    config = TrainingConfig(
        dataset=arguments.dataset,
        image_mean=MEAN,
        image_std=STD,
        interpolation="bicubic",
        crop_scale=[0.4, 1.0],
        auto_augment=None,
        color_jitter=0.0,
        in_memory=True,
        seed=arguments.seed,
    )
    data = load_data(config)
    images, chosen = load_in_memory(data.train), load_in_memory(data.evaluation)
    torch.manual_seed(arguments.seed)
    model = build(arguments.width, arguments.depths, data.id2label).to(memory_format=torch.channels_last)
    size = images.pixels.shape[1]
    augmentation = BatchAugmentation(config, size)
    steps = len(images.labels) // arguments.batch_size
    optimizer = torch.optim.SGD(
        model.parameters(), lr=arguments.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.learning_rate, epochs=arguments.epochs, steps_per_epoch=steps, pct_start=0.2
    )
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint, log = arguments.output_dir / "checkpoint.pt", arguments.output_dir / "log.csv"
    rows: list[dict] = []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        rows = state["rows"]
    for epoch in range(len(rows), arguments.epochs):
        started, total = time.perf_counter(), 0.0
        model.train()
        place = Place(arguments.batch_size, 0, 1, arguments.seed, epoch, 0, steps)
        for batch in images.batches(augmentation, place, shuffle=True):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(enlarged(batch["pixel_values"])).logits
            loss = F.cross_entropy(logits.float(), batch["labels"], label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.item()
        row = {
            "epoch": epoch + 1,
            "loss": round(total / steps, 4),
            "held_out_top1": round(accuracy(model, chosen), 2),
            "seconds": round(time.perf_counter() - started, 1),
        }
        rows.append(row)
        print(row, flush=True)
        states = {"model": model, "optimizer": optimizer, "schedule": schedule}
        state = {name: each.state_dict() for name, each in states.items()} | {"rows": rows}
        torch.save(state, checkpoint.with_suffix(".partial"))
        checkpoint.with_suffix(".partial").replace(checkpoint)
        with log.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    if data.test is not None:
        print(f"top-1 on test: {accuracy(model, load_in_memory(data.test)):.2f} %")
    folder = arguments.output_dir / "model"
    model.to(memory_format=torch.contiguous_format).save_pretrained(folder)
    processor = evaluation_image_processor(ENLARGED * size, 1.0, MEAN, STD)
    processor.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--dataset", default="uoft-cs/cifar10", help="Hub id or folder of small images of one size")
    parser.add_argument("--width", type=int, default=64, help="channels of the first layer")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 1, 1, 1], help="blocks of each stage")
    parser.add_argument("--epochs", type=int, default=13)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(describe_run(torch.device("cpu"), "bfloat16"))
    train(arguments)


if __name__ == "__main__":
    main()
