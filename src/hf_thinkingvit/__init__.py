"""
Adaptive vision transformers for Hugging Face Transformers.

Importing this package registers its models with the Auto classes, so that `AutoModelForImageClassification` and
`pipeline("image-classification")` load them like any model in Transformers.
"""

import sys
from pathlib import PurePath

from .version import __version__  # noqa: F401


# The console command reads its words, and refuses wrong ones, before it imports torch and Transformers, which takes
# seconds; what it runs then imports the rest (`commands/command.py`).
if PurePath((getattr(sys, "argv", None) or [""])[0]).name not in ("hf-thinkingvit", "hf-thinkingvit.exe"):
    from .library import *  # noqa: F403
    from .library import __all__  # noqa: F401
