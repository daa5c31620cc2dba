"""Randomness as a function of where a run stands, rather than of how it came there."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*place: int) -> Iterator[None]:
    """
    Python's, NumPy's and torch's (CPU) random numbers seeded by `place`, such as (seed, epoch, position), and as they
    were again afterwards. A run that resumes needs no record of them; processes and workers need not agree on one.
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
