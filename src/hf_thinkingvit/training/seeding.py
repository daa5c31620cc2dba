"""Random numbers that depend on the position in a run only, so that no generator state has to be saved or shared."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*place: int) -> Iterator[None]:
    """
    Seed Python's, NumPy's and torch's (CPU) random numbers with `place`, such as (seed, epoch, position), and restore
    their state at the end of the context.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(place).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
