"""
Adaptive vision transformers for Hugging Face Transformers.

Importing this package registers its models with the Auto classes, so that `AutoModelForImageClassification` and
`pipeline("image-classification")` load them like any model in Transformers.

Where torch is not installed, `hf_thinkingvit.torch_free` is all that works.
"""

import sys
from importlib.util import find_spec
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


def _refuse_without_torch(name: str):
    """`ImportError` for the names of `library.py`. Modules of the package are found as everywhere."""
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is None:
        from . import needs_torch  # noqa: F401  raises
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if find_spec("torch") is None:
    __getattr__ = _refuse_without_torch
elif not _is_imported_later():
    from .library import *  # noqa: F403
    from .library import __all__  # noqa: F401
