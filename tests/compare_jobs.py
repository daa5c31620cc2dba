"""Small jobs of `benchmarks.compare`, which needs timm."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification

from benchmarks.compare_methods import Sizes, model_config
from benchmarks.compare_runs import Job
from benchmarks.compare_settings import record
from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.training import TrainingConfig
from tests.training.tiny_runs import LABELS
from tests.utils import perturbed


MODEL = {"thinking_stages": [2, 4], "hidden_size": 16, "num_hidden_layers": 4, "image_size": 8, "patch_size": 4}
BASE = TrainingConfig(model=MODEL, epochs=6, warmup_epochs=1, batch_size=4, mixup=0, cutmix=0)
SIZES = Sizes.of(MODEL)


def job(method: str, folder: Path = Path("nowhere"), seed: int = 0) -> Job:
    return Job(method, seed, BASE, folder, fine_tuning_epochs=3)


def build(method: str):
    torch.manual_seed(0)
    labels = dict(enumerate(LABELS))
    return AutoModelForImageClassification.from_config(model_config(method, SIZES, id2label=labels))


def tiny_job(method: str, folder: Path, pictures: Path, given: tuple[str, ...] = (), **fields) -> Job:
    """A job of a run of two steps, with random models for those that are given."""
    run = {"epochs": 1, "warmup_epochs": 0, "cooldown_epochs": 0, "num_workers": 0, "ema_decay": 0, "cpu": True}
    run |= {"dataset": str(pictures), "eval_split": "test", "eval_batch_size": 5, "auto_augment": None}
    for name in given:
        perturbed(build(name)).save_pretrained(folder / "given" / name)
        evaluation_image_processor(8).save_pretrained(folder / "given" / name)
    models = {name: folder / "given" / name for name in given}
    return Job(method, 0, replace(BASE, **run | fields), folder / "out", 1, models, rows={"train": 8, "test": 8})


def begin(job: Job, points: dict | None = None) -> None:
    """What a run leaves that has finished, or else has been interrupted."""
    (job.folder / "checkpoints").mkdir(parents=True)
    record(job)
    if points is not None:
        job.result.write_text(json.dumps(points))
