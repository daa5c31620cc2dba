"""
Training runs one after the other, started by `test_distributed_runs.py` under `accelerate launch` as

    tests/training/train_distributed.py FILE ...

Each FILE is the configuration of a run.
"""

import sys

from accelerate import Accelerator, PartialState

from hf_thinkingvit.training import parse_config, train


if __name__ == "__main__":
    Accelerator.end_training = lambda self: None  # would end the group of processes after the first run
    for file in sys.argv[1:]:
        train(parse_config(["--config", file]))
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
