"""Imported first by what needs torch, so that its absence is said in one way, whatever else is missing."""

from importlib.util import find_spec


if find_spec("torch") is None:
    raise ImportError(
        "This part of hf_thinkingvit needs torch, which is not installed: pip install hf-thinkingvit, with its "
        "dependencies. Without torch there is `hf_thinkingvit.torch_free`, which runs exported folders."
    )
