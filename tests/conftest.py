"""Settings of all tests: offline, and with a fixed seed."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # the workers share the cores, also with the processes that tests start
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
