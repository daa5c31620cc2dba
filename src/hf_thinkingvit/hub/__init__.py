"""Publishing: model cards made from what was measured, and one-commit pushes to the Hub."""

from .. import needs_torch  # noqa: F401
from .card import model_card
from .publish import push
from .results import accuracy_results, read_results
from .space import push_space


__all__ = ["accuracy_results", "model_card", "push", "push_space", "read_results"]
