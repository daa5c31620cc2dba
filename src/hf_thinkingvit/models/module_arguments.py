"""Checks of call arguments that every `forward` shares."""

import difflib
import inspect

import torch
from transformers import PreTrainedModel
from transformers.utils import TransformersKwargs, logging


logger = logging.get_logger(__name__)

# Arguments that Transformers passes on to the layers, attention backend and loss of any model.
TRANSFORMERS_ARGUMENTS = frozenset(TransformersKwargs.__annotations__) | {"return_dict"}


def check_arguments(model: PreTrainedModel, kwargs: dict) -> None:
    """
    Refuse unknown arguments, such as misspelt ones, which a `forward` with `**kwargs` would ignore. `None` is accepted,
    because generic wrappers pass it for arguments of other kinds of models (`attention_mask`).

    Args:
        model (`PreTrainedModel`): the model whose `forward` was called.
        kwargs (`dict`): the `**kwargs` of that call.

    Raises:
        TypeError: if neither the model's `forward` nor Transformers knows a name; the message suggests the nearest.
    """
    for name in kwargs:
        if name not in TRANSFORMERS_ARGUMENTS and kwargs[name] is not None:
            raise TypeError(_unknown_argument(model, name))


def _unknown_argument(model: PreTrainedModel, name: str) -> str:
    parameters = inspect.signature(type(model).forward).parameters.values()
    own = [parameter.name for parameter in parameters if parameter.kind != inspect.Parameter.VAR_KEYWORD][1:]
    nearest = difflib.get_close_matches(name, [*own, *sorted(TRANSFORMERS_ARGUMENTS)], n=1)
    hint = f"Did you mean '{nearest[0]}'?" if nearest else f"It takes {', '.join(own)}."
    return f"{type(model).__name__}.forward() got an unexpected keyword argument '{name}'. {hint}"


def warn_of_outside_loss(model: PreTrainedModel, message: str) -> None:
    """Warn once of a call in training mode without labels: a loss computed outside may use only part of the outputs."""
    if model.training and torch.is_grad_enabled():
        _warn_once(f"{type(model).__name__} was called in training mode without `labels`. {message}")


# torch.compile calls this function while tracing, so it warns at compile time and causes no graph break.
@torch.compiler.assume_constant_result
def _warn_once(message: str) -> None:
    logger.warning_once(message)
