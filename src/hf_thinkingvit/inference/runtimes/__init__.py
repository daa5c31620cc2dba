"""Runtimes other than PyTorch behind the loop over stages: export to a folder, and what loads it."""

from ...torch_free.manifest import is_exported
from ...torch_free.programs import PRECISIONS, RUNTIMES
from .exported_model import ExportedModel
from .folder import export_model, from_exported, with_runtime


__all__ = ["PRECISIONS", "RUNTIMES", "ExportedModel", "export_model", "from_exported", "is_exported", "with_runtime"]
