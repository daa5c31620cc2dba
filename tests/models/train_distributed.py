"""
A few training steps under DistributedDataParallel, started by `test_training.py` as

    python -m torch.distributed.run --nproc-per-node 2 tests/models/train_distributed.py OUTPUT_DIR CASES

CASES is JSON: a list of pairs of a family and overrides of its configuration.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as distributed
from torch.nn.parallel import DistributedDataParallel

from tests.models.test_modeling_avit import lively_avit
from tests.utils import lively_model, lively_swin, random_images


FAMILIES = {"thinkingvit": lively_model, "thinking_swin": lively_swin, "avit": lively_avit}


def train(model: torch.nn.Module, rows: slice) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pixel_values, labels = random_images(8), torch.arange(8)
    for _ in range(3):
        optimizer.zero_grad()
        model(pixel_values[rows], labels=labels[rows]).loss.backward()
        optimizer.step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    share = 8 // distributed.get_world_size()
    start = distributed.get_rank() * share
    for index, (family, overrides) in enumerate(json.loads(sys.argv[2])):
        # The default, find_unused_parameters=False, raises in the second step if a parameter got no gradient.
        wrapped = DistributedDataParallel(FAMILIES[family](**overrides).train())
        train(wrapped, slice(start, start + share))
        if distributed.get_rank() == 0:
            torch.save(wrapped.module.state_dict(), Path(sys.argv[1]) / f"{index}.pt")
    # All processes must be done with the group before it is destroyed: otherwise gloo may abort at exit.
    distributed.barrier()
    del wrapped
    distributed.destroy_process_group()
