import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_thinkingvit import ThinkingViTConfig
from hf_thinkingvit.evaluation import halting_macs, published_stage_macs, stage_macs
from tests.models.test_modeling_avit import GATES, lively_avit
from tests.utils import lively_model, random_images


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
@torch.no_grad()
def test_equal_to_the_operations_of_the_real_forward(overrides):
    model = lively_model(**overrides)
    config = model.config
    model.set_attn_implementation("eager")  # whose products the counter sees on every device
    size = config.image_size
    pixel_values = random_images(1, size)[:, : config.num_channels]
    expected = stage_macs(config)
    for stages in range(1, config.num_stages + 1):
        with FlopCounterMode(display=False) as counter:
            model(pixel_values, threshold=0.0, max_stages=stages)
        assert counter.get_total_flops() == 2 * sum(expected[:stages])


@torch.no_grad()
def test_another_resolution():
    model = lively_model()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(random_images(1, (48, 24)), interpolate_pos_encoding=True)
    assert counter.get_total_flops() == 2 * sum(stage_macs(model.config, (48, 24)))


@torch.no_grad()
def test_a_batch_costs_what_its_images_cost():
    model, pixel_values = lively_model(), random_images(9)
    model.set_attn_implementation("eager")
    entropies = model(pixel_values, max_stages=1).entropy
    with FlopCounterMode(display=False) as counter:
        exit_stage = model(pixel_values, threshold=entropies.median().item() + 1e-3).exit_stage
    macs = torch.tensor(stage_macs(model.config)).cumsum(0)
    assert len(exit_stage.unique()) > 1
    assert counter.get_total_flops() == 2 * macs[exit_stage].sum().item()


def test_published_figures():
    tiny, small = published_stage_macs(ThinkingViTConfig(num_labels=1000))
    assert tiny / 1e9 == pytest.approx(1.25, abs=0.005) and small / 1e9 == pytest.approx(4.60, abs=0.005)
    assert (tiny + small) / 1e9 == pytest.approx(5.85, abs=0.005)
    assert sum(stage_macs(ThinkingViTConfig(num_labels=1000))) < tiny + small


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
