"""Models as `AutoBackbone`: feature maps of a chosen stage, Transformers' own backbone tests, and UperNet's head."""

import copy
import os
import unittest

import pytest
import torch
from transformers import AutoBackbone, AutoConfig, UperNetConfig, UperNetForSemanticSegmentation

from hf_thinkingvit import ThinkingSwinBackbone, ThinkingSwinConfig, ThinkingViTBackbone, ThinkingViTConfig
from tests.models.segmentation_models import lively_segmenter, random_masks
from tests.transformers_common import load_backbone_tester_mixin
from tests.utils import lively, lively_model, lively_swin, random_images, tiny_config, tiny_swin_config


BackboneTesterMixin = load_backbone_tester_mixin()
if BackboneTesterMixin is None:
    if os.environ.get("CI"):
        raise FileNotFoundError("Run `python tests/fetch_transformers_tests.py` first (needs the package index).")
    BackboneTesterMixin = object


class BackboneTester:
    def __init__(self, config):
        self.config = config

    def prepare_config_and_inputs_for_common(self):
        return copy.deepcopy(self.config), {"pixel_values": random_images(2)}


class ThinkingViTBackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (ThinkingViTBackbone,)
    config_class = ThinkingViTConfig

    def setUp(self):
        self.model_tester = BackboneTester(tiny_config(out_features=["stage1", "stage2"]))


class ThinkingSwinBackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (ThinkingSwinBackbone,)
    config_class = ThinkingSwinConfig

    def setUp(self):
        self.model_tester = BackboneTester(tiny_swin_config(out_features=["stage1", "stage2"]))


def vit_backbone(**fields) -> ThinkingViTBackbone:
    backbone = ThinkingViTBackbone(tiny_config(**fields)).eval()
    backbone.thinkingvit.load_state_dict(lively_model().thinkingvit.state_dict())
    return backbone


def swin_backbone(**fields) -> ThinkingSwinBackbone:
    backbone = ThinkingSwinBackbone(tiny_swin_config(**fields)).eval()
    backbone.thinking_swin.load_state_dict(lively_swin().thinking_swin.state_dict())
    return backbone


@torch.no_grad()
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_maps_are_those_of_the_chosen_stage(stage):
    backbone = vit_backbone(out_stage=stage, out_features=["stem", "stage1", "stage3"])
    images = random_images(2, (32, 48))
    outputs = backbone(images, output_hidden_states=True)
    arguments = {"max_stages": stage + 1, "interpolate_pos_encoding": True, "output_hidden_states": True}
    expected = lively_model().thinkingvit(images, **arguments)
    for ours, theirs in zip(outputs.hidden_states[1:], expected.hidden_states[-3:]):
        assert torch.equal(ours, theirs)
    width = 8 * tiny_config().thinking_stages[stage]
    assert backbone.channels == [width] * 3
    assert [tuple(feature_map.shape) for feature_map in outputs.feature_maps] == [(2, width, 4, 6)] * 3
    patches = expected.last_hidden_state[:, 1:].unflatten(1, (4, 6)).permute(0, 3, 1, 2)
    assert torch.equal(outputs.feature_maps[-1], patches)
    normed = backbone.thinkingvit.layernorm(expected.hidden_states[-3])[:, 1:].unflatten(1, (4, 6))
    assert torch.equal(outputs.feature_maps[1], normed.permute(0, 3, 1, 2))


@torch.no_grad()
@pytest.mark.parametrize("stage", [0, 2])
def test_the_maps_of_a_swin_are_its_pyramid(stage):
    backbone = swin_backbone(out_stage=stage, out_features=["stem", "stage1", "stage2"])
    images = random_images(2)
    outputs = backbone(images, output_hidden_states=True)
    expected = lively_swin().thinking_swin(images, max_stages=stage + 1, output_hidden_states=True)
    assert [tuple(feature_map.shape[1:]) for feature_map in outputs.feature_maps] == [
        (backbone.channels[0], 8, 8),
        (backbone.channels[1], 8, 8),
        (backbone.channels[2], 4, 4),
    ]
    assert backbone.channels == ([4, 4, 4] if stage == 0 else [8, 8, 16])
    for ours, theirs in zip(outputs.hidden_states[1:], expected.hidden_states[-2:]):
        assert torch.equal(ours.flatten(1, 2), theirs)
    assert torch.equal(outputs.feature_maps[-1].flatten(2).transpose(1, 2), expected.last_hidden_state)
    assert set(backbone.hidden_states_norms) == {"stem", "stage1"}  # the last one is the model's own


