"""In inference, layers write over what nobody else reads."""

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers.activations import GELUActivation

from tests.utils import CountOperations, lively_model, random_images


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
