"""One engine in each process of `accelerate launch`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from .engine import AdaptiveEngine, EngineResult


def classify_across_processes(engine: AdaptiveEngine, inputs: Sequence[Any]) -> list[EngineResult]:
    r"""
    Share `inputs` out over the processes that Accelerate started, one engine in each, and gather what they find. In a
    single process, the results of the engine. (`examples/classify_folder.py` does it with files instead of memory.)

    Args:
        engine ([`AdaptiveEngine`]): of this process, its model on this process's device (`PartialState().device`).
        inputs (`Sequence`): the same in every process; each image is read by one of them only.

    Returns:
        `list[EngineResult]` of all inputs, in their order, in every process. `engine.stats` counts this process's work.

    Raises:
        RuntimeError: in every process, if one of them failed; the message says which and why. The process that failed
            raises its own exception, and nobody waits for ever.
    """
    state = PartialState()
    places = range(state.process_index, len(inputs), state.num_processes)
    results, failure = [], None
    try:
        results = [replace(result, index=places[result.index]) for result in engine(inputs[place] for place in places)]
    except (
        BaseException
    ) as error:  # Ctrl-C too: told to the others before it is raised, since they wait for this process
        failure = error
    told = None if failure is None else f"{type(failure).__name__}: {failure}"
    parts = gather_object([(results, told)])
    if failure is not None:
        raise failure
    for process, (_, reason) in enumerate(parts):
        if reason is not None:
            share = f"inputs {process}, {process + state.num_processes} and so on"
            raise RuntimeError(f"Process {process} of {state.num_processes} ({share}) failed: {reason}")
    return sorted((result for part, _ in parts for result in part), key=lambda result: result.index)
