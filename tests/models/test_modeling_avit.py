import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_thinkingvit import AViTConfig, AViTForImageClassification, convert_checkpoint
from hf_thinkingvit.conversion.convert import load_official, read_checkpoint
from hf_thinkingvit.models.modeling_avit import AViTImageClassifierOutput
from tests.models.test_weights_from_vit import trained_vit
from tests.utils import FIXTURES, counted_flops, random_images


def lively_avit(**overrides) -> AViTForImageClassification:
    """A model in evaluation mode whose tokens halt at different depths."""
    fields = {
        "num_attention_heads": 2,
        "hidden_size": 16,
        "num_hidden_layers": 5,
        "image_size": 32,
        "patch_size": 8,
        "num_labels": 12,
        "gate_scale": 2.0,
        "gate_center": 1.0,
        "target_depth": 3,
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AViTForImageClassification(AViTConfig(**{**fields, **overrides}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


# Gates at which tokens halt everywhere, nowhere, and all after one layer.
GATES = {"mixed": {}, "none": {"gate_center": 1e4}, "all": {"gate_center": -1e4}}


class TestGolden:
    """Outputs of the official implementation."""

    @pytest.fixture
    def golden(self):
        return load_official(read_checkpoint(FIXTURES / "avit")), load_file(FIXTURES / "avit" / "expected.safetensors")

    @torch.no_grad()
    def test_dense(self, golden):
        model, expected = golden
        outputs = model.avit(expected["pixel_values"])
        torch.testing.assert_close(outputs.halting_scores, expected["halting_scores"], atol=1e-4, rtol=0)
        assert torch.equal(outputs.token_depth, expected["token_depth"].long())
        torch.testing.assert_close(outputs.ponder, expected["rho"], atol=1e-4, rtol=0)
        logits = model.classifier(outputs.last_hidden_state[:, 0])
        torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)

    @pytest.mark.parametrize("output_token_depth", [True, False])
    @torch.no_grad()
    def test_sparse(self, golden, output_token_depth):
        model, expected = golden
        outputs = model(expected["pixel_values"], output_token_depth=output_token_depth)
        torch.testing.assert_close(outputs.logits, expected["logits"], atol=1e-4, rtol=0)
        if output_token_depth:
            assert torch.equal(outputs.token_depth, expected["token_depth"].long())

    def test_training(self, golden):
        model, expected = golden
        outputs = model.train()(expected["pixel_values"], labels=torch.arange(8))
        torch.testing.assert_close(outputs.ponder_loss, expected["ponder_loss"][0], atol=1e-4, rtol=0)
        torch.testing.assert_close(outputs.logits, expected["logits"], atol=1e-4, rtol=0)
        weights = model.config.ponder_loss_weight, model.config.prior_loss_weight
        expected_loss = outputs.task_loss + weights[0] * outputs.ponder_loss + weights[1] * outputs.prior_loss
        torch.testing.assert_close(outputs.loss, expected_loss)


class TestSparse:
    """The sparse computation against the dense one."""

    @pytest.mark.parametrize("batch_size", [1, 64])
    @pytest.mark.parametrize("distilled", [False, True])
    @pytest.mark.parametrize("gate", sorted(GATES))
    @torch.no_grad()
    def test_equals_the_masked_computation(self, gate, distilled, batch_size):
        model, pixel_values = lively_avit(distilled=distilled, **GATES[gate]), random_images(batch_size)
        dense = model.avit(pixel_values)
        heads = [model.classifier(dense.last_hidden_state[:, 0])]
        if distilled:
            heads.append(model.distillation_classifier(dense.last_hidden_state[:, 1]))
        logits = sum(heads) / len(heads)
        fast, full = model(pixel_values), model(pixel_values, output_token_depth=True)
        torch.testing.assert_close(fast.logits, logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(full.logits, logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(full.token_depth, dense.token_depth)
        assert fast.token_depth is None
        depths = set(dense.token_depth.flatten().tolist())
        assert depths == {"mixed": {1, 2, 3, 4, 5}, "none": {5}, "all": {1}}[gate] or (
            batch_size == 1 and len(depths) > 2
        )

    @torch.no_grad()
    def test_images_leave_with_their_class_token(self):
        model, pixel_values = lively_avit(), random_images(32)
        dense = model.avit(pixel_values)
        class_depth = dense.token_depth[:, 0]
        assert len(class_depth.unique()) > 2
        outputs = model(pixel_values)
        # Tokens still active when the class token halts leave with it.
        left = torch.minimum(dense.token_depth, class_depth[:, None])
        torch.testing.assert_close(outputs.mean_depth, left.float().mean(1))

    @torch.no_grad()
    def test_halted_tokens_are_not_computed(self):
        model, pixel_values = lively_avit(gate_center=2.0), random_images(16)
        rows = []
        for layer in model.avit.layers:
            layer.mlp.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
        depth = model.avit(pixel_values).token_depth
        rows.clear()
        model(pixel_values)
        class_depth = depth[:, :1]
        running = [int(((depth >= layer) & (class_depth >= layer)).sum()) for layer in range(1, 5)]
        assert rows == [count for count in (*running, int((class_depth == 5).sum())) if count]
        assert running[0] > running[1] > running[2] > 0

    @pytest.mark.parametrize("output_token_depth", [False, True])
    @torch.no_grad()
    def test_no_layer_runs_without_tokens(self, output_token_depth):
        model, layers = lively_avit(**GATES["all"]), []
        for index, layer in enumerate(model.avit.layers):
            layer.mlp.register_forward_hook(lambda module, args, output, index=index: layers.append(index))
        outputs = model(random_images(4), output_token_depth=output_token_depth)
        assert layers == [0] and torch.equal(outputs.mean_depth, torch.ones(4))

    @pytest.mark.parametrize("distilled", [False, True])
    @pytest.mark.parametrize("gate", sorted(GATES))
    @torch.no_grad()
    def test_macs_are_those_of_the_operations(self, gate, distilled):
        model, images = lively_avit(distilled=distilled, **GATES[gate]), random_images(5)
        for image in images.split(1):
            assert 2 * model(image).macs.item() == counted_flops(lambda image=image: model(image))
        assert 2 * model(images).macs.sum().item() == counted_flops(lambda: model(images))

    @torch.no_grad()
    def test_an_answer_does_not_depend_on_the_other_images(self):
        model, pixel_values = lively_avit(), random_images(9)
        together = model(pixel_values)
        for row in range(9):
            alone = model(pixel_values[row : row + 1])
            torch.testing.assert_close(alone.logits[0], together.logits[row], atol=1e-5, rtol=1e-5)
            assert alone.macs[0] == together.macs[row] and alone.mean_depth[0] == together.mean_depth[row]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @torch.no_grad()
    def test_half_precision(self, dtype):
        model, pixel_values = lively_avit(gate_center=1e4), random_images(4)
        expected = model(pixel_values).logits
        logits = model.to(dtype)(pixel_values).logits
        assert logits.dtype == dtype
        assert (logits.float() - expected).abs().max() / expected.abs().max() < (
            0.02 if dtype == torch.float16 else 0.1
        )

    @torch.no_grad()
    def test_an_empty_batch_gives_empty_outputs(self):
        outputs = lively_avit()(torch.empty(0, 3, 32, 32), output_token_depth=True)
        assert outputs.logits.shape == (0, 12) and outputs.token_depth.shape == (0, 17) and outputs.macs.shape == (0,)

    @torch.no_grad()
    def test_broken_pixels_leave_the_others_alone(self):
        model, pixel_values = lively_avit(), random_images(4)
        expected = model(pixel_values).logits
        pixel_values[1, 0, 3, 3] = torch.nan
        logits = model(pixel_values).logits
        assert logits[1].isnan().all()
        torch.testing.assert_close(logits[[0, 2, 3]], expected[[0, 2, 3]], atol=1e-5, rtol=1e-5)


class TestOutputs:
    FIELDS = [field.name for field in dataclasses.fields(AViTImageClassifierOutput)]

    @pytest.mark.parametrize("mode", ["eval", "train"])
    @pytest.mark.parametrize("distilled", [False, True])
    def test_fields_come_in_declared_order(self, distilled, mode):
        model, labels = lively_avit(distilled=distilled).train(mode == "train"), torch.arange(6)
        model.set_attn_implementation("eager")
        for labelled in ({}, {"labels": labels}):
            for recorded in ({}, {"output_hidden_states": True, "output_attentions": True, "output_token_depth": True}):
                outputs = model(random_images(), **labelled, **recorded)
                assert list(outputs) == [name for name in self.FIELDS if getattr(outputs, name) is not None]
                assert outputs[0] is (outputs.loss if labelled else outputs.logits)
                as_tuple = model(random_images(), return_dict=False, **labelled, **recorded)
                assert len(as_tuple) == len(outputs)
                if labelled:
                    assert as_tuple[0].dim() == 0
                torch.testing.assert_close(as_tuple[len(labelled)], outputs.logits)

    @pytest.mark.parametrize("max_depth", [None, 3])
    @pytest.mark.parametrize("distilled", [False, True])
    @torch.no_grad()
    def test_depth_and_macs_do_not_depend_on_what_is_returned(self, distilled, max_depth):
        gate = {"gate_center": -2.0} if distilled else {}
        model, pixel_values = lively_avit(distilled=distilled, **gate), random_images(16)
        model.set_attn_implementation("eager")
        plain = model(pixel_values, max_depth=max_depth)
        token_depth = model.avit(pixel_values, max_depth=max_depth).token_depth
        assert (plain.mean_depth < token_depth.float().mean(1)).any()  # some tokens left because their image exited
        for asked in ("output_token_depth", "output_hidden_states", "output_attentions"):
            outputs = model(pixel_values, max_depth=max_depth, **{asked: True})
            assert torch.equal(outputs.mean_depth, plain.mean_depth) and torch.equal(outputs.macs, plain.macs)
        training = model.train()(pixel_values, max_depth=max_depth, labels=torch.zeros(16, dtype=torch.long))
        assert torch.equal(training.mean_depth, plain.mean_depth) and training.macs is None


class TestControl:
    @torch.no_grad()
    def test_halting_epsilon_of_a_call(self):
        model, pixel_values = lively_avit(), random_images()
        depths = [
            model(pixel_values, halting_epsilon=e, output_token_depth=True).token_depth.float().mean()
            for e in (0, 0.3, 0.9)
        ]
        assert depths[0] > depths[1] > depths[2]
        dense = model.avit(pixel_values, halting_epsilon=0.3)
        assert dense.token_depth.float().mean() == depths[1]

    @pytest.mark.parametrize("max_depth", [1, 3, 5])
    @torch.no_grad()
    def test_max_depth_of_a_call(self, max_depth):
        model, pixel_values = lively_avit(), random_images()
        outputs = model(pixel_values, max_depth=max_depth, output_token_depth=True)
        dense = model.avit(pixel_values, max_depth=max_depth)
        assert outputs.token_depth.max() == max_depth and torch.equal(outputs.token_depth, dense.token_depth)
        expected = model.classifier(dense.last_hidden_state[:, 0])
        torch.testing.assert_close(outputs.logits, expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(
        "argument, value",
        [("max_depth", 0), ("max_depth", 6), ("max_depth", 1.5), ("halting_epsilon", 1.0), ("halting_epsilon", -0.1)],
    )
    def test_refuses_what_cannot_work(self, argument, value):
        with pytest.raises(ValueError, match=f"`{argument}`"):
            lively_avit()(random_images(), **{argument: value})

    @pytest.mark.parametrize(
        "field, value",
        [
            ("gate_channel", 192),
            ("gate_scale", float("nan")),
            ("halting_epsilon", 1),
            ("halting_epsilon", 1.5),
            ("prior_std", 0),
            ("ponder_loss_weight", -1),
            ("hidden_size", 100),
            ("image_size", 8),
        ],
    )
    def test_configuration_refuses_what_cannot_work(self, field, value):
        with pytest.raises(ValueError, match=f"`{field}`"):
            AViTConfig(**{field: value})


class TestTraining:
    def test_every_parameter_learns(self):
        for distilled in (False, True):
            model = lively_avit(distilled=distilled).train()
            model(random_images(), labels=torch.arange(6)).loss.backward()
            assert all(
                parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters()
            )

    def test_ponder_loss_pulls_depth_down(self):
        model = lively_avit(ponder_loss_weight=1.0, prior_loss_weight=0.0).train()
        optimizer, depths = torch.optim.SGD(model.parameters(), lr=0.05), []
        for _ in range(15):
            outputs = model(random_images(), labels=torch.arange(6), output_token_depth=True)
            depths.append(outputs.token_depth.float().mean().item())
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert depths[-1] < depths[0]

    def test_no_gradient_flows_through_images_without_active_tokens(self):
        model = lively_avit(gate_center=-1e4).train()
        model(random_images(), labels=torch.arange(6)).loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


class TestWeights:
    @pytest.mark.parametrize("kind", ["vit", "deit_with_teacher"])
    @torch.no_grad()
    def test_from_vit_gives_the_sources_logits_while_nothing_halts(self, kind):
        vit, pixel_values = trained_vit(kind), random_images()
        model = AViTForImageClassification.from_vit(vit, gate_center=1e4).eval()
        assert model.config.distilled == (kind != "vit") and model.config.id2label[1] == "dog"
        outputs = model(pixel_values)
        torch.testing.assert_close(outputs.logits, vit(pixel_values).logits, atol=1e-5, rtol=0)
        assert model.num_parameters() == vit.num_parameters()

    def test_a_deit_with_one_head_starts_both(self):
        vit = trained_vit("deit")
        model = AViTForImageClassification.from_vit(vit)
        assert torch.equal(model.classifier.weight, vit.classifier.weight)
        assert torch.equal(model.distillation_classifier.weight, vit.classifier.weight)

    def test_official_file_with_the_gate_by_argument(self, tmp_path):
        state_dict = load_file(FIXTURES / "avit" / "model.safetensors")
        torch.save({"model": state_dict}, tmp_path / "a.pth")
        arguments = {"num_attention_heads": 3, "gate_scale": 4.0}
        with pytest.raises(ValueError, match="Pass `gate_center`: the official weights have"):
            convert_checkpoint(tmp_path / "a.pth", tmp_path / "out", **arguments)
        convert_checkpoint(tmp_path / "a.pth", tmp_path / "out", gate_center=3.0, **arguments)
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        expected = load_file(FIXTURES / "avit" / "expected.safetensors")
        with torch.no_grad():
            logits = model(expected["pixel_values"]).logits
        torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)

    def test_a_distilled_file_keeps_both_heads(self, tmp_path):
        state_dict = load_file(FIXTURES / "avit" / "model.safetensors")
        state_dict["dist_token"] = torch.randn(1, 1, 48)
        state_dict["pos_embed"] = torch.randn(1, 18, 48)
        state_dict["head_dist.weight"], state_dict["head_dist.bias"] = torch.randn(20, 48), torch.randn(20)
        torch.save({"model": state_dict}, tmp_path / "a.pth")
        overrides = {"num_attention_heads": 3, "gate_scale": 4.0, "gate_center": 3.0}
        model = convert_checkpoint(tmp_path / "a.pth", tmp_path / "out", **overrides)
        assert model.config.distilled and model.config.image_size == 32
        assert torch.equal(model.distillation_classifier.weight, state_dict["head_dist.weight"])
