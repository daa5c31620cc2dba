"""Token pruning in the last stage: which tokens remain, in everything that runs stages."""

import copy
import pickle

import numpy as np
import pytest
import torch

from hf_thinkingvit import ThinkingViTConfig, ThinkingViTForImageClassification
from hf_thinkingvit.models.token_pruning import ScorePredictor
from tests.utils import lively_model, middle_threshold, random_images, tiny_config


PRUNING = {"pruning_layers": [1, 2], "pruning_keep_rate": 0.5}  # of 16 patches 8 remain, then 4


@pytest.fixture
def model():
    return lively_model(**PRUNING)


def without_pruning(model) -> ThinkingViTForImageClassification:
    plain = lively_model()
    weights = {name: weight for name, weight in model.state_dict().items() if "score_predictors" not in name}
    plain.load_state_dict(weights)
    return plain


@torch.no_grad()
def test_with_a_rate_of_one_the_logits_are_those_without_pruning(model):
    """The patches are put into another order, which changes nothing."""
    images = random_images()
    expected = without_pruning(model)(images).logits
    torch.testing.assert_close(model(images, keep_rate=1.0).logits, expected, atol=1e-5, rtol=0)
    assert (model(images).logits - expected).abs().max() > 0.1


@torch.no_grad()
def test_only_the_last_stage_removes_tokens(model):
    images, plain = random_images(), without_pruning(model)
    expected = plain(images, output_stage_logits=True).stage_logits
    for ours, theirs in zip(model(images, output_stage_logits=True).stage_logits[:-1], expected):
        torch.testing.assert_close(ours, theirs)
    assert model.thinkingvit(images, max_stages=2).last_hidden_state.shape == (6, 17, 16)
    assert model.thinkingvit(images).last_hidden_state.shape == (6, 5, 32)
    assert model.thinkingvit(images, keep_rate=[0.5, 0.125]).last_hidden_state.shape == (6, 3, 32)


@torch.no_grad()
def test_kept_tokens_have_the_highest_scores():
    model = lively_model(thinking_stages=[4], pruning_layers=[0, 2], pruning_keep_rate=[0.5, 0.25])
    images = random_images()
    first, second = model(images, output_kept_tokens=True).kept_tokens
    embeddings = model.thinkingvit.embeddings(images, 0, 32)
    scores = model.thinkingvit.score_predictors[0](embeddings[:, 1:])[..., 0]
    assert torch.equal(first, scores.argsort(dim=1, descending=True)[:, :8])
    assert second.shape == (6, 4) and all(
        set(row) < set(before) for row, before in zip(second.tolist(), first.tolist())
    )


@torch.no_grad()
def test_kept_tokens_are_of_the_images_that_ran_the_last_stage(model):
    images = random_images(12)
    threshold = [middle_threshold(model, images), 0.0]
    outputs = model(images, threshold=threshold, output_kept_tokens=True)
    ran = outputs.exit_stage == 2
    assert 0 < ran.sum() < 12
    for some, of_all in zip(outputs.kept_tokens, model(images, output_kept_tokens=True).kept_tokens, strict=True):
        assert torch.equal(some, of_all[ran])
    for arguments in ({"threshold": 10.0}, {"max_stages": 2}):
        kept = model(images, output_kept_tokens=True, **arguments).kept_tokens
        assert [tuple(rows.shape) for rows in kept] == [(0, 8), (0, 4)]
    kept = model(images, threshold=threshold, output_kept_tokens=True, output_stage_logits=True).kept_tokens
    assert len(kept[0]) == 12  # all stages run for every image
    assert model(images).kept_tokens is None and lively_model()(images, output_kept_tokens=True).kept_tokens == ()


@pytest.mark.parametrize("size, counts", [((48, 24), [9, 4]), ((8, 8), [1, 1]), ((8, 16), [1, 1])])
@torch.no_grad()
def test_any_grid(model, size, counts):
    kept = model(random_images(2, size), interpolate_pos_encoding=True, output_kept_tokens=True).kept_tokens
    assert [rows.shape[1] for rows in kept] == counts


