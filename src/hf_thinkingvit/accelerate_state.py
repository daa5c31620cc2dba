"""Accelerate has one device and one precision for a process, which the first `Accelerator` fixes."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.state import AcceleratorState, PartialState


@contextmanager
def released_afterwards() -> Iterator[None]:
    """
    A context, usable as a decorator too, after which device and precision are as free as they were before, for calls
    that make an `Accelerator` and keep none: a second call in a notebook can then choose others. Process groups stay.
    """
    was_chosen, was_started = AcceleratorState._shared_state != {}, PartialState._shared_state != {}
    try:
        yield
    finally:
        if not was_chosen and AcceleratorState._shared_state:
            alone = PartialState().num_processes == 1
            AcceleratorState._reset_state(reset_partial_state=alone and not was_started)


def check_precision(mixed_precision: str) -> None:
    """`ValueError` if this process has an `Accelerator` of another precision."""
    chosen = AcceleratorState._shared_state.get("_mixed_precision")
    if chosen not in (None, mixed_precision):
        raise ValueError(
            f"`mixed_precision` is {mixed_precision!r}, but this process has an `Accelerator` with {chosen!r} already, "
            "and Accelerate has one precision for a process. Start another process (in a notebook, restart the kernel)."
        )
