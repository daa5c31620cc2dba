"""Official checkpoints → models of this package. From the command line: `python -m hf_thinkingvit.conversion`."""

from .convert import convert_checkpoint


__all__ = ["convert_checkpoint"]
