"""
Exports of a model that removes tokens: the same answers and the same patches as without, in batches of any size.
`test_export.py` has the programs and files of one that also thinks in stages.
"""

import numpy as np
import pytest
import torch
from torch import nn

from hf_thinkingvit.models.staged_loop import step_stage
from tests.utils import lively_model, random_images


class LastStage(nn.Module):
    """Logits of a model of one stage, and the patches that remain at each pruning layer."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state, rule = {"pixel_values": pixel_values}, self.model.exit_rule()
        answer = step_stage(self.model, rule, range(1), 0, state, output_kept_tokens=True).answer
        return tuple(answer[name] for name in ("logits", "kept_tokens.0", "kept_tokens.1"))


@pytest.fixture(scope="module")
def program():
    """Of a model of two layers, both of which remove patches; and the program that `torch.export` makes of it."""
    model = lively_model(
        thinking_stages=[4],
        num_hidden_layers=2,
        pruning_layers=[0, 1],
        pruning_keep_rate=0.7,
        _attn_implementation="eager",
    )
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        exported = torch.export.export(LastStage(model), (random_images(2),), dynamic_shapes=({0: batch},), strict=True)
    return model, exported


def assert_equal(model, run) -> None:
    for batch_size in (1, 2, 5):
        images = random_images(batch_size, seed=batch_size)
        with torch.no_grad():
            expected = model(images, output_kept_tokens=True)
        logits, *kept = run(images)
        np.testing.assert_allclose(logits, expected.logits, atol=1e-4, rtol=0)
        for ours, theirs in zip(kept, expected.kept_tokens, strict=True):
            assert ours.shape == theirs.shape
            np.testing.assert_array_equal(np.sort(ours, axis=1), theirs.sort().values)


@torch.no_grad()
def test_torch_export(program):
    model, exported = program
    module = exported.module()
    assert_equal(model, lambda images: [output.numpy() for output in module(images)])


def test_onnx(program, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, exported = program
    torch.onnx.export(exported, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    name = session.get_inputs()[0].name
    assert_equal(model, lambda images: session.run(None, {name: images.numpy()}))
