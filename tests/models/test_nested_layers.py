import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import conv2d, layer_norm, linear
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers.activations import GELUActivation

from hf_thinkingvit.models.nested_layers import NestedConv2d, NestedLayerNorm, NestedLinear
from tests.utils import CountOperations, lively_model, lively_swin, random_images


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
    torch.testing.assert_close(layer(pixel_values, start, stop), expected[..., start:stop])
    torch.testing.assert_close(layer(pixel_values).flatten(2).transpose(1, 2), expected)  # a plain convolution


@torch.no_grad()
def test_a_plain_layer_in_the_place_of_a_nested_one():
    """For example a classifier for other labels: narrow stages use its leading columns."""
    model, images = lively_model(), random_images()
    head = torch.nn.Linear(32, 5)
    model.classifier = head
    for stage, logits in enumerate(model(images, output_stage_logits=True).stage_logits):
        tokens = model.thinkingvit(images, max_stages=stage + 1).last_hidden_state[:, 0]
        torch.testing.assert_close(logits, linear(tokens, head.weight[:, : tokens.shape[-1]], head.bias))
    model.classifier = torch.nn.Linear(8, 5)  # as wide as the first stage, too narrow for the others
    assert model(images, max_stages=1).logits.shape == (6, 5)
    with pytest.raises(ValueError, match="A Linear of 8 inputs and 5 outputs is in a place where 16 and 5 are needed"):
        model(images)
    model.classifier = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(32, 5))  # anything else: as it is
    assert model(images, sub_network=2).logits.shape == (6, 5)


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
        layer(torch.randn(3, 5), 7)  # caches views, which training must not use
    layer(torch.randn(3, 5), 7).sum().backward()
    used = torch.zeros(12, 8, dtype=torch.bool)
    used[:7, :5] = True
    assert torch.equal(layer.weight.grad != 0, used)
    assert torch.equal(layer.bias.grad, torch.tensor([3.0] * 7 + [0.0] * 5))


@torch.no_grad()
def test_cached_views_follow_the_weights():
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


def other_bias(layer):
    layer.bias = torch.nn.Parameter(torch.randn(8))


def other_memory(layer):
    layer.weight.data = torch.randn(8, 8)


def other_strides(layer):
    layer.weight.data = layer.weight.data.t()


def other_offset(layer):
    layer.bias.data = torch.randn(16)[8:]


def other_dtype(layer):
    layer.half()
    for out_features in (7, 4):
        layer(torch.randn(3, 5).half(), out_features)
    layer.weight.data = layer.weight.data.view(torch.bfloat16)  # the same memory, shape and strides
    layer.bias.data = layer.bias.data.view(torch.bfloat16)


def fewer_rows(layer):
    layer.weight.data, layer.bias.data = layer.weight.data[:6], layer.bias.data[:6]


def resized_storage(layer):
    weight = layer.weight.detach().clone()
    layer.weight.data.untyped_storage().resize_(0)
    layer.weight.data.untyped_storage().resize_(weight.nbytes)
    layer.weight.data.copy_(weight * 2)


def parametrized(layer):
    class Double(torch.nn.Module):
        def forward(self, tensor):
            return 2 * tensor

    torch.nn.utils.parametrize.register_parametrization(layer, "bias", Double())


@pytest.mark.parametrize(
    "change",
    [
        other_bias,
        other_memory,
        other_strides,
        other_offset,
        other_dtype,
        fewer_rows,
        resized_storage,
        parametrized,
    ],
)
@torch.no_grad()
def test_cached_views_are_of_the_parameter_as_it_is(change):
    layer, hidden_states = NestedLinear(8, 8), torch.randn(3, 5)
    for out_features in (7, 4):
        assert_leading(layer, hidden_states, out_features)
    change(layer)
    hidden_states = hidden_states.to(layer.weight.dtype)
    for out_features in (7, 4):
        if out_features <= len(layer.weight):
            assert_leading(layer, hidden_states, out_features)
        else:  # a stale view would give the former rows
            assert layer(hidden_states, out_features).shape == (3, len(layer.weight))


