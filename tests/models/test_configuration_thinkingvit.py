import math

import pytest

from hf_thinkingvit import SubNetwork, ThinkingViTConfig


def test_defaults_are_the_published_model():
    config = ThinkingViTConfig()
    assert config.thinking_stages == [3, 6]
    assert config.stages == (SubNetwork(3, 192, 768), SubNetwork(6, 384, 1536))
    assert (config.num_hidden_layers, config.patch_grid, config.layer_norm_eps) == (12, (14, 14), 1e-6)
    assert (config.exit_criterion, config.entropy_top_k) == ("topk_entropy", 10)


@pytest.mark.parametrize(
    "stages, width",
    [([6], 384), ([3, 3], 192), ([2, 3], 192), ([2, 3, 6], 384), ([3, 6, 12], 768), ([1, 2, 3, 4], 256)],
)
def test_full_width_follows_the_widest_stage(stages, width):
    config = ThinkingViTConfig(thinking_stages=stages)
    assert (config.hidden_size, config.num_attention_heads, config.num_stages) == (width, max(stages), len(stages))
    assert [stage.hidden_size for stage in config.stages] == [64 * heads for heads in stages]


def test_stages_take_their_share_of_other_head_and_mlp_sizes():
    config = ThinkingViTConfig(thinking_stages=[2, 6], hidden_size=96, intermediate_size=288)
    assert config.stages == (SubNetwork(2, 32, 96), SubNetwork(6, 96, 288))


@pytest.mark.parametrize("threshold", [0, 0.9, math.inf, [0.4, 0.2], (0.4, 0)])
def test_survives_saving(threshold, tmp_path):
    config = ThinkingViTConfig(thinking_stages=[3, 6, 12], hidden_size=192, threshold=threshold, image_size=(64, 96))
    config.save_pretrained(tmp_path)
    loaded = ThinkingViTConfig.from_pretrained(tmp_path)
    assert loaded.stages == config.stages
    assert loaded.patch_grid == (4, 6)
    assert loaded.threshold == (list(threshold) if isinstance(threshold, tuple) else threshold)


@pytest.mark.parametrize(
    "field, value",
    [
        ("thinking_stages", []),
        ("thinking_stages", 6),
        ("thinking_stages", [6, 3]),
        ("thinking_stages", [0, 3]),
        ("thinking_stages", [3, 6.5]),
        ("thinking_stages", [True, 6]),
        ("threshold", -0.1),
        ("threshold", math.nan),
        ("threshold", "0.9"),
        ("threshold", True),
        ("threshold", [0.1, 0.2]),
        ("threshold", []),
        ("threshold", [-1.0]),
        ("exit_criterion", "confidence"),
        ("entropy_top_k", 1),
        ("entropy_top_k", 2.5),
        ("stage_loss_weights", [1.0]),
        ("stage_loss_weights", [1.0, -1.0]),
        ("stage_loss_weights", [0.0, 0.0]),
        ("stage_loss_weights", [math.nan, 1.0]),
        ("stage_loss_weights", [math.inf, 1.0]),
        ("stage_loss_weights", 1.0),
        ("drop_path_rate", 1.5),
        ("drop_path_rate", -0.1),
        ("hidden_dropout_prob", math.nan),
        ("hidden_size", 100),
        ("hidden_size", 0),
        ("hidden_size", "a"),
        ("exit_criterion", ["entropy"]),
        ("qkv_bias", "no"),
        ("intermediate_size", 101),
        ("num_hidden_layers", 0),
        ("num_channels", 0),
        ("image_size", 0),
        ("image_size", (224, 224, 3)),
        ("image_size", 8),
        ("patch_size", "16"),
        ("layer_norm_eps", -1e-6),
        ("hidden_act", "no_such_activation"),
    ],
)
def test_refuses_what_cannot_work_and_names_the_field(field, value):
    with pytest.raises(ValueError, match=f"`{field}`"):
        ThinkingViTConfig(**{field: value})


def test_refuses_more_heads_than_the_model_has():
    with pytest.raises(ValueError, match="`thinking_stages` asks for 6 heads.*`num_attention_heads` = 4"):
        ThinkingViTConfig(thinking_stages=[3, 6], num_attention_heads=4)


def test_refuses_bad_values_set_after_construction():
    config = ThinkingViTConfig()
    config.threshold = -1.0
    with pytest.raises(ValueError, match="`threshold`"):
        config.validate()
