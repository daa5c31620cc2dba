"""Tests of every model that answers in stages, whatever its backbone. The models' own test files run them."""

import math
from collections.abc import Callable

import accelerate
import pytest
import torch
from safetensors.torch import load_file

from hf_thinkingvit import EXIT_CRITERIA
from hf_thinkingvit.conversion.convert import load_official, read_checkpoint
from tests.utils import FIXTURES, middle_threshold, random_images


@torch.no_grad()
def assert_golden(golden: str, num_thresholds: int) -> None:
    """
    With the weights in `tests/fixtures/{golden}`, the outputs equal those of the official implementation: logits,
    entropy and final tokens of every stage, and exit stages and logits at each of the `num_thresholds` stored τ.
    """
    model = load_official(read_checkpoint(FIXTURES / golden))
    expected = load_file(FIXTURES / golden / "expected.safetensors")
    pixel_values = expected["pixel_values"]
    outputs = model(pixel_values, output_stage_logits=True)
    for index in range(model.config.num_stages):
        logits = outputs.stage_logits[index]
        tokens = model.base_model(pixel_values, max_stages=index + 1).last_hidden_state
        torch.testing.assert_close(logits, expected[f"stage{index}.logits"], atol=1e-4, rtol=0)
        entropy = EXIT_CRITERIA["topk_entropy"].score(logits, 10)
        torch.testing.assert_close(entropy, expected[f"stage{index}.entropy"], atol=1e-4, rtol=0)
        expected_tokens = expected[f"stage{index}.last_hidden_state"].flatten(1, -2)
        torch.testing.assert_close(tokens, expected_tokens, atol=1e-4, rtol=0)
    names = [name for name in expected if name.startswith("threshold.") and name.endswith(".stage")]
    assert len(names) == num_thresholds
    for name in names:
        threshold = float(name.removeprefix("threshold.").removesuffix(".stage"))
        # Some τ equal an image's entropy, so that it must not exit; the names in the file may round them upwards.
        outputs = model(pixel_values, threshold=max(threshold - 5e-6, 0.0))
        assert torch.equal(outputs.exit_stage, expected[name])
        logits = expected[name.replace(".stage", ".logits")]
        torch.testing.assert_close(outputs.logits, logits, atol=1e-4, rtol=0)