@torch.no_grad()
def test_nothing_of_a_tracer_is_cached():
    layer, hidden_states = NestedLinear(8, 12), torch.randn(3, 5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.randn(3, 5), 7).shape == (3, 7)
    assert_leading(layer, hidden_states, 7)
    torch.func.jvp(lambda inputs: layer(inputs, 6), (hidden_states,), (hidden_states,))
    torch.func.vmap(lambda inputs: layer(inputs, 6))(hidden_states)
    assert_leading(layer, hidden_states, 6)
    weights = {"weight": torch.randn(12, 8), "bias": torch.randn(12)}
    output = torch.func.functional_call(layer, weights, (hidden_states, 7))
    torch.testing.assert_close(output, linear(hidden_states, weights["weight"][:7, :5], weights["bias"][:7]))
    assert_leading(layer, hidden_states, 7)
    assert layer.to("meta")(hidden_states.to("meta"), 7).shape == (3, 7)


def test_views_taken_without_gradients_do_not_cut_the_graph():
    layer, hidden_states = NestedLinear(8, 12), torch.randn(3, 5)
    for without_gradients in (torch.no_grad, torch.inference_mode):
        with without_gradients():
            layer(hidden_states, 7)
        layer.zero_grad()
        layer(hidden_states, 7).sum().backward()
        assert layer.weight.grad[:7, :5].abs().sum() > 0


@torch.no_grad()
def test_a_bias_comes_and_goes():
    layer, hidden_states = NestedLinear(8, 12), torch.randn(3, 5)
    bias = layer.bias
    for layer.bias in (bias, None, bias):
        expected = linear(hidden_states, layer.weight[:7, :5], None if layer.bias is None else bias[:7])
        torch.testing.assert_close(layer(hidden_states, 7), expected)


@pytest.mark.parametrize("name", ["weight", "bias"])
@torch.no_grad()
def test_nothing_that_a_parametrization_computes_is_kept(name):
    layer = NestedLinear(8, 12)
    torch.nn.utils.parametrize.register_parametrization(layer, name, torch.nn.Hardtanh(-0.1, 0.1))
    assert_leading(layer, torch.randn(3, 5), 7)
    assert "_cached_views" not in layer.__dict__


@torch.no_grad()
def test_cached_views_do_not_travel_with_the_module():
    layer, hidden_states = NestedLinear(64, 64), torch.randn(3, 32)
    size = len(pickle.dumps(layer))
    assert_leading(layer, hidden_states, 32)
    assert "_cached_views" in layer.__dict__
    assert len(pickle.dumps(layer)) == size
    assert "_cached_views" not in copy.deepcopy(layer).__dict__
    layer.load_state_dict(layer.state_dict())
    assert "_cached_views" not in layer.__dict__


@pytest.mark.parametrize("make", [lively_model, lively_swin])
@torch.no_grad()
def test_views_are_taken_once(make):
    """The second call slices as often as a model at full width, whose layers need no slices."""
    model, pixel_values = make(), random_images(1)
    counts = []
    for _ in range(3):
        with CountOperations("slice") as slices:
            model(pixel_values)
        counts.append(slices.count)
    assert counts[0] > 3 * counts[1] and counts[1] == counts[2]


