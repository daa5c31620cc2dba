"""One engine in each process of `accelerate launch`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from .engine import AdaptiveEngine, EngineResult


def classify_across_processes(engine: AdaptiveEngine, inputs: Sequence[Any]) -> list[EngineResult]:
    r"""
    Split `inputs` over the processes that Accelerate started, run one engine in each, and gather all results in every
    process. (`examples/classify_folder.py` writes results to files instead of gathering them in memory.)

    Args:
        engine ([`AdaptiveEngine`]): engine of this process, with its model on `PartialState().device`.
        inputs (`Sequence`): the same in every process; each image is read by one process only.

    Returns:
        `list[EngineResult]` of all inputs, in their order, in every process. `engine.stats` counts this process's work.

    Raises:
        RuntimeError: if another process failed; the message says which and why. The process that failed raises its own
            exception.
    """
    partial_state = PartialState()
    places = range(partial_state.process_index, len(inputs), partial_state.num_processes)
    results, failure = [], None
    try:
        results = [replace(result, index=places[result.index]) for result in engine(inputs[place] for place in places)]
    except BaseException as error:  # Ctrl-C too: the other processes wait for this one and must be told first
        failure = error
    told = None if failure is None else f"{type(failure).__name__}: {failure}"
    parts = gather_object([(results, told)])
    if failure is not None:
        raise failure
    for process, (_, reason) in enumerate(parts):
        if reason is not None:
            share = f"inputs {process}, {process + partial_state.num_processes} and so on"
            raise RuntimeError(f"Process {process} of {partial_state.num_processes} ({share}) failed: {reason}")
    return sorted((result for part, _ in parts for result in part), key=lambda result: result.index)
