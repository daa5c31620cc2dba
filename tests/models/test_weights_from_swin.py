import pytest
import torch
from transformers import SwinConfig, SwinForImageClassification, SwinModel

from hf_thinkingvit import ThinkingSwinForImageClassification
from tests.models.test_weights_from_vit import trained_vit
from tests.utils import perturbed, random_images


def trained_swin(**overrides) -> SwinForImageClassification:
    """A Swin classifier with weights large enough to show in the logits; shifted and padded windows."""
    fields = {
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 3,
        "image_size": 32,
        "patch_size": 4,
        "id2label": {0: "cat", 1: "dog", 2: "owl"},
        "label2id": {"cat": 0, "dog": 1, "owl": 2},
    }
    return perturbed(SwinForImageClassification(SwinConfig(**{**fields, **overrides})))


@pytest.mark.parametrize("rounds", [None, [[2, 4]], [[1, 2], [2, 4]], [[1, 1], [1, 3], [2, 4]]])
@pytest.mark.parametrize("qkv_slicing", ["each_projection", "leading_rows"])
@torch.no_grad()
def test_last_round_answers_as_the_source(rounds, qkv_slicing):
    swin, pixel_values = trained_swin(), random_images()
    model = ThinkingSwinForImageClassification.from_swin(swin, rounds, qkv_slicing=qkv_slicing)
    assert model.config.head_rounds == (rounds or [[2, 2], [2, 4]])
    logits = model(pixel_values, threshold=0.0).logits
    torch.testing.assert_close(logits, swin(pixel_values).logits, atol=1e-5, rtol=0)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}


@pytest.mark.parametrize(
    "overrides",
    [
        {"window_size": 4},
        {"window_size": 2, "depths": [1, 3], "layer_norm_eps": 1e-3},
        {"qkv_bias": False, "mlp_ratio": 1.5, "hidden_act": "gelu_new", "num_channels": 1},
        {"depths": [2, 2, 2], "num_heads": [2, 4, 8], "window_size": 2},
        {"use_absolute_embeddings": True},
        {"image_size": (32, 48), "patch_size": (4, 8)},
        {"patch_size": 3},
    ],
    ids=str,
)
@torch.no_grad()
def test_every_kind_of_source(overrides):
    swin = trained_swin(**overrides)
    size = overrides.get("image_size", 32)
    pixel_values = random_images(4, size)[:, : swin.config.num_channels]
    if "patch_size" in overrides:  # 11 × 11 patches with padding, to which tokens cannot be recycled
        pixel_values = random_images(4, size)
    model = ThinkingSwinForImageClassification.from_swin(swin, [list(swin.config.num_heads)])
    torch.testing.assert_close(model(pixel_values).logits, swin(pixel_values).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(48, 32), (24, 40), (80, 80), (20, 64), (33, 50)])
@torch.no_grad()
def test_other_resolutions_as_transformers_pads_them(size):
    swin, pixel_values = trained_swin(), random_images(3, size)
    model = ThinkingSwinForImageClassification.from_swin(swin, [[2, 4]])
    torch.testing.assert_close(model(pixel_values).logits, swin(pixel_values).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_interpolated_position_embeddings_are_swins():
    swin, pixel_values = trained_swin(use_absolute_embeddings=True), random_images(2, 64)
    model = ThinkingSwinForImageClassification.from_swin(swin, [[2, 4]])
    expected = swin(pixel_values, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(model(pixel_values, interpolate_pos_encoding=True).logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_heads_of_a_narrower_round_are_heads_of_the_source():
    swin = trained_swin()
    model = ThinkingSwinForImageClassification.from_swin(swin, [[2, 2], [2, 4]])
    source = swin.swin.encoder.layers[1].blocks[0].attention
    hidden_states = torch.randn(3, 9, 8)
    found = model.thinking_swin.layers[1].blocks[0].attention._project(hidden_states)
    for part, projection in zip(found, (source.q_proj, source.k_proj, source.v_proj)):
        expected = hidden_states @ projection.weight[:8, :8].T + projection.bias[:8]
        torch.testing.assert_close(part, expected.unflatten(-1, (2, 4)).transpose(1, 2))


@torch.no_grad()
def test_from_a_folder(tmp_path):
    swin, pixel_values = trained_swin(), random_images()
    swin.save_pretrained(tmp_path)
    model = ThinkingSwinForImageClassification.from_swin(tmp_path, threshold=0.0, drop_path_rate=0.1)
    assert not model.training and model.config.drop_path_rate == 0.1
    torch.testing.assert_close(model(pixel_values).logits, swin(pixel_values).logits, atol=1e-5, rtol=0)


def test_refuses_other_models(tmp_path):
    with pytest.raises(ValueError, match="Expected a `SwinForImageClassification`, got ViTForImageClassification"):
        ThinkingSwinForImageClassification.from_swin(trained_vit())
    SwinModel(trained_swin().config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no complete image classifier.*classifier\.bias.*`SwinForImage"):
        ThinkingSwinForImageClassification.from_swin(tmp_path)


@pytest.mark.parametrize(
    "overrides",
    [
        {"embed_dim": 16},
        {"num_heads": [1, 2]},
        {"depths": [1, 1]},
        {"window_size": 4},
        {"mlp_ratio": 2},
    ],
)
def test_refuses_overrides_of_what_the_weights_fix(overrides):
    with pytest.raises(ValueError, match=f"`{next(iter(overrides))}` cannot be overridden"):
        ThinkingSwinForImageClassification.from_swin(trained_swin(), **overrides)


def test_refuses_rounds_that_the_source_does_not_have():
    with pytest.raises(ValueError, match="`head_rounds` asks for the heads"):
        ThinkingSwinForImageClassification.from_swin(trained_swin(), [[2, 8]])


@pytest.mark.parametrize("overrides", [{"num_labels": 5}, {"id2label": {index: f"c{index}" for index in range(5)}}])
@torch.no_grad()
def test_another_number_of_labels_gets_a_new_classifier(overrides, caplog):
    swin, pixel_values = trained_swin(), random_images()
    model = ThinkingSwinForImageClassification.from_swin(swin, threshold=0.0, **overrides)
    assert model.config.id2label == overrides.get("id2label", {index: f"LABEL_{index}" for index in range(5)})
    assert 0.01 < model.classifier.weight.std() < 0.03  # as initialised, `initializer_range` 0.02
    assert "newly initialized" in caplog.text and "['classifier.bias', 'classifier.weight']" in caplog.text
    model.classifier.weight.copy_(swin.classifier.weight[[0, 1, 2, 0, 1]])
    model.classifier.bias.copy_(swin.classifier.bias[[0, 1, 2, 0, 1]])
    expected = swin(pixel_values).logits[:, [0, 1, 2, 0, 1]]
    torch.testing.assert_close(model(pixel_values).logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_same_number_of_labels_keeps_the_classifier(caplog):
    swin, pixel_values = trained_swin(), random_images()
    for overrides in ({"num_labels": 3}, {"id2label": {0: "a", 1: "b", 2: "c"}}):
        model = ThinkingSwinForImageClassification.from_swin(swin, threshold=0.0, **overrides)
        assert model.config.id2label == overrides.get("id2label", swin.config.id2label)
        torch.testing.assert_close(model(pixel_values).logits, swin(pixel_values).logits, atol=1e-5, rtol=0)
    assert "newly initialized" not in caplog.text


def test_a_source_without_classifier(tmp_path):
    SwinModel(trained_swin().config).save_pretrained(tmp_path)
    model = ThinkingSwinForImageClassification.from_swin(tmp_path, num_labels=7)
    assert model(random_images()).logits.shape == (6, 7)
