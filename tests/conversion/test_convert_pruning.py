"""Checkpoints of DynamicViT, and of ThinkingViT with DynamicViT in its last stage."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_thinkingvit import EXIT_CRITERIA, convert_checkpoint
from hf_thinkingvit.conversion.convert import load_official, read_checkpoint
from tests.conversion.goldens import assert_golden_logits, assert_refused, assert_refused_without
from tests.utils import FIXTURES


DYNAMICVIT, COMBINED = FIXTURES / "dynamicvit", FIXTURES / "thinking_dynamicvit"


def write_pth(folder, golden, name="model.pth", **args):
    """
    As training scripts save it: the weights under `model`, their average, a NumPy scalar and the arguments, here with
    the sizes of the golden, which real files imply.
    """
    sizes = json.loads((golden / "config.json").read_text())["model_args"]
    sizes = {key: sizes[key] for key in ("embed_dim", "num_heads")}
    weights = load_file(golden / "model.safetensors")
    content = {
        "model": weights,
        "model_ema": {key: torch.zeros_like(weight) for key, weight in weights.items()},
        "epoch": 29,
        "best": np.float64(81.25),
        "args": argparse.Namespace(**sizes, **args),
    }
    torch.save(content, folder / name)
    return folder / name


@torch.no_grad()
def assert_kept(model, expected) -> None:
    """The remaining patches are exactly the official ones, and so are their scores."""
    kept = model(expected["pixel_values"], threshold=0.0, output_kept_tokens=True).kept_tokens
    assert len(kept) == 3
    for index, rows in enumerate(kept):
        assert torch.equal(rows.sort().values, expected[f"keep.{index}"].sort().values)


def test_dynamicvit_gives_the_official_numbers(tmp_path):
    convert_checkpoint(DYNAMICVIT, tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    config, expected = model.config, load_file(DYNAMICVIT / "expected.safetensors")
    assert (config.thinking_stages, config.pruning_layers, config.pruning_keep_rate) == ([3], [1, 3, 5], 0.7)
    with torch.no_grad():
        logits = model(expected["pixel_values"]).logits
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    assert_kept(model, expected)


@pytest.mark.parametrize("golden", [DYNAMICVIT, COMBINED], ids=lambda folder: folder.name)
@torch.no_grad()
def test_scores_are_the_official_ones(golden):
    model, expected = load_official(read_checkpoint(golden)), load_file(golden / "expected.safetensors")
    scores = []
    for predictor in model.thinkingvit.score_predictors:
        predictor.register_forward_hook(lambda module, inputs, output: scores.append(output[..., 0]))
    model(expected["pixel_values"], threshold=0.0)
    for index, ours in enumerate(scores):
        torch.testing.assert_close(ours, expected[f"score.{index}"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_combination_gives_the_official_numbers(tmp_path):
    """Cut to its widest stage, with its exits: an image exits iff the entropy of all probabilities is at most τ."""
    convert_checkpoint(COMBINED, tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    config, expected = model.config, load_file(COMBINED / "expected.safetensors")
    assert (config.thinking_stages, config.hidden_size) == ([1, 2], 32)
    assert (config.pruning_layers, config.pruning_keep_rate) == ([1, 3, 5], 0.8)
    assert (config.exit_criterion, config.exit_at_threshold, config.threshold) == ("entropy", True, 0.0)
    assert len(model.thinkingvit.recyclers) == 1
    pixel_values = expected["pixel_values"]
    stage_logits = model(pixel_values, output_stage_logits=True).stage_logits
    for index, logits in enumerate(stage_logits):
        torch.testing.assert_close(logits, expected[f"stage{index}.logits"], atol=1e-4, rtol=0)
        score = EXIT_CRITERIA["entropy"].score(logits, 10)
        torch.testing.assert_close(score, expected[f"stage{index}.entropy"], atol=1e-4, rtol=0)
        tokens = model.thinkingvit(pixel_values, max_stages=index + 1).last_hidden_state
        torch.testing.assert_close(tokens, expected[f"stage{index}.last_hidden_state"], atol=1e-4, rtol=0)
    assert_kept(model, expected)
    thresholds = [name.removesuffix(".stage") for name in expected if name.endswith(".stage")]
    assert len(thresholds) == 4
    for name in thresholds:
        # The files' names round τ, maybe to below an image's own entropy. -1, the official "never", is 0 here.
        threshold = max(float(name.removeprefix("threshold.")) + 5e-6, 0.0)
        outputs = model(pixel_values, threshold=0.0 if "-1" in name else threshold)
        assert torch.equal(outputs.exit_stage, expected[f"{name}.stage"])
        torch.testing.assert_close(outputs.logits, expected[f"{name}.logits"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_without_pruning_the_combination_is_a_thinkingvit():
    model, expected = load_official(read_checkpoint(COMBINED)), load_file(COMBINED / "expected.safetensors")
    logits = model(expected["pixel_values"], keep_rate=1.0).logits
    torch.testing.assert_close(logits, expected["unpruned.stage1.logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("stages", [None, ["1", "2"]], ids=str)
def test_a_file_as_training_scripts_save_it(stages, tmp_path):
    """Stages from its tensors or its arguments; and the processor of the official evaluation."""
    stated = {} if stages is None else {"thinking_stages": stages}
    source = write_pth(tmp_path, COMBINED, base_rate=0.8, pruning_loc=[1, 3, 5], img_size=32, **stated)
    model = convert_checkpoint(source, tmp_path / "out")
    assert model.config.thinking_stages == [1, 2] and model.config.pruning_keep_rate == 0.8
    assert_golden_logits(COMBINED, model)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert (processor.crop_size["height"], processor.size["shortest_edge"]) == (32, 36)


def test_what_no_file_states_comes_from_the_caller(tmp_path):
    source = write_pth(tmp_path, DYNAMICVIT)
    assert_refused(source, tmp_path, "does not state `pruning_layers`")
    assert_refused(source, tmp_path, "does not state `pruning_keep_rate`", pruning_layers=[1, 3, 5])
    fields = {"pruning_layers": [1, 3, 5], "pruning_keep_rate": [0.7, 0.7**2, 0.7**3]}
    model = convert_checkpoint(source, tmp_path / "out", **fields)
    assert_kept(model, load_file(DYNAMICVIT / "expected.safetensors"))


def test_stages_that_do_not_fit_the_predictors(tmp_path):
    assert_refused(COMBINED, tmp_path, "prunes a stage of 32 channels", thinking_stages=[1, 4])


@pytest.mark.parametrize("key", ["alpha.0", "score_predictor.2.out_conv.4.bias", "proj_layer.bias"])
def test_a_missing_tensor_is_named(key, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(COMBINED, folder)
    assert_refused_without(key, load_file(COMBINED / "model.safetensors"), folder, tmp_path)


def test_objects_that_could_run_code_are_still_refused(tmp_path):
    torch.save(
        {"model": load_file(DYNAMICVIT / "model.safetensors"), "best": argparse.ArgumentParser}, tmp_path / "a.pth"
    )
    assert_refused(tmp_path / "a.pth", tmp_path, "holds a `argparse.ArgumentParser`")
