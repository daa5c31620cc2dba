import math

import pytest

from hf_thinkingvit import SubNetwork, ThinkingSwinConfig
from tests.utils import tiny_swin_config


def test_defaults_are_the_published_model():
    config = ThinkingSwinConfig()
    assert config.head_rounds == [[3, 3, 6, 12], [3, 6, 12, 24]]
    assert (config.embed_dim, config.depths, config.num_heads) == (96, [2, 2, 18, 2], [3, 6, 12, 24])
    assert (config.hidden_size, config.patch_grid, config.downsampling) == (768, (56, 56), 8)
    assert (config.exit_criterion, config.entropy_top_k, config.qkv_slicing) == ("topk_entropy", 10, "leading_rows")
    first, second = config.stages
    assert first.layers == (
        SubNetwork(3, 96, 384),
        SubNetwork(3, 96, 384),
        SubNetwork(6, 192, 768),
        SubNetwork(12, 384, 1536),
    )
    assert [layer.hidden_size for layer in second.layers] == [96, 192, 384, 768]
    assert (first.num_attention_heads, first.hidden_size) == ((3, 3, 6, 12), 384)


def test_rounds_take_their_share_of_other_sizes():
    config = tiny_swin_config(embed_dim=12, num_heads=[3, 4], head_rounds=[[2, 3]], mlp_ratio=1.5)
    assert config.stages[0].layers == (SubNetwork(2, 8, 12), SubNetwork(3, 18, 27))


@pytest.mark.parametrize("threshold", [0, math.inf, [0.4, 0.2], (0.4, 0)])
def test_survives_saving(threshold, tmp_path):
    config = tiny_swin_config(threshold=threshold, image_size=(64, 96), qkv_slicing="each_projection")
    config.save_pretrained(tmp_path)
    loaded = ThinkingSwinConfig.from_pretrained(tmp_path)
    assert loaded.stages == config.stages and loaded.to_dict() == config.to_dict()
    assert (loaded.patch_grid, loaded.qkv_slicing) == ((16, 24), "each_projection")
    assert loaded.threshold == (list(threshold) if isinstance(threshold, tuple) else threshold)


@pytest.mark.parametrize(
    "field, value",
    [
        ("head_rounds", []),
        ("head_rounds", [1, 2]),
        ("head_rounds", [[1, 2], []]),
        ("head_rounds", [[1, 2, 3]]),
        ("head_rounds", [[0, 2]]),
        ("head_rounds", [[1, 2.5]]),
        ("head_rounds", [[True, 2]]),
        ("head_rounds", [[2, 8]]),
        ("head_rounds", [[1, 4], [2, 2]]),
        ("head_rounds", "12"),
        ("num_heads", [2]),
        ("num_heads", [2, 0]),
        ("num_heads", 2),
        ("num_heads", [3, 4]),
        ("depths", []),
        ("depths", [2, 0]),
        ("depths", 2),
        ("embed_dim", 7),
        ("embed_dim", 0),
        ("embed_dim", "a"),
        ("hidden_size", 64),
        ("window_size", 0),
        ("window_size", (7, 7)),
        ("mlp_ratio", -1.0),
        ("mlp_ratio", 0.01),
        ("mlp_ratio", math.nan),
        ("qkv_slicing", "thirds"),
        ("qkv_slicing", None),
        ("use_absolute_embeddings", "yes"),
        ("threshold", -0.1),
        ("threshold", [0.1]),
        ("exit_criterion", "confidence"),
        ("entropy_top_k", 1),
        ("stage_loss_weights", [1.0]),
        ("drop_path_rate", 1.5),
        ("hidden_dropout_prob", math.nan),
        ("qkv_bias", "no"),
        ("num_channels", 0),
        ("image_size", 0),
        ("image_size", 2),
        ("image_size", (32, 32, 3)),
        ("patch_size", "4"),
        ("layer_norm_eps", -1e-6),
        ("hidden_act", "no_such_activation"),
    ],
)
def test_refuses_what_cannot_work_and_names_the_field(field, value):
    with pytest.raises(ValueError, match=f"`{field}`"):
        tiny_swin_config(**{field: value})


def test_refuses_bad_values_set_after_construction():
    config = tiny_swin_config()
    config.head_rounds = [[2, 4], [1, 4]]
    with pytest.raises(ValueError, match="`head_rounds` must not decrease"):
        config.validate()
