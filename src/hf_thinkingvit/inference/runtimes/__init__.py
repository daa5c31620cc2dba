"""Runtimes other than PyTorch behind the loop over stages: export to a folder, and what loads it."""

from .exported_model import ExportedModel
from .folder import export_model, from_exported, with_runtime
from .manifest import is_exported
from .programs import PRECISIONS, RUNTIMES


__all__ = ["PRECISIONS", "RUNTIMES", "ExportedModel", "export_model", "from_exported", "is_exported", "with_runtime"]
