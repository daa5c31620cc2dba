"""
One engine per process, started by `test_distributed.py` as

    python -m torch.distributed.run --nproc-per-node 2 tests/inference/classify_distributed.py RESULTS BROKEN
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState

from hf_thinkingvit.inference import AdaptiveEngine, classify_across_processes
from tests.utils import lively_model, random_images


NUM_IMAGES, THRESHOLD = 13, [2.235, 2.11]


class Interrupted(list):
    """Raises `KeyboardInterrupt` while an image is read, as Ctrl-C does."""

    def __getitem__(self, index):
        if index == 3:
            raise KeyboardInterrupt("while reading")
        return super().__getitem__(index)


if __name__ == "__main__":
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    images = list(random_images(NUM_IMAGES))
    if sys.argv[2] == "interrupted":
        images = Interrupted(images)
    elif sys.argv[2] != "none":
        images[int(sys.argv[2])] = torch.zeros(2, 2)  # cannot be read: an image has three dimensions
    try:
        results = classify_across_processes(AdaptiveEngine(lively_model(threshold=THRESHOLD), batch_size=4), images)
        rows = [(result.index, result.exit_stage, result.logits) for result in results]
    except (KeyboardInterrupt, RuntimeError, ValueError) as error:
        rows = f"{type(error).__name__}: {error}"
    torch.save(rows, Path(sys.argv[1]) / f"{state.process_index}.pt")
    state.wait_for_everyone()
    state.destroy_process_group()
