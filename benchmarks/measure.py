"""What the benchmarks share: timing in turns, and the header of a table."""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers


def describe_run(device: torch.device, dtype: str) -> str:
    """The header of a table of measurements: hardware, threads, dtype, versions and date."""
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return (
        f"{hardware}, {torch.get_num_threads()} CPU threads, {dtype}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {time.strftime('%Y-%m-%d')}\n"
    )


def add_run_arguments(parser: argparse.ArgumentParser, repeats: int) -> None:
    """The options of a benchmark that runs at several batch sizes on one device."""
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])


def measure(rivals: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Call the rivals in turns, `repeats` times each after two warm-up rounds. Returns the seconds of each call."""
    seconds = {name: [] for name in rivals}
    for repeat in range(repeats + 2):
        for name, call in rivals.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def median_and_quartiles(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    low, _, high = statistics.quantiles(values, n=4)
    return f"{statistics.median(values):.3f} ({low:.3f} to {high:.3f})"


@torch.no_grad()
def peak_macs_per_second(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Multiply-accumulates per second of a large square matrix product, as an upper bound for this machine."""
    size = size or (8192 if device.type == "cuda" else 2048)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = measure({"product": lambda: left @ right}, 7, device)["product"]
    return size**3 / min(seconds)