class TestWritingOver:
    """Inference without gradients overwrites outputs of its layers."""

    @pytest.mark.parametrize("autocast", [False, True])
    def test_answers_are_those_with_gradients(self, autocast):
        model, images = lively_model(), random_images()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            self.assert_equal_without_gradients(model, images)

    @pytest.mark.parametrize("kind", ["forward", "pre", "pre_with_kwargs", "global", "global_pre"])
    def test_a_hook_keeps_what_it_saw(self, kind):
        """Tensors that a hook saw as inputs or outputs are never overwritten."""
        model, seen, handles = lively_model(num_hidden_layers=1), [], []

        def forward(module, args, output):
            tensors = [output] if isinstance(output, torch.Tensor) else output
            seen.extend((tensor, tensor.clone()) for tensor in tensors if isinstance(tensor, torch.Tensor))

        def pre(module, args, kwargs=None):
            tensors = [*args, *(kwargs or {}).values()]
            seen.extend((tensor, tensor.clone()) for tensor in tensors if isinstance(tensor, torch.Tensor))

        if kind == "global":
            handles.append(register_module_forward_hook(forward))
        elif kind == "global_pre":
            handles.append(register_module_forward_pre_hook(pre))
        for module in model.thinkingvit.layers[0].modules():
            if kind == "forward":
                module.register_forward_hook(forward)
            elif kind.startswith("pre"):
                module.register_forward_pre_hook(pre, with_kwargs=kind == "pre_with_kwargs")
        try:
            with torch.no_grad():
                model(random_images(), max_stages=1)
        finally:
            for handle in handles:
                handle.remove()
        assert len(seen) > 10
        for tensor, before in seen:
            assert torch.equal(tensor, before)

    @torch.no_grad()
    def test_recording_once_does_not_end_it(self):
        model, images = lively_model(num_hidden_layers=2), random_images()
        with CountOperations("gelu_", "add_") as first:
            model(images, max_stages=1)
        assert first.count == 2 * 3  # the activation and both residuals of each layer
        model(images, max_stages=1, output_hidden_states=True, output_attentions=True)
        with CountOperations("gelu_", "add_") as again:
            model(images, max_stages=1)
        assert again.count == first.count

    @torch.no_grad()
    def test_recorded_outputs_stay_as_they_were(self):
        model, images = lively_model(), random_images()
        model.set_attn_implementation("eager")
        plain = model(images, output_hidden_states=True, max_stages=1).hidden_states
        with torch.enable_grad():
            expected = model(images, output_hidden_states=True, max_stages=1).hidden_states
        for tensor, other in zip(plain, expected):
            assert torch.equal(tensor, other)

    @pytest.mark.parametrize("replaced", ["attention.o_proj", "attention", "mlp", "mlp.fc1", "mlp.fc2", "dropout"])
    @pytest.mark.parametrize("how", ["module", "subclass", "forward"])
    @torch.no_grad()
    def test_a_module_that_returns_what_others_hold(self, how, replaced):
        """For example an adapter that returns its input, or one that returns a stored tensor."""
        model = lively_model(num_hidden_layers=2)
        layer, images = model.thinkingvit.layers[0], random_images()
        held = torch.randn(6, 17, 128 if replaced == "mlp.fc1" else 32)
        before = held.clone()

        def answer(hidden_states, *args, **kwargs):
            width = hidden_states.shape[-1]
            if replaced.endswith(("fc1", "fc2", "proj")):  # in the place of a linear layer, called at full width
                width = args[0] if args else held.shape[-1]
            output = held[..., :width]
            return (output, None) if replaced == "attention" else output

        old = layer.get_submodule(replaced)
        if how == "forward":
            old.forward = answer
        else:
            # A layer calls other methods of its attention than `forward` too.
            bases = (torch.nn.Module,) if how == "module" and replaced != "attention" else (type(old),)
            new = type("Stored", bases, {"forward": lambda self, *args, **kwargs: answer(*args, **kwargs)})
            new = new.__new__(new)
            new.__dict__.update(old.__dict__)
            layer.set_submodule(replaced, new)
        model(images, threshold=0.0)
        assert torch.equal(held, before)

    def test_a_replaced_activation_serves_training_and_inference(self):
        model, images = lively_model(), random_images()
        for layer in model.thinkingvit.layers:
            layer.mlp.activation_fn = torch.nn.ReLU()
        self.assert_equal_without_gradients(model, images)
        for layer in model.thinkingvit.layers:
            layer.mlp.activation_fn = GELUActivation(use_gelu_python=True)
        self.assert_equal_without_gradients(model, images)

    def assert_equal_without_gradients(self, model, images):
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
