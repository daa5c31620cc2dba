"""Sub-networks as data, against plain models that have nothing but their weights; and policies between layers."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from hf_thinkingvit import SubNetwork, ThinkingViTModel
from hf_thinkingvit.models.nested_vit import run_layers
from hf_thinkingvit.models.token_policies import TokenPolicy
from tests.utils import lively, lively_model, lively_swin, random_images, tiny_config


@pytest.mark.parametrize("stage", [0, 1, 2])
@torch.no_grad()
def test_a_sub_network_alone_answers_as_the_plain_vit_of_its_weights(stage):
    model, images = lively_model(), random_images()
    outputs = model(images, sub_network=stage)
    torch.testing.assert_close(outputs.logits, model.extract_stage(stage)(images).logits, atol=1e-5, rtol=0)
    assert outputs.exit_stage.tolist() == [stage] * len(images)
    if stage:  # α is not 0, so the stage answers otherwise after the ones before it
        assert not torch.allclose(outputs.logits, model(images, max_stages=stage + 1).logits, atol=1e-2)


@pytest.mark.parametrize("stage", [0, 1, 2])
@torch.no_grad()
def test_a_round_alone_answers_as_a_swin_of_this_round(stage):
    model, images = lively_swin(), random_images()
    alone = lively_swin(head_rounds=[model.config.head_rounds[stage]])
    weights = {name: tensor for name, tensor in model.state_dict().items() if "recyclers" not in name}
    alone.load_state_dict(weights)
    torch.testing.assert_close(model(images, sub_network=stage).logits, alone(images).logits, atol=1e-5, rtol=0)
    odd = random_images(size=(20, 24))  # no size that tokens can be recycled to, which one round need not
    torch.testing.assert_close(model(odd, sub_network=stage).logits, alone(odd).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("build", [lively_model, lively_swin])
class TestForward:
    @torch.no_grad()
    def test_the_bare_model(self, build):
        model, images = build(), random_images()
        tokens = model.base_model(images, sub_network=1).last_hidden_state
        pooled = tokens[:, 0] if build is lively_model else tokens.mean(dim=1)
        torch.testing.assert_close(model.classifier(pooled), model(images, sub_network=1).logits, atol=1e-6, rtol=0)

    def test_training_teaches_this_one_alone(self, build):
        model, images = build(stage_loss_weights=[0.0, 0.5, 0.5]), random_images()
        model.train()
        outputs = model(images, torch.arange(6), sub_network=0)
        assert len(outputs.stage_logits) == 1
        torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(outputs.logits, torch.arange(6)))
        outputs.loss.backward()
        assert all(parameter.grad is None for parameter in model.base_model.recyclers.parameters())

    @torch.no_grad()
    def test_records_the_layers_that_ran(self, build):
        model, images = build(), random_images()
        outputs = model(images, sub_network=1, output_hidden_states=True)
        assert len(outputs.hidden_states) == model.config.num_recorded_layers // model.config.num_stages + 1

    @torch.no_grad()
    def test_compiled(self, build):
        model, images = build(), random_images()
        expected = model(images, sub_network=1).logits
        model.compile_stages([6], backend="eager")
        torch.testing.assert_close(model(images, sub_network=1).logits, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(model(images, sub_network=1).logits, expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("sub_network", [-1, 3, 1.0, True, "1"])
    def test_refuses_what_is_no_stage(self, build, sub_network):
        with pytest.raises(ValueError, match="`sub_network` must be an integer from 0 to 2"):
            build()(random_images(1), sub_network=sub_network)

    @pytest.mark.parametrize("steering", [{"max_stages": 2}, {"threshold": 0.5}])
    def test_refuses_exits_beside_it(self, build, steering):
        with pytest.raises(ValueError, match="cannot be combined"):
            build()(random_images(1), sub_network=1, **steering)


# 4 heads of 8 channels, MLP of 128, 3 layers.
FULL = SubNetwork(4, 32, 128)


@pytest.fixture(scope="module")
def layers():
    return lively(ThinkingViTModel, tiny_config(thinking_stages=[4])).layers


@pytest.fixture
def tokens():
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))


def attention_of(layer, hidden_states, heads, head_dim):
    """Plain multi-head attention with the first `heads * head_dim` rows of the projections."""
    attention, width, size = layer.attention, hidden_states.shape[-1], heads * head_dim

    def project(linear):
        projected = nn.functional.linear(hidden_states, linear.weight[:size, :width], linear.bias[:size])
        return projected.unflatten(-1, (heads, head_dim)).transpose(1, 2)

    query, key, value = map(project, (attention.q_proj, attention.k_proj, attention.v_proj))
    weights = (query @ key.transpose(2, 3) / head_dim**0.5).softmax(dim=-1)
    output = (weights @ value).transpose(1, 2).flatten(2)
    return nn.functional.linear(output, attention.o_proj.weight[:width, :size], attention.o_proj.bias[:width])


def layer_of(layer, hidden_states, heads, head_dim, intermediate_size):
    width = hidden_states.shape[-1]

    def norm(layernorm, values):
        return nn.functional.layer_norm(values, (width,), layernorm.weight[:width], layernorm.bias[:width], 1e-6)

    hidden_states = hidden_states + attention_of(layer, norm(layer.layernorm_before, hidden_states), heads, head_dim)
    fc1, fc2 = layer.mlp.fc1, layer.mlp.fc2
    inner = norm(layer.layernorm_after, hidden_states) @ fc1.weight[:intermediate_size, :width].T
    inner = nn.functional.gelu(inner + fc1.bias[:intermediate_size])
    return hidden_states + inner @ fc2.weight[:width, :intermediate_size].T + fc2.bias[:width]


@pytest.mark.parametrize(
    "sub_network",
    [
        FULL,
        SubNetwork(2, 16, 64),  # HydraViT: fewer heads and channels
        SubNetwork(4, 32, 32),  # MatFormer: a narrower MLP
        SubNetwork(4, 32, (32, 64, 128)),  # Mix'n'Match: another width in each layer
        SubNetwork(3, 32, 96, head_dim=8),  # DynaBERT: fewer heads at full width
        SubNetwork(4, 16, 64, head_dim=4),  # SortedNet: all heads, each narrower
        SubNetwork(4, 32, 128, layers=(0, 2)),  # fewer layers
    ],
    ids=["full", "hydravit", "matformer", "mix", "dynabert", "sortednet", "layers"],
)
@torch.no_grad()
def test_layers_compute_what_their_sizes_say(sub_network, layers, tokens):
    tokens = tokens[..., : sub_network.hidden_size]
    expected = tokens
    for number in sub_network.layers or range(3):
        widths = sub_network.intermediate_size
        width = widths[number] if isinstance(widths, tuple) else widths
        expected = layer_of(layers[number], expected, sub_network.num_attention_heads, sub_network.head_dim, width)
    output, pending = run_layers(layers, tokens, sub_network)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert not pending


def test_sizes_that_the_weights_lack_are_refused(layers, tokens):
    with pytest.raises(ValueError, match="999 leading rows were asked of a layer that has 128"):
        run_layers(layers, tokens, SubNetwork(4, 32, 999))


def test_head_dim_is_shared_out_unless_given():
    assert SubNetwork(3, 192, 768).head_dim == 64 and SubNetwork(3, 192, 768) == SubNetwork(3, 192, 768, 64)
    assert SubNetwork(3, 384, 768, head_dim=64).attention_size == 192
    assert SubNetwork(4, 32, [32, 64]) == SubNetwork(4, 32, (32, 64)) and hash(SubNetwork(4, 32, [32, 64]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_size": 0.5}, "hidden_size"),
        ({"intermediate_size": (64, 0)}, "intermediate_size"),
        ({"layers": ()}, "strictly increasing"),
        ({"layers": (1, 1)}, "strictly increasing"),
        ({"layers": (-1, 1)}, "layers"),
    ],
)
def test_refuses_sizes_that_are_none(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(FULL, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 40}, "40 channels, but the model has 32"),
        ({"num_attention_heads": 5}, "40 channels of its heads"),
        ({"intermediate_size": (129, 1, 1)}, "129 MLP channels"),
        ({"layers": (0, 3)}, "4 layers"),
        ({"intermediate_size": (64, 64)}, "one for each of 3 layers"),
    ],
)
def test_says_where_it_does_not_fit(fields, message):
    config = tiny_config(thinking_stages=[4])
    FULL.check_fits(config, "Stage 0")
    with pytest.raises(ValueError, match=f"Stage 0.*{message}"):
        replace(FULL, **fields).check_fits(config, "Stage 0")


class DropLast(TokenPolicy):
    """Removes the last token before each layer but the first, and stops when two are left."""

    def __init__(self):
        self.counts = []

    @property
    def is_done(self):
        return bool(self.counts) and self.counts[-1] == 2

    def before_layer(self, layer, hidden_states, is_last):
        return (hidden_states[:, :-1] if layer else hidden_states), {}

    def after_layer(self, layer, output, is_last):
        self.counts.append(output.shape[1])
        return output


@torch.no_grad()
def test_a_policy_acts_between_layers(layers, tokens):
    policy = DropLast()
    output, _ = run_layers(layers, tokens[:, :4], FULL, policy)
    expected = layers[1](layers[0](tokens[:, :4], FULL)[:, :-1], FULL)
    expected = layers[2](expected[:, :-1], FULL)
    assert policy.counts == [4, 3, 2]
    torch.testing.assert_close(output, expected)
    policy = DropLast()
    run_layers(layers, tokens[:, :3], FULL, policy)
    assert policy.counts == [3, 2]  # the third layer did not run


@torch.no_grad()
def test_a_policy_that_does_nothing_changes_nothing(layers, tokens):
    expected, _ = run_layers(layers, tokens, FULL)
    assert torch.equal(run_layers(layers, tokens, FULL, TokenPolicy())[0], expected)
    queried, pending = run_layers(layers, tokens, FULL, TokenPolicy(), num_queries=2)
    torch.testing.assert_close(queried, expected[:, :2])
    assert pending["hidden_states"].shape == (2, 3, 32)