def assert_gradients(model, reference: Callable) -> None:
    """The training loss with equal weights, and its gradients, equal those of the `reference` implementation."""
    pixel_values, labels = random_images(), torch.arange(6)
    logits, _ = reference(model, pixel_values)
    expected_loss = sum(torch.nn.functional.cross_entropy(z, labels) for z in logits) / model.config.num_stages
    expected = torch.autograd.grad(expected_loss, list(model.parameters()))
    loss = model.train()(pixel_values, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    for (name, parameter), gradient in zip(model.named_parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")


class StagedClassifierTests:
    """
    Subclasses provide a model of three stages for 32 × 32 images with 12 labels.

    Attributes:
        lively: makes the model, in evaluation mode.
        reference: plain implementation: `(model, images) -> (logits, tokens)`, lists with one entry per stage.
        tokens_shape: shape of one image's final tokens of the last stage.
        half_tolerance: tolerance of logits in half precision, relative to the greatest logit.
    """

    lively: Callable
    reference: Callable
    tokens_shape: tuple[int, int]
    half_tolerance: dict[torch.dtype, float]

    @pytest.mark.parametrize("backend", ["eager", "sdpa"])
    @torch.no_grad()
    def test_attention_backends_agree(self, backend):
        model, pixel_values = self.lively(), random_images()
        expected, _ = self.reference(model, pixel_values)
        model.set_attn_implementation(backend)
        torch.testing.assert_close(model(pixel_values).logits, expected[-1], atol=1e-5, rtol=1e-5)

    @torch.no_grad()
    def test_an_answer_does_not_depend_on_the_other_images(self):
        model, pixel_values = self.lively(), random_images(10)
        threshold = middle_threshold(model, pixel_values)
        together = model(pixel_values, threshold=threshold)
        assert len(together.exit_stage.unique()) > 1
        for row in range(10):
            alone = model(pixel_values[row : row + 1], threshold=threshold)
            assert alone.exit_stage.item() == together.exit_stage[row].item()
            torch.testing.assert_close(alone.logits[0], together.logits[row], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(alone.entropy[0], together.entropy[row], atol=1e-5, rtol=1e-5)

    @torch.no_grad()
    def test_asking_for_all_answers_changes_no_exit(self):
        model, pixel_values = self.lively(), random_images(16)
        threshold = middle_threshold(model, pixel_values)
        plain = model(pixel_values, threshold=threshold)
        full = model(pixel_values, threshold=threshold, output_stage_logits=True)
        assert plain.stage_logits is None and [len(logits) for logits in full.stage_logits] == [16, 16, 16]
        assert torch.equal(plain.exit_stage, full.exit_stage)
        torch.testing.assert_close(plain.logits, full.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(plain.entropy, full.entropy, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
    @torch.no_grad()
    def test_broken_pixels_run_all_stages_and_leave_the_others_alone(self, broken):
        model, pixel_values = self.lively(), random_images(5)
        expected = model(pixel_values, threshold=10.0)
        pixel_values[2, 1, 5, 7] = broken
        outputs = model(pixel_values, threshold=10.0)
        assert outputs.exit_stage.tolist() == [0, 0, 2, 0, 0]
        assert outputs.logits[2].isnan().all() and outputs.entropy[2].isnan()
        others = [0, 1, 3, 4]
        torch.testing.assert_close(outputs.logits[others], expected.logits[others])

    @pytest.mark.parametrize("mode", ["eval", "train"])
    @pytest.mark.parametrize("backend", ["eager", "sdpa"])
    @torch.no_grad()
    def test_an_empty_batch_gives_empty_outputs(self, mode, backend):
        model = self.lively().train(mode == "train")
        model.set_attn_implementation(backend)
        outputs = model(torch.empty(0, 3, 32, 32))
        assert outputs.logits.shape == (0, 12)
        assert outputs.exit_stage.shape == outputs.entropy.shape == (0,)
        assert model.base_model(torch.empty(0, 3, 32, 32)).last_hidden_state.shape == (0, *self.tokens_shape)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @torch.no_grad()
    def test_half_precision(self, dtype):
        model, pixel_values = self.lively(), random_images(8)
        threshold = middle_threshold(model, pixel_values)
        reference = model(pixel_values, output_stage_logits=True)
        model.to(dtype)
        outputs = model(pixel_values, threshold=threshold)  # float32 pixels are cast, as in Transformers' models
        assert outputs.logits.dtype == dtype and outputs.entropy.dtype == torch.float32
        assert torch.equal(outputs.entropy, EXIT_CRITERIA["topk_entropy"].score(outputs.logits, 10))
        assert len(outputs.exit_stage.unique()) > 1
        expected = torch.stack([reference.stage_logits[s][row] for row, s in enumerate(outputs.exit_stage)])
        scale = expected.abs().max()
        assert (outputs.logits.float() - expected).abs().max() / scale < self.half_tolerance[dtype]

    @torch.no_grad()
    def test_entropy_stays_float32_under_autocast(self):
        model = self.lively()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(random_images(), threshold=1.0)
        assert outputs.logits.dtype == torch.bfloat16 and outputs.entropy.dtype == torch.float32

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_changes_no_gradient(self, use_reentrant):
        pixel_values, labels = random_images(), torch.arange(6)
        plain, checkpointed = self.lively().train(), self.lively().train()
        checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        plain(pixel_values, labels=labels).loss.backward()
        checkpointed(pixel_values, labels=labels).loss.backward()
        for (name, expected), parameter in zip(plain.named_parameters(), checkpointed.parameters()):
            torch.testing.assert_close(parameter.grad, expected.grad, msg=lambda m: f"{name}: {m}")

    @torch.no_grad()
    def test_offloaded_weights(self):
        model, pixel_values = self.lively(), random_images()
        expected = model(pixel_values).logits
        model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        torch.testing.assert_close(model(pixel_values).logits, expected)
        assert all(parameter.device.type == "meta" for parameter in model.parameters())
        assert not any("_cached_views" in module.__dict__ for module in model.modules())

    @pytest.mark.parametrize("max_stages", [0, 4, -1, 1.5, True])
    def test_bad_max_stages(self, max_stages):
        for model in (self.lively(), self.lively().base_model):
            with pytest.raises(ValueError, match="`max_stages` must be an integer from 1 to 3"):
                model(random_images(), max_stages=max_stages)
