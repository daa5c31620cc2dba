"""
Classify and train with adaptive models, on a CPU, without network:

    python examples/quickstart.py

classifies ten photographs with the small models that this repository trained on CIFAR-10. Then it trains a tiny
two-stage ThinkingViT on scikit-learn's digits, saves it, loads it through `pipeline`, and shows how τ trades accuracy
for compute.
"""

import argparse
import time
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import pipeline, set_seed
from transformers.utils import logging

from hf_thinkingvit import ThinkingViTConfig, ThinkingViTForImageClassification
from hf_thinkingvit.data import load_digits
from hf_thinkingvit.evaluation import stage_macs
from hf_thinkingvit.flags import HelpFormatter
from hf_thinkingvit.image_processing import evaluation_image_processor


THRESHOLDS = [0.0, 0.1, 0.2, 0.4, 0.8, 1.2, 2.5]
EXAMPLES = Path(__file__).parent
IMAGE_SIZE = 8  # pixels, the size of the digits
BATCH_SIZE = 32


def classify_photographs() -> None:
    """Print the shipped models' predictions for one photograph of each class from CIFAR-10's test set."""
    files = sorted((EXAMPLES / "images").glob("*.png"))
    images = [Image.open(file) for file in files]
    adaptive = pipeline("adaptive-image-classification", model=str(EXAMPLES / "checkpoints" / "thinkingvit-cifar10"))
    halting = pipeline("image-classification", model=str(EXAMPLES / "checkpoints" / "avit-cifar10"))
    answers = zip(files, adaptive(images, top_k=1), halting(images, top_k=1))
    print(f"{'photograph':<16}{'ThinkingViT says':<18}{'score':>6}{'exit stage':>12}{'entropy':>9}   A-ViT says")
    for file, (staged,), (halted,) in answers:
        print(
            f"{file.name:<16}{staged['label']:<18}{staged['score']:>6.2f}{staged['exit_stage']:>12}"
            f"{staged['entropy']:>9.2f}   {halted['label']} ({halted['score']:.2f})"
        )
    print()


def load_images() -> tuple[list[Image.Image], list[Image.Image], list[int], list[int]]:
    """Training and test images (RGB), then their labels."""
    splits = load_digits()
    return *(list(splits[name]["image"]) for name in splits), *(list(splits[name]["label"]) for name in splits)


def train(model: torch.nn.Module, pixel_values: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    """A plain training loop: in training mode, the model's loss is the weighted sum over all stages."""
    steps = epochs * (len(labels) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.2)
    model.train()
    with tqdm(total=steps, desc="training", unit="step") as progress:
        for _ in range(epochs):
            for batch in torch.randperm(len(labels)).split(BATCH_SIZE):
                if len(batch) < BATCH_SIZE:
                    continue
                loss = model(pixel_values[batch], labels=labels[batch]).loss
                loss.backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                progress.update()
    model.eval()


def report(results: dict[float, list[dict]], labels: list[int], macs: list[int]) -> None:
    """Print accuracy, share of images per exit stage and mean GMACs of each τ."""
    cumulative = np.cumsum(macs)
    stages = range(len(macs))
    shares = "".join(f"{f'stage {stage}':>9}" for stage in stages)
    print(f"\n{'τ':>5}{'accuracy':>10}{shares}{'mean GMACs':>13}")
    for threshold, answers in results.items():
        exits = np.array([answer["exit_stage"] for answer in answers])
        accuracy = np.mean([answer["label"] == str(label) for answer, label in zip(answers, labels)])
        shares = "".join(f"{np.mean(exits == stage):>9.1%}" for stage in stages)
        print(f"{threshold:>5.2f}{accuracy:>10.2%}{shares}{cumulative[exits].mean() / 1e9:>13.6f}")


def draw(images: list[Image.Image], labels: list[int], answers: list[dict], threshold: float, path: Path) -> None:
    """Test images with label, exit stage and entropy, the most certain first."""
    order = sorted(range(len(images)), key=lambda index: (answers[index]["exit_stage"], answers[index]["entropy"]))
    shown = [order[position] for position in np.linspace(0, len(order) - 1, 24).round().astype(int)]
    figure, axes = plt.subplots(4, 6, figsize=(10.5, 8.4), layout="constrained")
    for axis, index in zip(axes.flat, shown):
        answer = answers[index]
        axis.imshow(images[index], interpolation="nearest")
        axis.set_title(
            f"says {answer['label']}, is {labels[index]}\n"
            f"stage {answer['exit_stage']}, entropy {answer['entropy']:.2f}",
            fontsize=10,
            color="black" if answer["label"] == str(labels[index]) else "tab:red",
        )
        axis.set_axis_off()
    figure.suptitle(f"Handwritten digits at τ = {threshold:g}: by exit stage, and within it from certain to doubtful")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/quickstart"), help="the model and a picture")
    parser.add_argument("--epochs", type=int, default=45, help="passes over the digits")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the digits")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    classify_photographs()
    set_seed(arguments.seed)  # after loading the models, which draws random numbers
    train_images, test_images, train_labels, test_labels = load_images()
    config = ThinkingViTConfig(
        thinking_stages=[1, 6],
        hidden_size=48,
        num_hidden_layers=4,
        image_size=IMAGE_SIZE,
        patch_size=2,
        num_labels=10,
        id2label={digit: str(digit) for digit in range(10)},
        label2id={str(digit): digit for digit in range(10)},
    )
    processor = evaluation_image_processor(IMAGE_SIZE, crop_pct=1.0, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    model = ThinkingViTForImageClassification(config)
    started = time.perf_counter()
    pixel_values = processor(train_images, return_tensors="pt")["pixel_values"]
    train(model, pixel_values, torch.tensor(train_labels), arguments.epochs)
    print(f"trained on {len(train_images)} images in {time.perf_counter() - started:.0f} s")

    model.save_pretrained(arguments.output_dir)
    processor.save_pretrained(arguments.output_dir)
    classifier = pipeline("adaptive-image-classification", model=str(arguments.output_dir), top_k=1)
    results = {
        threshold: [answer[0] for answer in classifier(test_images, threshold=threshold, batch_size=BATCH_SIZE)]
        for threshold in THRESHOLDS
    }
    report(results, test_labels, stage_macs(config))

    threshold = THRESHOLDS[len(THRESHOLDS) // 2]
    picture = arguments.output_dir / "exits.png"
    draw(test_images, test_labels, results[threshold], threshold, picture)
    print(f"\nmodel: {arguments.output_dir}\npicture: {picture}")


if __name__ == "__main__":
    main()
