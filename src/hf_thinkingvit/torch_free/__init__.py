"""
Exported classifiers without torch: NumPy arrays, a runtime, and the decisions as programs of it.

Nothing that this package imports needs torch, which need not be installed. `load_exported` loads what
`hf_thinkingvit.inference.export_model` wrote, elsewhere, with torch.
"""

from .classifier import Classification, ExportedPrograms, StagedAnswers, load_exported


__all__ = ["Classification", "ExportedPrograms", "StagedAnswers", "load_exported"]
