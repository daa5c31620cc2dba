"""
Fine-tuning on few photographs against a linear probe of the same source, on crops of CamVid and on CIFAR-10:

    python -m benchmarks.finetune --camvid FOLDER --source examples/checkpoints/thinkingvit-cifar10 --seeds 0 1 2
    python -m benchmarks.finetune --cifar10 FOLDER --source examples/checkpoints/thinkingvit-cifar10 --seeds 0 1 2

CamVid is `train.parquet` and `test.parquet` with the columns `image` and `annotation` (class indices). A photograph is
a square crop of a frame, labelled with the class that covers most of it, at least 60 %; there is at most one crop of a
class in a frame. Of each class, 40 are drawn from the training frames by the seed; at most 100 of the test frames
measure. The test frames are of other video sequences than the training frames. The source knows none of the classes.

CIFAR-10 is `test.parquet` with the columns `image` and `label`, enlarged to 256 × 256 pixels: of the first five
classes, which the source knows, 40 images each are drawn by the seed, and 100 others measure.

The linear probe is scikit-learn's logistic regression on the source's features (the normalised class token of its last
stage), with its strength chosen by cross-validation: of all 200 photographs, and of the 160 that fine-tuning trains on,
which holds the others out. `start` is the last stage of the model that fine-tuning begins with, and `source` the
source's own classifier with the other classes left out.
"""

import argparse
import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModelForImageClassification, PreTrainedModel

from benchmarks.measure import describe_run
from hf_thinkingvit.auto import AutoImageProcessor
from hf_thinkingvit.evaluation import evaluate_thresholds
from hf_thinkingvit.training import finetune


CLASSES = {"building": 1, "pavement": 4, "tree": 5, "fence": 7, "car": 8}
KNOWN = ["airplane", "automobile", "bird", "cat", "deer"]
ENLARGED = 256
SIZE, COVERAGE, PER_CLASS, MOST_TESTED = 64, 0.6, 40, 100


def crops(frames: datasets.Dataset, seed: int) -> dict[str, list[Image.Image]]:
    """By class, one crop of each frame that has one, at a random place, in a random order of the frames."""
    draw = np.random.default_rng(seed)
    found: dict[str, list[Image.Image]] = {name: [] for name in CLASSES}
    for index in draw.permutation(len(frames)).tolist():
        image, annotation = frames[index]["image"].convert("RGB"), np.array(frames[index]["annotation"])
        tops, lefts = (range(0, side - SIZE + 1, SIZE // 4) for side in annotation.shape)
        places = [(top, left) for top in tops for left in lefts]
        draw.shuffle(places)
        for name, label in CLASSES.items():
            mask = annotation == label
            for top, left in places:
                if mask[top : top + SIZE, left : left + SIZE].mean() >= COVERAGE:
                    found[name].append(image.crop((left, top, left + SIZE, top + SIZE)))
                    break
    return found


def cifar10_images(rows: datasets.Dataset, seed: int, per_class: int) -> tuple[dict, dict]:
    """By class, images to train on, drawn by the seed, and others to measure on."""
    labels, names = np.array(rows["label"][:]), rows.features["label"].names
    draw, parts = np.random.default_rng(seed), ({}, {})
    for name in KNOWN:
        indices = draw.permutation(np.flatnonzero(labels == names.index(name))).tolist()
        for part, chosen in zip(parts, (indices[:per_class], indices[per_class : per_class + MOST_TESTED])):
            images = [rows[index]["image"].convert("RGB") for index in chosen]
            part[name] = [image.resize((ENLARGED, ENLARGED), Image.Resampling.BICUBIC) for image in images]
    return parts


def as_dataset(images: dict[str, list[Image.Image]], most: int) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(images))})
    pairs = [(image, index) for index, name in enumerate(images) for image in images[name][:most]]
    columns = {"image": [image for image, _ in pairs], "label": [label for _, label in pairs]}
    return datasets.Dataset.from_dict(columns, features)


def save_folder(rows: datasets.Dataset, folder: Path) -> None:
    for index, row in enumerate(rows):
        file = folder / rows.features["label"].int2str(row["label"]) / f"{index:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(file)


def trained_on(rows: datasets.Dataset, finetuned: Path) -> datasets.Dataset:
    """Without the photographs that fine-tuning has held out, which are named after their index."""
    record = json.loads((finetuned / "splits.json").read_text(encoding="utf-8"))
    held_out = {int(Path(name).stem) for name in (*record["selects"], *record["calibrates"])}
    return rows.select([index for index in range(len(rows)) if index not in held_out])