def test_layers_that_are_not_read_do_not_change_the_maps_in_place():
    """In inference the layers add residuals in place, which must not reach the maps of earlier layers."""
    images, one = random_images(2), vit_backbone(out_features=["stage1"])
    with torch.no_grad():
        (alone,) = one(images).feature_maps
        several = vit_backbone(out_features=["stage1", "stage2", "stage3"])(images).feature_maps
    (with_gradient,) = one(images).feature_maps
    assert torch.equal(alone, several[0])
    torch.testing.assert_close(alone, with_gradient.detach(), atol=1e-5, rtol=1e-5)


def upernet(backbone_config) -> UperNetForSemanticSegmentation:
    widths = {"hidden_size": 8, "pool_scales": [1, 2], "auxiliary_channels": 4, "num_labels": 7}
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone_config, **widths))


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(out_features=["stage1", "stage2", "stage3"], out_stage=1),
        tiny_swin_config(out_features=["stem", "stage1", "stage2"]),
    ],
    ids=["vit", "swin"],
)
def test_upernet_trains_on_the_maps_and_is_saved_with_them(config, tmp_path):
    model, images = upernet(config), random_images(2, (32, 64))
    loss = model(images, labels=random_masks(2, (32, 64))).loss
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.backbone.named_parameters()}
    last = config.feature_stage - 1  # α is 0 at first, so only the last recycling before the maps shows in them
    assert next(grad for name, grad in grads.items() if f"recyclers.{last}.alpha" in name).abs().item() > 0
    assert all(grad is None for name, grad in grads.items() if f"recyclers.{last + 1}." in name)
    model.eval().save_pretrained(tmp_path)
    loaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    assert loaded.config.backbone_config.out_features == config.out_features
    assert loaded.config.backbone_config.out_stage == config.out_stage
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model(images).logits)


def test_a_backbone_takes_the_weights_of_any_model_of_its_family(tmp_path):
    model = lively_segmenter()
    model.save_pretrained(tmp_path)
    backbone = ThinkingViTBackbone.from_pretrained(tmp_path, out_indices=[1, 3], out_stage=0)
    assert (backbone.out_features, backbone.channels) == (["stage1", "stage3"], [8, 8])
    for name, parameter in model.thinkingvit.named_parameters():
        assert torch.equal(parameter, backbone.thinkingvit.get_parameter(name)), name
    backbone.save_pretrained(tmp_path / "backbone")
    again = ThinkingViTBackbone.from_pretrained(tmp_path / "backbone", out_features=["stage2"])
    assert (again.out_indices, again.config.out_stage) == ([2], 0)
    assert isinstance(AutoBackbone.from_config(again.config), ThinkingViTBackbone)


def test_the_default_follows_the_number_of_layers(tmp_path):
    """So that models which are no backbones load with another number of layers."""
    config = tiny_config()
    assert config.out_features == ["stage3"] and "out_features" not in config.to_dict()
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, num_hidden_layers=2).out_features == ["stage2"]
    config.num_hidden_layers = 2
    assert ThinkingViTBackbone(config).out_features == ["stage2"]


def test_copies_and_half_precision():
    backbone, images = vit_backbone(out_features=["stage1", "stage3"]), random_images(2)
    with torch.no_grad():
        expected = backbone(images).feature_maps
        for ours, theirs in zip(copy.deepcopy(backbone)(images, return_dict=False)[0], expected):
            assert torch.equal(ours, theirs)
        halves = backbone.to(torch.bfloat16)(images).feature_maps
    for half, full in zip(halves, expected):
        assert half.dtype == torch.bfloat16 and (half.float() - full).abs().max() < 0.2 * full.abs().max()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_config(out_stage=3), "`out_stage` must be at most 2"),
        (lambda: tiny_config(out_stage=-1), "`out_stage` must be an integer"),
        (lambda: tiny_config(out_features=["stage4"]), "out_features must be a subset of stage_names"),
        (lambda: vit_backbone()(random_images(1, (32, 36))), "32×36 pixels are not made of whole patches"),
        (lambda: vit_backbone()(torch.zeros(1, 1, 32, 32)), "`pixel_values` must have the shape"),
        (lambda: swin_backbone()(random_images(1, (36, 32))), "multiple of 8"),
        (
            lambda: ThinkingViTBackbone(tiny_config(pruning_layers=[1], threshold=0.0)),
            "reads every patch: it cannot have `pruning_layers`",
        ),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_unknown_argument_is_named():
    with pytest.raises(TypeError, match="unexpected keyword argument 'threshold'"):
        lively(ThinkingViTBackbone, tiny_config())(random_images(1), threshold=0.5)
