"""Converting official checkpoints to models of this package; also `python -m hf_thinkingvit.conversion`."""

from .. import needs_torch  # noqa: F401
from .convert import convert_checkpoint


__all__ = ["convert_checkpoint"]