@torch.no_grad()
def class_tokens(source: str, rows: datasets.Dataset) -> np.ndarray:
    """The source's class tokens of the last stage, as its classifier gets them: `(images, hidden_size)`."""
    model = AutoModelForImageClassification.from_pretrained(source, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(source)
    given: list[torch.Tensor] = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    tokens = []
    for start in range(0, len(rows), 50):
        pixel_values = processor(rows[start : start + 50]["image"][:], return_tensors="pt")["pixel_values"]
        model(pixel_values, output_stage_logits=True)
        tokens.append(given[-1])
    return torch.cat(tokens).numpy()


def probe_accuracy(tokens: np.ndarray, labels: list[int], test_tokens: np.ndarray, test_labels: list[int]) -> float:
    """Of a linear probe, in %."""
    probe = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=np.logspace(-4, 2, 13), cv=5, max_iter=5000))
    return 100 * probe.fit(tokens, labels).score(test_tokens, test_labels)


def source_accuracy(source: str, names: list[str], test_tokens: np.ndarray, test_labels: list[int]) -> float | None:
    """Of the source's classifier without its other classes, in %; `None` if it does not know all of `names`."""
    model = AutoModelForImageClassification.from_pretrained(source, dtype=torch.float32)
    if not set(names) <= set(model.config.label2id):
        return None
    logits = model.classifier(torch.from_numpy(test_tokens))[:, [model.config.label2id[name] for name in names]]
    return 100 * float((logits.argmax(dim=1) == torch.tensor(test_labels)).float().mean())


def last_stage(model: PreTrainedModel, processor: Any, test: datasets.Dataset) -> float:
    answers, _ = evaluate_thresholds(model, test, processor, [0.0], split="test", progress=False)
    return answers.stage_rows()[-1]["top1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--camvid", type=Path, help="folder of train.parquet and test.parquet")
    data.add_argument("--cifar10", type=Path, help="folder of test.parquet")
    parser.add_argument("--source", default="examples/checkpoints/thinkingvit-cifar10")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/finetune-benchmark"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--per-class", type=int, default=PER_CLASS, help="photographs; fewer to try it out")
    parser.add_argument("--learning-rate", type=float, help="instead of the default")
    arguments = parser.parse_args()
    folder = arguments.camvid or arguments.cifar10
    splits = ("train", "test") if arguments.camvid else ("test",)
    given = datasets.load_dataset("parquet", data_files={split: str(folder / f"{split}.parquet") for split in splits})
    print(describe_run(torch.device("cpu"), "float32"))
    names = ("seed", "probe of 200", "probe of 160", "source", "start", "first stage", "last stage", "epoch", "at τ")
    print(f"| {' | '.join(names)} | τ | leave after the first | seconds (of CPU time) |")
    print("|---" * 12 + "|", flush=True)
    for seed in arguments.seeds:
        if arguments.camvid:
            images, tested = crops(given["train"], seed), crops(given["test"], 0)
        else:
            images, tested = cifar10_images(given["test"], seed, arguments.per_class)
        train, test = as_dataset(images, arguments.per_class), as_dataset(tested, MOST_TESTED)
        print(_row(seed, train, test, arguments), flush=True)


def _row(seed: int, train: datasets.Dataset, test: datasets.Dataset, arguments: argparse.Namespace) -> str:
    """A line of the table."""
    source, folder = arguments.source, arguments.output_dir / f"seed-{seed}"
    options = {} if arguments.learning_rate is None else {"learning_rate": arguments.learning_rate}
    save_folder(train, folder / "photos")
    started, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        done = finetune(folder / "photos", source, folder / "finetuned", seed=seed, **options)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    with contextlib.redirect_stdout(io.StringIO()):  # one step of almost nothing
        rates = {"learning_rate": 0.0, "warmup_learning_rate": 0.0, "min_learning_rate": 0.0}
        start = finetune(folder / "photos", source, folder / "start", seed=seed, max_steps=1, **rates)
    tau = done.model.config.threshold
    answers, (row,) = evaluate_thresholds(done.model, test, done.processor, [tau], split="test", progress=False)
    first, *_, last = answers.stage_rows()
    tokens, labels, tested = class_tokens(source, test), test["label"][:], trained_on(train, done.folder)
    probes = [probe_accuracy(class_tokens(source, rows), rows["label"][:], tokens, labels) for rows in (train, tested)]
    own = source_accuracy(source, train.features["label"].names, tokens, labels)
    accuracies = [*probes, own, last_stage(start.model, start.processor, test), first["top1"], last["top1"]]
    words = ["–" if value is None else f"{value:.1f}" for value in accuracies]
    words += [str(done.results["training"]["epochs"].split()[0]), f"{row['top1']:.1f}", f"{tau:.4g}"]
    words += [f"{row['exit_shares'][0]:.0%}", f"{seconds:.0f} ({cpu:.0f})"]
    return f"| {' | '.join([str(seed), *words])} |"


if __name__ == "__main__":
    main()
