"""Training of token pruning: sampled decisions, attention to what is kept, the ratio loss; and what trains them."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from hf_thinkingvit.conversion.convert import load_official, read_checkpoint
from hf_thinkingvit.models import token_pruning_training
from hf_thinkingvit.models.token_pruning import ScorePredictor
from hf_thinkingvit.models.token_pruning_training import attention_to_kept, sample_kept
from hf_thinkingvit.training import TrainingConfig
from hf_thinkingvit.training.distillation import Teacher
from hf_thinkingvit.training.losses import TrainingLoss
from tests.utils import FIXTURES, lively_model, random_images


PRUNING = {"pruning_layers": [1, 2], "pruning_keep_rate": 0.5}


class Golden:
    """A golden's model in training mode, with its noise; and its outputs, final tokens and decisions."""

    def __init__(self, name: str, monkeypatch):
        self.expected = load_file(FIXTURES / name / "expected.safetensors")
        self.model = load_official(read_checkpoint(FIXTURES / name)).train()
        noise = [self.expected[f"train.gumbel_noise.{index}"] for index in range(3)]
        monkeypatch.setattr(token_pruning_training, "gumbel_noise", lambda log_probabilities: noise.pop(0))
        self.log_probabilities = []
        for predictor in self.model.thinkingvit.score_predictors:
            predictor.register_forward_hook(lambda module, inputs, output: self.log_probabilities.append(output))
        self.pixel_values, self.labels = self.expected["pixel_values"], self.expected["train.labels"]
        self.outputs = self.model(self.pixel_values, self.labels)

    def loss(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a run, without label smoothing; the teacher's outputs are stored."""
        teacher = StoredTeacher(self.model)
        teacher.stored = self.expected["teacher.logits"], F.pad(self.expected["teacher.tokens"], (0, 0, 1, 0))
        config = TrainingConfig(label_smoothing=0.0, distillation="tokens")
        loss = TrainingLoss(config, self.model.config, teacher)
        return loss(self.outputs, self.pixel_values, self.labels, 0)

    def close(self, ours: torch.Tensor, name: str, atol: float = 1e-4) -> None:
        torch.testing.assert_close(
            ours, self.expected[name].view(ours.shape), atol=atol, rtol=0, msg=lambda m: name + m
        )


class StoredTeacher(Teacher):
    """A teacher that gives stored outputs."""

    def __init__(self, model):
        unpruned = copy.deepcopy(model)
        unpruned.config.pruning_layers = unpruned.config.pruning_keep_rate = None
        super().__init__(unpruned)

    def answer_and_tokens(self, pixel_values):
        return self.stored


@pytest.mark.parametrize("name", ["dynamicvit", "thinking_dynamicvit"])
def test_decisions_and_losses_are_the_official_ones(name, monkeypatch):
    golden = Golden(name, monkeypatch)
    outputs = golden.outputs
    for index, decision in enumerate(outputs.keep_decisions):
        golden.close(golden.log_probabilities[index], f"train.predictor_log_prob.{index}")
        assert torch.equal(decision.detach().round(), golden.expected[f"train.decision.{index}"].round())
        golden.close(decision, f"train.decision.{index}", atol=1e-6)
    golden.close(outputs.keep_decisions[-1].detach(), "train.mask", atol=1e-6)
    golden.close(outputs.patch_tokens, "train.tokens")
    _, parts = golden.loss()
    golden.close(parts["answer_distillation"], "train.loss.class_distillation")
    golden.close(parts["token_distillation"], "train.loss.token_distillation")
    golden.close(3 * parts["ratio_loss"], "train.loss.ratio", atol=1e-5)
    staged = name == "thinking_dynamicvit"
    for stage, logits in enumerate(golden.outputs.stage_logits):
        golden.close(logits, f"train.stage{stage}.logits" if staged else "train.logits")
        class_loss = f"train.loss.classification.stage{stage}" if staged else "train.loss.classification"
        golden.close(F.cross_entropy(logits, golden.labels), class_loss)


def test_gradients_are_the_official_ones(monkeypatch):
    golden = Golden("dynamicvit", monkeypatch)
    loss, _ = golden.loss()
    golden.close(loss, "train.loss")
    loss.backward()
    model = golden.model.thinkingvit
    golden.close(model.embeddings.cls_token.grad, "train.grad.cls_token")
    golden.close(model.score_predictors[0].in_proj.bias.grad, "train.grad.score_predictor.0.in_conv.1.bias")


def test_the_models_own_loss():
    """The stages' losses and the weighted ratio loss, with which every parameter learns."""
    model = lively_model(thinking_stages=[2, 4], pruning_ratio_loss_weight=3.0, **PRUNING).train()
    images, labels = random_images(), torch.arange(6)
    outputs = model(images, labels)
    answers = sum(F.cross_entropy(logits, labels) / 2 for logits in outputs.stage_logits)
    torch.testing.assert_close(outputs.loss, answers + 3.0 * outputs.ratio_loss)
    outputs.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert model(images, labels, max_stages=1).ratio_loss is None
    assert model.eval()(images, labels).ratio_loss is None


def test_parts_of_a_batch_sum_to_its_loss():
    """As `Trainer` calls a model with gradient accumulation; stage logits differ by the draws alone."""
    model, images, labels = lively_model(**PRUNING).train(), random_images(6), torch.arange(6)
    torch.manual_seed(0)
    whole = model(images, labels, num_items_in_batch=12)
    torch.manual_seed(0)
    alone = model(images, labels)
    torch.testing.assert_close(2 * whole.loss, alone.loss)
    torch.testing.assert_close(2 * whole.ratio_loss, alone.ratio_loss)


def test_the_ratio_loss_pulls_the_shares_to_the_rate():
    """Which may be given in the call."""
    model = lively_model(thinking_stages=[4], **PRUNING).train()
    images = random_images(16)
    parameters = model.thinkingvit.score_predictors.parameters()
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    torch.manual_seed(0)
    losses = []
    for _ in range(60):
        loss = model(images, output_stage_logits=True, keep_rate=[0.1, 0.05]).ratio_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])


