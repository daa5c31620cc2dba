from importlib.util import find_spec

import pytest
from accelerate.state import AcceleratorState

from tests.segmentation_data import write_scenes
from tests.training.tiny_runs import write_images


# Names of the tests that need the extra `train`.
NEEDS_TIMM = ("config", "data", "divergence", "loop", "losses", "objectives", "preprocessing", "recipe", "reporting")
NEEDS_TIMM += ("resuming", "setup", "splits", "stage_samplers", "training_log")
NEEDS_TIMM += (
    "distributed_runs",
    "early_exit_runs",
    "elastic_runs",
    "memory_images",
    "pruning_runs",
    "sub_network_distillation",
)
NEEDS_TIMM += (
    "adapters",
    "augmentation",
    "baseline_configurations",
    "distributed_runs",
    "finetuning",
    "layer_decay",
    "photographs",
    "segmentation_runs",
)
collect_ignore = [] if find_spec("timm") else [f"test_{name}.py" for name in NEEDS_TIMM]


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of Parquet files: 24 images to train on, 10 to evaluate on, 3 labels."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder of Parquet files: 12 images with masks to train on, 4 to choose by, 5 to test on, 3 classes."""
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """`datasets` sleeps for seconds after each pass over a shuffled stream."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture(autouse=True)
def one_run_at_a_time():
    """Resets Accelerate's state, which is global in a process."""
    yield
    AcceleratorState._reset_state(True)
