import pytest
import torch
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from hf_thinkingvit import ThinkingSwinConfig, ThinkingViTConfig
from hf_thinkingvit.evaluation import halting_macs, published_stage_macs, stage_macs
from tests.models.test_modeling_avit import GATES, lively_avit
from tests.utils import (
    counted_flops,
    lively_model,
    lively_swin,
    middle_threshold,
    random_images,
    tiny_config,
    tiny_swin_config,
)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"thinking_stages": [4]},
        {"thinking_stages": [2, 2], "hidden_size": 16},
        {"thinking_stages": [1, 3], "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 60},
        {"image_size": (32, 48), "patch_size": (8, 16), "use_distillation_token": True},
        {"num_hidden_layers": 1, "num_channels": 1},
    ],
)
def test_equal_to_the_operations_of_the_real_forward(overrides):
    assert_macs_are_the_forwards(lively_model(**overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"head_rounds": [[2, 4]]},
        {"qkv_slicing": "each_projection", "mlp_ratio": 1.5},
        {"window_size": 3, "depths": [2, 2]},
        {"window_size": 7},
        {"image_size": (64, 32), "patch_size": (8, 4), "num_channels": 1},
        {"image_size": (30, 31), "head_rounds": [[1, 2], [1, 4]]},
        {"image_size": (36, 27), "head_rounds": [[2, 4]]},
    ],
)
def test_swin_counts_padded_windows_and_patches(overrides):
    assert_macs_are_the_forwards(lively_swin(**overrides))


@torch.no_grad()
def assert_macs_are_the_forwards(model):
    config = model.config
    size = config.image_size
    pixel_values = random_images(1, size)[:, : config.num_channels]
    expected = stage_macs(config)
    for stages in range(1, config.num_stages + 1):
        spent = counted_flops(lambda stages=stages: model(pixel_values, threshold=0.0, max_stages=stages))
        assert spent == 2 * sum(expected[:stages])


@pytest.mark.parametrize("make, size", [(lively_model, (48, 24)), (lively_swin, (48, 24))], ids=["vit", "swin"])
@torch.no_grad()
def test_another_resolution(make, size):
    model, pixel_values = make(), random_images(1, size)
    spent = counted_flops(lambda: model(pixel_values, interpolate_pos_encoding=True))
    assert spent == 2 * sum(stage_macs(model.config, size))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [lively_model, lively_swin], ids=["vit", "swin"])
@torch.no_grad()
def test_a_batch_costs_what_its_images_cost(make, attention):
    model, pixel_values = make(), random_images(9)
    model.set_attn_implementation(attention)
    threshold = middle_threshold(model, pixel_values)
    exit_stage = model(pixel_values, threshold=threshold).exit_stage
    macs = torch.tensor(stage_macs(model.config)).cumsum(0)
    assert len(exit_stage.unique()) > 1
    assert counted_flops(lambda: model(pixel_values, threshold=threshold)) == 2 * macs[exit_stage].sum().item()


@torch.no_grad()
def test_published_counting_is_of_plain_vits():
    config, pixel_values = tiny_config(), random_images(1)
    for stage, macs in zip(config.stages, published_stage_macs(config), strict=True):
        sizes = {"num_attention_heads": stage.num_attention_heads, "hidden_size": stage.hidden_size}
        sizes |= {"intermediate_size": stage.intermediate_size, "num_hidden_layers": config.num_hidden_layers}
        plain = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=12)).eval()
        assert counted_flops(lambda plain=plain: plain(pixel_values)) == 2 * macs


@torch.no_grad()
def test_published_counting_is_of_plain_swins():
    """Between rounds it adds a depthwise convolution and a product with every patch."""
    full, nested = tiny_swin_config(head_rounds=[[2, 4]]), tiny_swin_config(head_rounds=[[1, 2], [2, 4]])
    sizes = {"embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}
    plain = SwinForImageClassification(SwinConfig(**sizes, image_size=32, patch_size=4, num_labels=12)).eval()
    pixel_values, (alone,) = random_images(1), published_stage_macs(full)
    assert counted_flops(lambda: plain(pixel_values)) == 2 * alone
    width, next_width = 8, 8  # widths of the first round's tokens and the second's first layer; 8 × 8 patches
    assert published_stage_macs(nested)[1] == alone + 64 * width + 64 * width * next_width


def test_published_figures():
    tiny, small = published_stage_macs(ThinkingViTConfig(num_labels=1000))
    assert tiny / 1e9 == pytest.approx(1.25, abs=0.005) and small / 1e9 == pytest.approx(4.60, abs=0.005)
    assert (tiny + small) / 1e9 == pytest.approx(5.85, abs=0.005)
    assert sum(stage_macs(ThinkingViTConfig(num_labels=1000))) < tiny + small


def test_published_figures_of_swin():
    first, second = published_stage_macs(ThinkingSwinConfig(num_labels=1000))
    assert first / 1e9 == pytest.approx(2.8176, rel=1e-4) and second / 1e9 == pytest.approx(8.8577, rel=1e-4)
    assert sum(stage_macs(ThinkingSwinConfig(num_labels=1000))) < first + second


@pytest.mark.parametrize("gate", ["mixed", "none", "all"])
@pytest.mark.parametrize("size", [32, (48, 24)])
@torch.no_grad()
def test_macs_of_halting_tokens_from_their_depths(gate, size):
    model = lively_avit(distilled=True, **GATES[gate])
    images = random_images(12, size)
    depths = model(images, output_token_depth=True, interpolate_pos_encoding=True).token_depth
    spent = model(images, interpolate_pos_encoding=True).macs
    assert torch.equal(halting_macs(model.config, depths, size), spent)
    with pytest.raises(ValueError, match="`token_depth` has 3 tokens"):
        halting_macs(model.config, depths[:, :3], size)
