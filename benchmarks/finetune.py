"""
Fine-tuning on few photographs against a linear probe of the same source, on crops of CamVid:

    python -m benchmarks.finetune --camvid FOLDER --source examples/checkpoints/thinkingvit-cifar10 --seeds 0 1 2

FOLDER holds CamVid as `train.parquet` and `test.parquet` with the columns `image` and `annotation` (class indices). A
photograph is a square crop of a frame, labelled with the class that covers most of it, at least 60 %; there is at most
one crop of a class in a frame. Of each class, 40 are drawn from the training frames by the seed; at most 100 of the
test frames measure. The test frames are of other video sequences than the training frames.

The linear probe is scikit-learn's logistic regression on the source's features (the normalised class token of its last
stage), with its strength chosen by cross-validation. It gets all 200 photographs; fine-tuning holds 40 of them out.
"""

import argparse
import contextlib
import io
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModelForImageClassification

from benchmarks.measure import describe_run
from hf_thinkingvit.auto import AutoImageProcessor
from hf_thinkingvit.evaluation import evaluate_thresholds
from hf_thinkingvit.training import finetune


CLASSES = {"building": 1, "pavement": 4, "tree": 5, "fence": 7, "car": 8}
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


def as_dataset(images: dict[str, list[Image.Image]], most: int) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    pairs = [(image, index) for index, name in enumerate(CLASSES) for image in images[name][:most]]
    columns = {"image": [image for image, _ in pairs], "label": [label for _, label in pairs]}
    return datasets.Dataset.from_dict(columns, features)


def save_folder(rows: datasets.Dataset, folder: Path) -> None:
    for index, row in enumerate(rows):
        file = folder / rows.features["label"].int2str(row["label"]) / f"{index:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(file)


@torch.no_grad()
def class_tokens(source: str, rows: datasets.Dataset) -> np.ndarray:
    """The source's class tokens of the last stage, as its classifier gets them: `(images, hidden_size)`."""
    model = AutoModelForImageClassification.from_pretrained(source, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(source)
    given: list[torch.Tensor] = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    tokens = []
    for start in range(0, len(rows), 50):
        model(processor(rows[start : start + 50]["image"][:], return_tensors="pt")["pixel_values"], threshold=0.0)
        tokens.append(given[-1])
    return torch.cat(tokens).numpy()


def linear_probe(source: str, train: datasets.Dataset, test: datasets.Dataset) -> float:
    """Its accuracy (%) on `test`."""
    probe = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=np.logspace(-4, 2, 13), cv=5, max_iter=5000))
    probe.fit(class_tokens(source, train), train["label"][:])
    return 100 * probe.score(class_tokens(source, test), test["label"][:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camvid", type=Path, required=True, help="folder of train.parquet and test.parquet")
    parser.add_argument("--source", default="examples/checkpoints/thinkingvit-cifar10")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/finetune-benchmark"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--per-class", type=int, default=PER_CLASS, help="photographs; fewer to try it out")
    parser.add_argument("--most-tested", type=int, default=MOST_TESTED, help="test crops of a class, at most")
    arguments = parser.parse_args()
    files = {split: str(arguments.camvid / f"{split}.parquet") for split in ("train", "test")}
    frames = datasets.load_dataset("parquet", data_files=files)
    test = as_dataset(crops(frames["test"], 0), arguments.most_tested)
    print(describe_run(torch.device("cpu"), "float32"))
    print(f"{len(test)} test images: {dict(zip(CLASSES, np.bincount(test['label'][:]).tolist()))}\n")
    print(
        "| seed | linear probe | first stage | last stage | at τ | τ | leave after the first | seconds (of CPU time) |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for seed in arguments.seeds:
        folder = arguments.output_dir / f"seed-{seed}"
        train = as_dataset(crops(frames["train"], seed), arguments.per_class)
        save_folder(train, folder / "photos")
        started, cpu = time.perf_counter(), time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            done = finetune(folder / "photos", arguments.source, folder / "finetuned", seed=seed)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        tau = done.model.config.threshold
        answers, (row,) = evaluate_thresholds(done.model, test, done.processor, [tau], split="test", progress=False)
        first, *_, last = answers.stage_rows()
        probe = linear_probe(arguments.source, train, test)
        print(
            f"| {seed} | {probe:.1f} | {first['top1']:.1f} | {last['top1']:.1f} | {row['top1']:.1f} | {tau:.4g} "
            f"| {row['exit_shares'][0]:.0%} | {seconds:.0f} ({cpu:.0f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
