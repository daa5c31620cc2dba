"""
Adaptive vision transformers for Hugging Face Transformers.

Importing this package registers its models with the Auto classes, so that `AutoModelForImageClassification` and
`pipeline("image-classification")` load them like any model in Transformers.
"""

import sys
from pathlib import PurePath

from .version import __version__  # noqa: F401


def _is_imported_later() -> bool:
    """
    Whether this program imports `library.py` itself, once it has done what it can before torch and Transformers are
    imported, which takes seconds: the console command reads its words, and refuses wrong ones (`commands/command.py`);
    a demo paints its page (`demo/app.py`).
    """
    program = PurePath((getattr(sys, "argv", None) or [""])[0]).name
    is_demo = getattr(sys.modules.get("__main__"), "IMPORTS_HF_THINKINGVIT_LATER", False)
    return is_demo or program in ("hf-thinkingvit", "hf-thinkingvit.exe")


if not _is_imported_later():
    from .library import *  # noqa: F403
    from .library import __all__  # noqa: F401
