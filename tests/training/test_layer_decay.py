"""Each layer learns slower than the one behind it, through timm's schedule."""

import pytest
from transformers import AutoModelForImageClassification

from hf_thinkingvit.training import TrainingConfig
from hf_thinkingvit.training.layer_decay import parameter_depths
from hf_thinkingvit.training.recipe import build_optimizer, build_schedule
from tests.utils import lively_model


def test_depths_of_a_vit():
    model = lively_model(num_hidden_layers=3)
    depths = parameter_depths(name for name, _ in model.named_parameters())
    assert depths["thinkingvit.embeddings.cls_token"] == 0
    assert [depths[f"thinkingvit.layers.{layer}.mlp.fc1.weight"] for layer in range(3)] == [1, 2, 3]
    assert depths["classifier.weight"] == depths["thinkingvit.layernorm.weight"] == 4
    assert depths["thinkingvit.recyclers.0.alpha"] == 4


def test_depths_of_a_hierarchy():
    model = AutoModelForImageClassification.from_pretrained("tests/fixtures/saved_models/thinking_swin")
    depths = parameter_depths(name for name, _ in model.named_parameters())
    blocks = [depth for name, depth in depths.items() if name.endswith("mlp.fc1.weight")]
    assert blocks == sorted(set(blocks)) and blocks[0] == 1
    (downsample,) = (depth for name, depth in depths.items() if name.endswith("downsample.norm.weight"))
    assert depths["thinking_swin.embeddings.norm.weight"] == 0 < downsample < max(depths.values())
    assert depths["classifier.weight"] == max(depths.values()) > blocks[-1]


def test_the_schedule_keeps_the_ratios():
    model = lively_model(num_hidden_layers=2)
    config = TrainingConfig(layer_decay=0.5, learning_rate=1e-3, learning_rate_batch=1024, min_learning_rate=0.0)
    optimizer = build_optimizer(config, model)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, model.parameters()))
    schedule = build_schedule(config, optimizer, steps_per_epoch=10)
    schedule.step_update(60)  # after the warm-up
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    top = rate[id(named["classifier.weight"])]
    assert top == pytest.approx(1e-3, rel=1e-2)
    for name, ratio in (("thinkingvit.layers.1.mlp.fc1.bias", 0.5), ("thinkingvit.embeddings.cls_token", 0.125)):
        assert rate[id(named[name])] == pytest.approx(ratio * top)


def test_two_ways_to_slow_the_backbone_are_refused():
    with pytest.raises(ValueError, match="`layer_decay` does not go with"):
        TrainingConfig(layer_decay=0.5, backbone_learning_rate=0.1).check()
