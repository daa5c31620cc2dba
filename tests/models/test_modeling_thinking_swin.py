import pytest
import torch
from safetensors.torch import load_file

from hf_thinkingvit.conversion.convert import load_official, read_checkpoint
from hf_thinkingvit.models.exit_criteria import topk_entropy
from tests.reference import thinking_swin_stages
from tests.utils import FIXTURES, lively_swin, middle_threshold, random_images


SCHEDULES = [[[2, 4]], [[1, 2], [1, 2]], [[1, 2], [2, 4]], [[1, 1], [1, 2], [2, 4]], [[1, 1], [1, 2], [1, 2], [2, 3]]]


class TestGolden:
    """Outputs of the official implementation."""

    @pytest.fixture
    def golden(self):
        folder = FIXTURES / "thinkingswin"
        return load_official(read_checkpoint(folder)), load_file(folder / "expected.safetensors")

    @torch.no_grad()
    def test_every_round(self, golden):
        model, expected = golden
        outputs = model(expected["pixel_values"], output_stage_logits=True)
        for index in range(model.config.num_stages):
            logits = outputs.stage_logits[index]
            tokens = model.thinking_swin(expected["pixel_values"], max_stages=index + 1).last_hidden_state
            torch.testing.assert_close(logits, expected[f"stage{index}.logits"], atol=1e-4, rtol=0)
            torch.testing.assert_close(topk_entropy(logits), expected[f"stage{index}.entropy"], atol=1e-4, rtol=0)
            expected_tokens = expected[f"stage{index}.last_hidden_state"].flatten(1, 2)
            torch.testing.assert_close(tokens, expected_tokens, atol=1e-4, rtol=0)

    @torch.no_grad()
    def test_every_threshold(self, golden):
        model, expected = golden
        names = [name for name in expected if name.startswith("threshold.") and name.endswith(".stage")]
        assert len(names) == 3
        for name in names:
            threshold = float(name.removeprefix("threshold.").removesuffix(".stage"))
            # Some τ are an image's own entropy, which does not exit; the file's names round them, maybe upwards.
            outputs = model(expected["pixel_values"], threshold=max(threshold - 5e-6, 0.0))
            assert torch.equal(outputs.exit_stage, expected[name])
            logits = expected[name.replace(".stage", ".logits")]
            torch.testing.assert_close(outputs.logits, logits, atol=1e-4, rtol=0)


class TestRounds:
    """The computation, against ThinkingSwin written out plainly."""

    @pytest.mark.parametrize("rounds", SCHEDULES)
    @torch.no_grad()
    def test_logits_of_every_round(self, rounds):
        model, pixel_values = lively_swin(head_rounds=rounds), random_images()
        expected, tokens = thinking_swin_stages(model, pixel_values)
        outputs = model(pixel_values, output_stage_logits=True)
        assert len(outputs.stage_logits) == len(rounds)
        for index in range(len(rounds)):
            torch.testing.assert_close(outputs.stage_logits[index], expected[index], atol=1e-5, rtol=1e-5)
            last_hidden_state = model.thinking_swin(pixel_values, max_stages=index + 1).last_hidden_state
            torch.testing.assert_close(last_hidden_state, tokens[index].flatten(1, 2), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("rounds", SCHEDULES)
    def test_gradients_in_training(self, rounds):
        model = lively_swin(head_rounds=rounds).train()
        pixel_values, labels = random_images(), torch.arange(6)
        logits, _ = thinking_swin_stages(model, pixel_values)
        expected_loss = sum(torch.nn.functional.cross_entropy(z, labels) for z in logits) / len(rounds)
        expected = torch.autograd.grad(expected_loss, list(model.parameters()))
        loss = model(pixel_values, labels=labels).loss
        loss.backward()
        torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
        for (name, parameter), gradient in zip(model.named_parameters(), expected):
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")

    @pytest.mark.parametrize("backend", ["eager", "sdpa"])
    @torch.no_grad()
    def test_attention_backends_agree(self, backend):
        model, pixel_values = lively_swin(), random_images()
        expected, _ = thinking_swin_stages(model, pixel_values)
        model.set_attn_implementation(backend)
        torch.testing.assert_close(model(pixel_values).logits, expected[-1], atol=1e-5, rtol=1e-5)

    @torch.no_grad()
    def test_an_answer_does_not_depend_on_the_other_images(self):
        model, pixel_values = lively_swin(), random_images(10)
        threshold = middle_threshold(model, pixel_values)
        together = model(pixel_values, threshold=threshold)
        assert len(together.exit_stage.unique()) > 1
        for row in range(10):
            alone = model(pixel_values[row : row + 1], threshold=threshold)
            assert alone.exit_stage.item() == together.exit_stage[row].item()
            torch.testing.assert_close(alone.logits[0], together.logits[row], atol=1e-5, rtol=1e-5)
