"""Checks of how a model is called that every `forward` shares."""

import difflib
import inspect

import torch
from transformers import PreTrainedModel
from transformers.utils import TransformersKwargs, logging


logger = logging.get_logger(__name__)

# What Transformers passes on to a model's layers, attention backend and loss, whatever the model is.
TRANSFORMERS_ARGUMENTS = frozenset(TransformersKwargs.__annotations__) | {"return_dict"}


def check_arguments(model: PreTrainedModel, kwargs: dict) -> None:
    """
    Refuse a misspelt argument, which a `forward` with `**kwargs` would ignore. `None` asks for nothing: wrappers that
    serve all kinds of models pass it as arguments of other kinds (`attention_mask`).

    Args:
        model (`PreTrainedModel`): whose `forward` was called.
        kwargs (`dict`): what it was given beyond its own arguments.

    Raises:
        TypeError: for a name that neither the model's `forward` nor Transformers knows, with the nearest that one does.
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
    """Warn, once, of a call in training mode without labels: a loss computed outside may see part of the outputs."""
    if model.training and torch.is_grad_enabled():
        _warn_once(f"{type(model).__name__} was called in training mode without `labels`. {message}")


# torch.compile calls such a function while it traces, and so warns when it compiles, without a break in the graph.
@torch.compiler.assume_constant_result
def _warn_once(message: str) -> None:
    logger.warning_once(message)
