"""Checks that the tests of every family's conversion share."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_thinkingvit import convert_checkpoint


@torch.no_grad()
def assert_golden_logits(golden: Path, model) -> None:
    """Assert that the last stage's logits equal the official ones in `golden`."""
    expected = load_file(golden / "expected.safetensors")
    logits = model(expected["pixel_values"], threshold=0.0).logits
    torch.testing.assert_close(logits, expected[f"stage{model.config.num_stages - 1}.logits"], atol=1e-4, rtol=0)


def assert_refused(source: Path, tmp_path: Path, match: str, error: type[Exception] = ValueError, **overrides) -> None:
    """Assert that `source` is refused with a message that matches, and nothing is written."""
    with pytest.raises(error, match=match):
        convert_checkpoint(source, tmp_path / "out", **overrides)
    assert not (tmp_path / "out").exists()


def assert_refused_without(key: str, state_dict: dict[str, torch.Tensor], folder: Path, tmp_path: Path) -> None:
    """A checkpoint in `folder` that lacks `key` is refused, and the message names the key."""
    rest = {name: tensor for name, tensor in state_dict.items() if name != key}
    save_file(rest, folder / "model.safetensors")
    assert_refused(folder, tmp_path, f"Missing keys: {key}. Unexpected keys: none")
