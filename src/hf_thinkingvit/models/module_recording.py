"""
Use of Transformers' recording of hidden states and attentions (`transformers.utils.output_capturing`, which records by
forward hooks).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers.utils import output_capturing
from transformers.utils.output_capturing import OutputRecorder


# The arguments, and fields of the configuration, that ask for recordings.
RECORDINGS = ("output_hidden_states", "output_attentions")


def record(module_class: type[nn.Module], index: int = 0, layer_name: str | None = None) -> OutputRecorder:
    """
    Entry of `_can_record_outputs` that records output `index` of each module, stage after stage; with `layer_name`,
    only of modules within the submodule of that name.
    """
    recorder = OutputRecorder(module_class, index=index, layer_name=layer_name)
    # Newer versions of Transformers resolve negative indices in `output_hidden_states` by this; older ones ignore it.
    recorder.num_hidden_layers_key = "num_recorded_layers"
    return recorder


def wants_recordings(config, kwargs: dict) -> bool:
    """Whether the caller asked for hidden states or attentions, by argument or by `config`."""
    return any(kwargs.get(name) if kwargs.get(name) is not None else getattr(config, name) for name in RECORDINGS)


@contextmanager
def recording_off() -> Iterator[None]:
    """
    Within this context nothing is recorded, so that `torch.compile` can trace it. Transformers' idle hooks read a
    context variable, which some versions of torch can trace only if the traced code has set it.
    """
    collector = getattr(output_capturing, "_active_collector", None)
    if not (hasattr(collector, "set") and hasattr(collector, "reset")):
        yield
        return
    token = collector.set(None)
    try:
        yield
    finally:
        collector.reset(token)


def is_idle_recorder(hook: Callable) -> bool:
    """
    Whether `hook` is one of Transformers' recording hooks in a call that records nothing. The first call that records
    installs them for good, and later calls switch them by a context variable. `False` for every hook if this version of
    Transformers has another mechanism.
    """
    collector = getattr(output_capturing, "_active_collector", None)
    if getattr(hook, "__module__", None) != output_capturing.__name__ or not hasattr(collector, "get"):
        return False
    return not collector.get()
