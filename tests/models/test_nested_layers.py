import copy
import pickle

import pytest
import torch
from torch.nn.functional import conv2d, layer_norm, linear

from hf_thinkingvit.models.nested_layers import NestedConv2d, NestedLayerNorm, NestedLinear, ResidualDropout
from tests.utils import lively_model, random_images


def assert_leading(layer: NestedLinear, hidden_states: torch.Tensor, out_features: int) -> None:
    width = hidden_states.shape[-1]
    expected = linear(hidden_states, layer.weight[:out_features, :width], layer.bias[:out_features])
    torch.testing.assert_close(layer(hidden_states, out_features), expected)


@pytest.mark.parametrize("width, out_features", [(8, 12), (5, 12), (8, 7), (5, 7), (1, 1)])
@pytest.mark.parametrize("grad", [True, False])
def test_linear_uses_the_leading_corner(width, out_features, grad):
    layer = NestedLinear(8, 12)
    with torch.set_grad_enabled(grad):
        assert_leading(layer, torch.randn(3, 4, width), out_features)


def test_linear_without_bias_and_without_a_width():
    layer = NestedLinear(8, 12, bias=False)
    hidden_states = torch.randn(3, 5)
    torch.testing.assert_close(layer(hidden_states), hidden_states @ layer.weight[:, :5].T)


@pytest.mark.parametrize("start, stop", [(0, None), (0, 6), (0, 2), (1, 4), (2, 6), (3, None)])
def test_patch_embedding_computes_any_range_of_channels(start, stop):
    layer, pixel_values = NestedConv2d(3, 6, kernel_size=(4, 2), stride=(4, 2)), torch.randn(2, 3, 13, 9)
    expected = conv2d(pixel_values, layer.weight, layer.bias, stride=(4, 2)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(layer(pixel_values), expected)
    torch.testing.assert_close(layer(pixel_values, start, stop), expected[..., start:stop])


def test_layer_norm_normalises_the_leading_channels():
    layer = NestedLayerNorm(8, eps=1e-3)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    hidden_states = torch.randn(3, 5)
    torch.testing.assert_close(
        layer(hidden_states), layer_norm(hidden_states, (5,), layer.weight[:5], layer.bias[:5], 1e-3)
    )


def test_gradients_reach_only_the_leading_corner():
    layer = NestedLinear(8, 12)
    with torch.no_grad():
        layer(torch.randn(3, 5), 7)  # keeps views, which training must not use
    layer(torch.randn(3, 5), 7).sum().backward()
    used = torch.zeros(12, 8, dtype=torch.bool)
    used[:7, :5] = True
    assert torch.equal(layer.weight.grad != 0, used)
    assert torch.equal(layer.bias.grad, torch.tensor([3.0] * 7 + [0.0] * 5))


@torch.no_grad()
def test_kept_views_follow_the_weights():
    layer, hidden_states = NestedLinear(8, 12), torch.randn(3, 5)
    assert_leading(layer, hidden_states, 7)
    layer.weight.mul_(2)  # changed in place
    assert_leading(layer, hidden_states, 7)
    layer.load_state_dict(NestedLinear(8, 12).state_dict())
    assert_leading(layer, hidden_states, 7)
    layer.load_state_dict(NestedLinear(8, 12).state_dict(), assign=True)
    assert_leading(layer, hidden_states, 7)
    layer.weight = torch.nn.Parameter(torch.randn(12, 8))
    assert_leading(layer, hidden_states, 7)
    layer.weight.data = torch.randn(12, 8)
    assert_leading(layer, hidden_states, 7)
    layer.to(torch.float64)
    assert_leading(layer, hidden_states.double(), 7)
    with torch.inference_mode():
        assert_leading(layer, hidden_states.double(), 6)
    assert_leading(layer, hidden_states.double(), 6)
    twin = copy.deepcopy(layer)
    twin.weight.mul_(3)
    assert_leading(twin, hidden_states.double(), 7)
    assert_leading(layer, hidden_states.double(), 7)


@torch.no_grad()
def test_a_new_bias_is_seen_too():
    layer, hidden_states = NestedLinear(8, 12), torch.randn(3, 5)
    assert_leading(layer, hidden_states, 7)
    layer.bias = torch.nn.Parameter(torch.randn(12))
    assert_leading(layer, hidden_states, 7)


@torch.no_grad()
def test_kept_views_do_not_travel_with_the_module():
    layer, hidden_states = NestedLinear(64, 64), torch.randn(3, 32)
    size = len(pickle.dumps(layer))
    assert_leading(layer, hidden_states, 32)
    assert "_kept" in layer.__dict__
    assert len(pickle.dumps(layer)) == size
    assert "_kept" not in copy.deepcopy(layer).__dict__
    layer.load_state_dict(layer.state_dict())
    assert "_kept" not in layer.__dict__


def test_residual_dropout_is_the_identity_in_evaluation():
    hidden_states = torch.randn(3, 4, 5)
    assert ResidualDropout(0.5, 0.5).eval()(hidden_states) is hidden_states


def test_residual_dropout_drops_nothing_by_default():
    hidden_states = torch.randn(3, 4, 5)
    assert torch.equal(ResidualDropout().train()(hidden_states), hidden_states)


def test_residual_dropout_keeps_the_mean():
    torch.manual_seed(0)
    hidden_states = torch.ones(20000, 1, 4)
    mean = ResidualDropout(0.3, 0.4).train()(hidden_states).mean().item()
    assert mean == pytest.approx(1.0, abs=0.03)


class TestWritingOver:
    """Inference without gradients writes into what its layers put out."""

    @pytest.mark.parametrize("autocast", [False, True])
    def test_answers_are_those_with_gradients(self, autocast):
        model, images = lively_model(), random_images()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            expected = model(images, output_stage_logits=True).stage_logits
            with torch.no_grad():
                stage_logits = model(images, output_stage_logits=True).stage_logits
        for logits, one in zip(stage_logits, expected):
            assert torch.equal(logits, one)

    @pytest.mark.parametrize("hidden_act", ["relu", "gelu_pytorch_tanh"])
    def test_activations_other_than_gelu(self, hidden_act):
        model, images = lively_model(hidden_act=hidden_act), random_images()
        expected = model(images).logits
        with torch.no_grad():
            assert torch.equal(model(images).logits, expected)

    def test_a_hook_keeps_what_it_saw(self):
        model, images = lively_model(), random_images()
        layer, kept = model.thinkingvit.layers[0], {}
        watched = {
            "attention": layer.attention.o_proj,
            "fc1": layer.mlp.fc1,
            "activation": layer.mlp.activation_fn,
            "fc2": layer.mlp.fc2,
            "mlp": layer.mlp,
        }
        for name, module in watched.items():
            module.register_forward_hook(lambda module, _, output, name=name: kept.setdefault(name, []).append(output))
        model(images, max_stages=1)
        with torch.no_grad():
            model(images, max_stages=1)
        assert kept.keys() == watched.keys()
        for expected, found in kept.values():
            assert torch.equal(expected, found)

    def test_inputs_stay_as_they_are(self):
        model, images = lively_model(), random_images()
        before = images.clone()
        with torch.no_grad():
            state = model.begin(images)
            start = {name: tensor.clone() for name, tensor in state.items()}
            model.run_stage(0, state)
        assert torch.equal(images, before)
        for name, tensor in start.items():
            assert torch.equal(tensor, state[name])
