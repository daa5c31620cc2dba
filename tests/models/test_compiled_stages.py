import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from hf_thinkingvit.inference import AdaptiveEngine
from tests.utils import lively_model, lively_swin, middle_threshold, random_images


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "make, overrides",
    [
        (lively_model, {"thinking_stages": [1, 2], "hidden_size": 16, "num_hidden_layers": 1}),
        (lively_swin, {"head_rounds": [[1], [2]], "num_heads": [2], "depths": [2]}),
    ],
    ids=["vit", "swin"],
)
@torch.no_grad()
def test_answers_are_the_eager_ones(make, overrides):
    """With the compiler that users get; stages of one layer, so that it does not take long."""
    model, images = make(**overrides), random_images(3)
    threshold = middle_threshold(model, images)
    expected = model(images, threshold=threshold)
    model.compile_stages([4])
    outputs = model(images, threshold=threshold)
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-4, rtol=0)
    assert torch.equal(outputs.exit_stage, expected.exit_stage)


@pytest.mark.parametrize("make", [lively_model, lively_swin], ids=["vit", "swin"])
@torch.no_grad()
def test_nothing_compiles_again_in_steady_state(make):
    model, images = make(), random_images(30)
    expected = [model(images[:count], threshold=[0.9, 0.9]) for count in range(1, 31)]
    model.compile_stages([4, 16], backend="eager")
    for count in (1, 5, 30):
        model(images[:count], threshold=0.0)
    warmed_up = compilations()
    # begin; three stages; two ways on: for two batch sizes each.
    assert warmed_up == 12
    for count, one in enumerate(expected, start=1):
        outputs = model(images[:count], threshold=[0.9, 0.9])
        torch.testing.assert_close(outputs.logits, one.logits, atol=1e-5, rtol=0)
        assert torch.equal(outputs.exit_stage, one.exit_stage)
    assert compilations() == warmed_up


@pytest.mark.parametrize("make", [lively_model, lively_swin], ids=["vit", "swin"])
@torch.no_grad()
def test_the_engine_runs_compiled_stages(make):
    model, images = make(), random_images(40)
    threshold = [middle_threshold(model, images), 0.0]
    expected = model(images, threshold=threshold)
    model.compile_stages([8], backend="eager")
    results = list(AdaptiveEngine(model, batch_size=8, threshold=threshold)(images))
    torch.testing.assert_close(torch.stack([r.logits for r in results]), expected.logits, atol=1e-5, rtol=0)
    assert compilations() == 6


def test_what_is_not_compiled_runs_as_before():
    model, images = lively_model(), random_images(2)
    model.compile_stages([2], backend="eager")
    model.train()(images, labels=torch.tensor([0, 1])).loss.backward()
    model.eval()
    assert model(images).logits.requires_grad
    with torch.no_grad():
        assert len(model(images, output_hidden_states=True, threshold=0.0).hidden_states) == 10
        assert compilations() == 0
        model.compile_stages(None)
        model(images)
    assert compilations() == 0


@pytest.mark.parametrize(
    "make, overrides",
    [(lively_model, {"thinking_stages": [1, 4]}), (lively_swin, {"head_rounds": [[1, 2], [2, 4]]})],
    ids=["vit", "swin"],
)
@torch.no_grad()
def test_other_image_sizes_have_programs_of_their_own(make, overrides):
    model, images = make(**overrides), random_images(2, 48)
    expected = model(images, interpolate_pos_encoding=True, threshold=0.0).logits
    model.compile_stages([2], backend="eager")
    for _ in range(3):
        model(random_images(2), threshold=0.0)
        logits = model(images, interpolate_pos_encoding=True, threshold=0.0).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert compilations() == 8


@torch.no_grad()
def test_survives_saving(tmp_path):
    model, images = lively_model(), random_images(2)
    model.compile_stages([2], backend="eager")
    expected = model(images).logits
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path).eval()(images).logits, expected)


@pytest.mark.parametrize("batch_sizes", [[], [0], [1.5], "8", 8])
def test_refuses(batch_sizes):
    with pytest.raises(ValueError, match="`batch_sizes`"):
        lively_model().compile_stages(batch_sizes)
