"""Data, flags and launchers for runs that take a second."""

import io
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hf_thinkingvit.training.checkpoints import list_checkpoints


SCRIPT = Path(__file__).parents[2] / "examples" / "train.py"
LABELS = ["cat", "dog", "owl"]
# Everything random at once (mixup, augmentation, stochastic depth), two micro-batches a step, and a moving average.
LIVELY = {"mixup": 0.8, "cutmix": 1.0, "model.drop_path_rate": 0.2, "gradient_accumulation_steps": 2, "save_steps": 2}


def encoded_image(seed: int, size: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_images(
    folder: Path,
    num_train: int = 24,
    num_test: int = 10,
    broken: dict[str, list[int]] | None = None,
    train_files: int = 1,
) -> Path:
    """Parquet files of random images; those whose index is listed in `broken` are cut short."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=LABELS)})
    for split, count, seed in (("train", num_train, 0), ("test", num_test, 1000)):
        files = [encoded_image(seed + index) for index in range(count)]
        for index in (broken or {}).get(split, []):
            files[index] = files[index][:60]
        rows = {
            "image": [{"bytes": file, "path": f"{split}-{index}.png"} for index, file in enumerate(files)],
            "label": [index % len(LABELS) for index in range(count)],
        }
        data, num_files = datasets.Dataset.from_dict(rows, features=features), train_files if split == "train" else 1
        for index in range(num_files):
            part = f"-{index:05d}-of-{num_files:05d}" if num_files > 1 else ""
            data.shard(num_files, index).to_parquet(folder / f"{split}{part}.parquet")
    return folder


def flags(dataset: Path, output_dir: Path, **overrides) -> list[str]:
    """Command-line words of a tiny run on the CPU without anything random across processes."""
    fields = {
        "dataset": dataset,
        "output_dir": output_dir,
        "cpu": True,
        "eval_split": "test",
        "model.thinking_stages": "[1, 2]",
        "model.hidden_size": 16,
        "model.num_hidden_layers": 2,
        "model.image_size": 16,
        "model.patch_size": 8,
        "epochs": 3,
        "cooldown_epochs": 0,
        "warmup_epochs": 1,
        "batch_size": 8,
        "learning_rate": 0.05,
        "ema_decay": 0.9,
        "mixup": 0,
        "cutmix": 0,
        "num_workers": 0,
        "log_steps": 1,
    }
    words = []
    for name, value in {**fields, **overrides}.items():
        words += [f"--{name}", *([str(entry) for entry in value] if isinstance(value, list) else [str(value)])]
    return words


def launch(words: list[str], processes: int, script: Path = SCRIPT) -> subprocess.Popen:
    # Accelerate starts several CPU processes as it starts several GPUs' (or through MPI); the run itself says `cpu`.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, str(script), *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen, timeout: float = 240) -> str:
    """The output of a launched process, which is terminated after `timeout` seconds, with its workers."""
    try:
        return process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher terminates its workers, each of which has its own session
        process.wait(timeout=60)
        raise


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's newest checkpoint, and their moving average."""
    checkpoint = list_checkpoints(folder / "checkpoints")[0]
    found = load_file(checkpoint / "model.safetensors")
    average = checkpoint / "ema.safetensors"
    return {**found, **(load_file(average) if average.exists() else {})}


def assert_same(one: dict, other: dict, tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=tolerance, rtol=0, msg=name)


def logged_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What the run in `folder` has logged with TensorBoard: by name, the value of each step."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(folder.rglob("events.out.tfevents.*")).parent)).Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


def measured(results: dict) -> list[dict]:
    """The history of a run's results, without the time that it took."""
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in results["history"]]