def test_draws_follow_the_probabilities():
    torch.manual_seed(0)
    probability = torch.tensor([0.1, 0.5, 0.9])
    log_probabilities = torch.stack([probability, 1 - probability], dim=-1).log().expand(4000, 3, 2)
    kept = sample_kept(log_probabilities)
    assert set(kept.unique().round().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(kept.mean(dim=0), probability, atol=0.03, rtol=0)


@torch.no_grad()
def test_attention_to_all_is_the_softmax_up_to_epsilon():
    query, key, value = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    output, probabilities = attention_to_kept(query, key, value, torch.ones(2, 9), 0.3)
    expected = (query @ key.transpose(2, 3) * 0.3).softmax(dim=-1)
    torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(output, (expected @ value).transpose(1, 2), atol=1e-5, rtol=0)


@torch.no_grad()
def test_left_out_tokens_are_keys_for_themselves_alone():
    query, key, value = torch.randn(3, 1, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    _, probabilities = attention_to_kept(query, key, value, torch.tensor([[1.0, 1.0, 0.0, 0.0]]), 0.3)
    assert (probabilities[0, 0] > 1e-5).tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [True, True, True, False],
        [True, True, False, True],
    ]
    some, _ = attention_to_kept(query[:, :, :1], key, value, torch.tensor([[1.0, 1.0, 0.0, 0.0]]), 0.3)
    torch.testing.assert_close(some[0, 0, 0], (probabilities[0, 0] @ value[0, 0])[0])


@torch.no_grad()
def test_the_epsilon_is_the_official_one():
    """Far below the goldens' tolerance. With scores of 0 a visible key weighs 1, and a left-out one ε / tokens."""
    query = torch.zeros(1, 8, 4, 8)
    kept = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    _, probabilities = attention_to_kept(query, query, query, kept, 0.3)
    assert probabilities[0, 0, 0, 2].item() == pytest.approx(1e-6 / 4 / (2 + 1e-6), rel=1e-4)
    _, dropped = attention_to_kept(query, query, query, kept, 0.3, dropout=0.5)
    torch.testing.assert_close(dropped, torch.where(dropped == 0, 0.0, 2 * probabilities))
    assert 0.2 < (dropped == 0).float().mean() < 0.8


def test_images_without_any_kept_patch_stay_finite(monkeypatch):
    removing = torch.tensor([-50.0, 50.0])
    monkeypatch.setattr(token_pruning_training, "gumbel_noise", lambda log: removing.expand_as(log))
    model = lively_model(**PRUNING).train()
    outputs = model(random_images(), torch.arange(6))
    outputs.loss.backward()
    torch.testing.assert_close(outputs.ratio_loss, torch.tensor((0.5**2 + 0.25**2) / 2))
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_predictor_averages_over_what_is_kept():
    predictor, patches = ScorePredictor(8), torch.randn(1, 5, 8)
    kept = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]])
    among_kept = predictor(patches[:, ::2])
    torch.testing.assert_close(predictor(patches, kept)[:, ::2], among_kept)
    torch.testing.assert_close(predictor(patches, torch.ones(1, 5)), predictor(patches))
    assert predictor(patches, torch.zeros(1, 5)).isfinite().all()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    images, labels, gradients = random_images(), torch.arange(6), []
    for checkpointing in (False, True):
        model = lively_model(**PRUNING).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        torch.manual_seed(0)
        model(images, labels).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=lambda m: f"{name}: {m}")


def test_kept_tokens_are_of_evaluation():
    with pytest.raises(ValueError, match="`output_kept_tokens` is of evaluation mode"):
        lively_model(**PRUNING).train()(random_images(), output_kept_tokens=True)


@pytest.mark.parametrize("weight", [-1.0, "2", float("nan")])
def test_bad_weights_of_the_ratio_loss(weight):
    with pytest.raises(ValueError, match="`pruning_ratio_loss_weight`"):
        lively_model(pruning_ratio_loss_weight=weight, **PRUNING)


def test_golden_settings_are_those_of_the_models():
    for name in ("dynamicvit", "thinking_dynamicvit"):
        stated = json.loads((FIXTURES / name / "config.json").read_text())["model_args"]
        config = load_official(read_checkpoint(FIXTURES / name)).config
        assert (stated["pruning_loc"], stated["base_rate"]) == (config.pruning_layers, config.pruning_keep_rate)