@pytest.mark.parametrize("layers", [[0], [2], [0, 1, 2]], ids=str)
@torch.no_grad()
def test_the_class_token_alone_is_computed_in_the_last_layer(layers):
    model, images = lively_model(pruning_layers=layers, use_distillation_token=True), random_images()
    expected = model.classifier(model.thinkingvit(images).last_hidden_state[:, 0])
    torch.testing.assert_close(model(images).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rate", [[0.5, 0.25], np.array([0.5, 0.25]), torch.tensor([0.5, 0.25]), np.float64(0.5)])
@torch.no_grad()
def test_forms_of_the_rate(model, rate):
    images = random_images()
    assert torch.equal(model(images, keep_rate=rate).logits, model(images).logits)


@torch.no_grad()
def test_the_configured_rate_is_read_in_each_call(model):
    images = random_images()
    expected = model(images, keep_rate=[0.75, 0.25]).logits
    model.config.pruning_keep_rate = [0.75, 0.25]
    assert torch.equal(model(images).logits, expected)


@torch.no_grad()
def test_copies_and_saved_models(model, tmp_path):
    images = random_images()
    model.save_pretrained(tmp_path)
    expected = model(images, keep_rate=0.75).logits
    loaded = ThinkingViTForImageClassification.from_pretrained(tmp_path, pruning_keep_rate=0.75)
    assert loaded.config.pruning_layers == [1, 2]
    for other in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        torch.testing.assert_close(other(images).logits, expected)


@torch.no_grad()
def test_compiled_stages():
    """They follow the rate of a call and that of the configuration, also where it is changed later."""
    model = lively_model(thinking_stages=[4], num_hidden_layers=1, pruning_layers=[0], pruning_keep_rate=0.5)
    images = random_images(5)
    expected = {rate: model(images, keep_rate=rate).logits for rate in (0.5, 0.25)}
    model.compile_stages([8], backend="eager")
    torch.testing.assert_close(model(images).logits, expected[0.5], atol=1e-5, rtol=0)
    torch.testing.assert_close(model(images, keep_rate=0.25).logits, expected[0.25], atol=1e-5, rtol=0)
    model.config.pruning_keep_rate = 0.25
    torch.testing.assert_close(model(images).logits, expected[0.25], atol=1e-5, rtol=0)
    kept = model(images, keep_rate=0.75, output_kept_tokens=True).kept_tokens
    assert [tuple(rows.shape) for rows in kept] == [(5, 12)]


def test_without_pruning_layers_nothing_is_added():
    model = lively_model()
    assert not any("predictor" in name for name in model.state_dict())
    assert model.config.pruning_layers is None and model.config.pruning_keep_rate is None


def test_a_task_that_reads_all_patches_is_refused():
    class Dense(ThinkingViTForImageClassification):
        reads_all_tokens = True

    with pytest.raises(ValueError, match="Dense reads every patch"):
        Dense(tiny_config(**PRUNING))


@pytest.mark.parametrize("keep_rate", [0.0, -0.5, 1.5, [0.5], [0.5, 0.6], [0.5, 0.0], "0.5", True, float("nan")])
@pytest.mark.parametrize("max_stages", [1, 3])
def test_bad_rates_of_a_call(model, keep_rate, max_stages):
    for network in (model, model.thinkingvit):
        with pytest.raises(ValueError, match="`keep_rate`"):
            network(random_images(1), keep_rate=keep_rate, max_stages=max_stages)


def test_a_rate_needs_pruning_layers():
    with pytest.raises(ValueError, match="`keep_rate` is of models with `pruning_layers`"):
        lively_model()(random_images(1), keep_rate=0.5)


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"pruning_keep_rate": 0.5}, "no effect without `pruning_layers`"),
        ({"pruning_layers": [1, 3]}, "strictly increasing list of layers from 0 to 2"),
        ({"pruning_layers": [2, 1]}, "strictly increasing"),
        ({"pruning_layers": [1, 1]}, "strictly increasing"),
        ({"pruning_layers": [-1]}, "`pruning_layers` must be an integer of at least 0"),
        ({"pruning_layers": [True]}, "`pruning_layers` must be an integer"),
        ({"pruning_layers": [1], "pruning_keep_rate": 0}, "must be above 0"),
        ({"pruning_layers": [1], "pruning_keep_rate": 1.1}, "between 0 and 1"),
        ({"pruning_layers": [1, 2], "pruning_keep_rate": [0.5]}, "a list of 2"),
        ({"pruning_layers": [1, 2], "pruning_keep_rate": [0.5, 0.7]}, "cannot increase"),
        ({"pruning_layers": [1], "thinking_stages": [3], "hidden_size": 18}, "multiple of 4"),
    ],
)
def test_bad_configurations(fields, match):
    with pytest.raises(ValueError, match=match):
        tiny_config(**fields)


def test_the_default_rate_is_that_of_the_released_models():
    config = ThinkingViTConfig(thinking_stages=[6], pruning_layers=[3, 6, 9])
    assert config.pruning_keep_rate == 0.7
    assert ThinkingViTConfig.from_dict(config.to_dict(), pruning_keep_rate=0.9).pruning_keep_rate == 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_log_probabilities_in_float32(dtype):
    predictor = ScorePredictor(8).to(dtype)
    scores = predictor(torch.randn(2, 5, 8, dtype=dtype))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.exp().sum(dim=-1), torch.ones(2, 5))


@pytest.mark.parametrize("before, after", [([1], None), ([1], [2]), (None, [1])])
def test_pruning_layers_cannot_be_set_on_a_model(before, after):
    model = lively_model(thinking_stages=[1, 4], num_hidden_layers=3, pruning_layers=before)
    model.config.pruning_layers = after
    with pytest.raises(ValueError, match="`config.pruning_layers` is .* now, but the model has"):
        model(random_images(1))
