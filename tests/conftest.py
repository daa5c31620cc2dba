"""Offline, deterministic, and on few threads: what every test starts from."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
