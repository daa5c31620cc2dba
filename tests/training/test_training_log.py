"""Reports of a run: losses in trackers, and images that could not be read."""

import pytest

from hf_thinkingvit.training import parse_config, train
from tests.training.tiny_runs import flags, logged_scalars, write_images


def test_logs_to_trackers(images, tmp_path):
    pytest.importorskip("tensorboard")
    train(parse_config(flags(images, tmp_path, trackers=["tensorboard"])))
    logged = logged_scalars(tmp_path)
    assert {"train/loss", "train/stage_0_loss", "train/learning_rate", "eval/ema/top1_stage_1"} <= set(logged)
    assert list(logged["train/loss"]) == list(range(1, 10))


def test_counts_broken_images(tmp_path):
    folder = write_images(tmp_path / "images", broken={"train": [2, 5]})
    run = flags(folder, tmp_path / "run", epochs=3, warmup_epochs=0)
    results = train(parse_config([*run, "--max_steps", "4"]))
    assert results["skipped_images"] == 2
    results = train(parse_config([*run, "--resume", "auto"]))
    assert results["skipped_images"] == 2  # each once, whatever the epochs and interruptions
