import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_thinkingvit.inference import AdaptiveEngine, classify_across_processes
from tests.inference import classify_distributed
from tests.inference.classify_distributed import NUM_IMAGES, THRESHOLD
from tests.utils import lively_model, random_images


def run_processes(folder: Path, broken: str) -> list:
    """The results of each of two processes, or its error."""
    script = Path(classify_distributed.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), str(folder), broken], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{process}.pt", weights_only=True) for process in range(2)]


def test_two_processes_find_what_one_finds(tmp_path):
    model, images = (
        lively_model(threshold=THRESHOLD),
        random_images(NUM_IMAGES),
    )
    with torch.no_grad():
        expected = model(images)
    assert expected.exit_stage.unique().numel() == 3
    for rows in run_processes(tmp_path, "none"):
        indices, stages, logits = zip(*rows)
        assert list(indices) == list(range(len(images)))
        assert list(stages) == expected.exit_stage.tolist()
        torch.testing.assert_close(torch.stack(logits), expected.logits, atol=1e-5, rtol=0)


def test_all_processes_hear_of_a_failure(tmp_path):
    first, second = run_processes(tmp_path, "3")
    assert second.startswith("ValueError: Input 1 must be a tensor")
    assert first.startswith("RuntimeError: Process 1 of 2 (inputs 1, 3 and so on) failed: ValueError: Input 1")


def test_all_processes_hear_of_an_interrupt(tmp_path):
    first, second = run_processes(tmp_path, "interrupted")
    assert second == "KeyboardInterrupt: while reading"
    assert first.startswith("RuntimeError: Process 1 of 2 (inputs 1, 3 and so on) failed: KeyboardInterrupt")


def test_a_single_process():
    model, images = lively_model(threshold=THRESHOLD), random_images(7)
    results = classify_across_processes(AdaptiveEngine(model, batch_size=4), images)
    with torch.no_grad():
        assert [result.exit_stage for result in results] == model(images).exit_stage.tolist()
    with pytest.raises(ValueError, match="must be a tensor"):
        classify_across_processes(AdaptiveEngine(model), [torch.zeros(2, 2)])
