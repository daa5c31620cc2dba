"""Models that earlier versions saved, with the outputs that they gave: see `tests/fixtures/make_saved_models.py`."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageClassification

import hf_thinkingvit
from tests.fixtures.make_saved_models import MODELS, SAVED_MODELS, outputs_of


# `make_saved_models.py` asserts that float32 and float64 agree within 3e-6; 1e-5 allows for other kernels' rounding.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
# From the name of a field in the saved configurations to its present name.
RENAMED = {"distilled": "use_distillation_token"}
# Fields that hold the version and the code files of the saving version.
OF_THE_VERSION = {"transformers_version", "auto_map", "custom_pipelines"}


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def saved(name):
    """The model in evaluation mode as the present version loads it, and the stored inputs and outputs."""
    model, report = AutoModelForImageClassification.from_pretrained(SAVED_MODELS / name, output_loading_info=True)
    assert not any(report.values()), report
    return model, load_file(SAVED_MODELS / name / "expected.safetensors")


def assert_gives(name, model, expected) -> None:
    """Assert that the model gives the outputs in `expected`: integers exactly, floats up to rounding."""
    inputs = {field: expected[field] for field in ("pixel_values", "labels")}
    outputs = outputs_of(name, model, **inputs)
    assert outputs.keys() | inputs.keys() == expected.keys()
    for field, value in outputs.items():
        assert value.dtype == expected[field].dtype, field
        tolerance = TOLERANCE if value.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(value, expected[field], **tolerance, msg=lambda text: f"{field}: {text}")


def test_every_family_has_one():
    configs = [getattr(hf_thinkingvit, name) for name in hf_thinkingvit.__all__ if name.endswith("Config")]
    saved = {AutoConfig.from_pretrained(SAVED_MODELS / name).model_type for name in MODELS}
    assert saved == {config.model_type for config in configs}


def test_outputs(name, saved):
    assert_gives(name, *saved)


@torch.no_grad()
def test_outputs_do_not_depend_on_what_else_is_asked_for(saved):
    model, expected = saved
    outputs = model(expected["pixel_values"])
    torch.testing.assert_close(outputs.logits, expected["logits"], **TOLERANCE)
    for field in ("exit_stage", "macs", "mean_depth"):
        if field in expected:
            assert torch.equal(outputs[field], expected[field]), field


def test_no_field_of_the_configuration_is_lost(name):
    written = json.loads((SAVED_MODELS / name / "config.json").read_text())
    loaded = json.loads(AutoConfig.from_pretrained(SAVED_MODELS / name).to_json_string(use_diff=False))
    for field in written.keys() - OF_THE_VERSION:
        present = field if field in loaded else RENAMED[field]
        assert loaded[present] == written[field], field


def test_saved_again(name, saved, tmp_path):
    model, expected = saved
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert again.config.to_json_string() == model.config.to_json_string()
    assert_gives(name, again, expected)
