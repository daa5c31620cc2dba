"""Publishing: model cards made from what was measured, and one-commit pushes to the Hub."""

from .card import model_card
from .publish import push
from .results import accuracy_results, read_results


__all__ = ["accuracy_results", "model_card", "push", "read_results"]
