"""
Accuracy and compute of a small A-ViT with and without halting, on scikit-learn's handwritten digits (CPU, minutes):

    python -m benchmarks.avit_digits --output-dir outputs/avit-digits

For each seed a small ViT is trained, and then fine-tuned for equally many epochs without halting (the control) and with
halting, once for each ponder weight. Prints test accuracy, mean token depth and multiply-accumulates. Saves the first
seed's model with the first ponder weight, and test images for `examples/visualize_tokens.py`.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm
from transformers import set_seed

from hf_thinkingvit import AViTConfig, AViTForImageClassification
from hf_thinkingvit.image_processing import evaluation_image_processor


SIZE = {
    "num_attention_heads": 4,
    "hidden_size": 48,
    "num_hidden_layers": 6,
    "image_size": 8,
    "patch_size": 2,
    "num_labels": 10,
    "id2label": {digit: str(digit) for digit in range(10)},
    "label2id": {str(digit): digit for digit in range(10)},
}
HALTING = {"gate_scale": 5.0, "gate_center": 5.0, "prior_loss_weight": 1e-2, "target_depth": 3}
NO_HALTING = {"gate_scale": 1.0, "gate_center": 1e3, "ponder_loss_weight": 0.0, "prior_loss_weight": 0.0}


def train(model: AViTForImageClassification, pixel_values, labels, epochs: int, lr: float, name: str) -> None:
    steps = len(labels) // 32
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.2)
    model.train()
    for _ in tqdm(range(epochs), desc=name, unit="epoch", mininterval=2):
        for batch in torch.randperm(len(labels))[: steps * 32].split(32):
            model(pixel_values[batch], labels=labels[batch]).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def evaluate(model: AViTForImageClassification, pixel_values, labels) -> tuple[float, float, float]:
    """Accuracy in %, mean token depth, and millions of multiply-accumulates per image."""
    depth = model(pixel_values, output_token_depth=True).token_depth.float().mean().item()
    outputs = model(pixel_values)
    accuracy = (outputs.logits.argmax(-1) == labels).float().mean().item()
    return 100 * accuracy, depth, outputs.macs.float().mean().item() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/avit-digits"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ponder", type=float, nargs="+", default=[3e-3, 1e-2])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--fine-tuning-epochs", type=int, default=25)
    arguments = parser.parse_args()

    digits = load_digits()
    images = [Image.fromarray((pixels * 255 / 16).astype(np.uint8)).convert("RGB") for pixels in digits.images]
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, digits.target, test_size=0.3, random_state=0, stratify=digits.target
    )
    processor = evaluation_image_processor(8, crop_pct=1.0, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    learn, test = (processor(split, return_tensors="pt")["pixel_values"] for split in (train_images, test_images))
    train_labels, test_labels = torch.tensor(train_labels), torch.tensor(test_labels)

    variants = {"without halting": NO_HALTING}
    variants.update(
        {f"ponder weight {ponder:g}": {**HALTING, "ponder_loss_weight": ponder} for ponder in arguments.ponder}
    )
    results = {name: [] for name in variants}
    for seed in arguments.seeds:
        set_seed(seed)
        start = AViTForImageClassification(AViTConfig(**SIZE, **NO_HALTING))
        train(start, learn, train_labels, arguments.epochs, 2e-3, f"seed {seed}, from scratch")
        for name, fields in variants.items():
            set_seed(seed)
            model = AViTForImageClassification(AViTConfig(**SIZE, **fields))
            model.load_state_dict(start.state_dict())
            train(model, learn, train_labels, arguments.fine_tuning_epochs, 1e-3, f"seed {seed}, {name}")
            results[name].append(evaluate(model, test, test_labels))
            if len(results[name]) == 1 and name == list(variants)[1]:
                model.save_pretrained(arguments.output_dir)
                processor.save_pretrained(arguments.output_dir)

    folder = arguments.output_dir / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(test_images[:24]):
        image.save(folder / f"{index:02d}_is_{test_labels[index]}.png")

    print(f"\n| | accuracy (%), mean of seeds {arguments.seeds} | each | mean depth | M MACs |\n|---|---|---|---|---|")
    for name, rows in results.items():
        accuracy, depth, macs = (statistics.mean(column) for column in zip(*rows))
        each = ", ".join(f"{row[0]:.1f}" for row in rows)
        print(f"| {name} | {accuracy:.2f} | {each} | {depth:.2f} of {SIZE['num_hidden_layers']} | {macs:.2f} |")


if __name__ == "__main__":
    main()
