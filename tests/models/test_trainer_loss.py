"""The loss that `Trainer` optimises: accumulated over parts of a batch, and computed by `Trainer` itself."""

import copy

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from tests.models.test_modeling_avit import lively_avit
from tests.utils import lively_model, middle_threshold, random_images


IMAGES = random_images(8, size=16)
INDICES = torch.arange(8) % 4
TARGETS = (torch.arange(32).view(8, 4) % 3 == 0).float()


def lively(family: str, **overrides):
    if family == "avit":
        # The prior uses averages over a batch, which differ for its parts.
        losses = {"ponder_loss_weight": 1.0, "prior_loss_weight": 0.0}
        return lively_avit(**{"image_size": 16, "num_labels": 4, "distilled": True, **losses, **overrides})
    return lively_model(**{"image_size": 16, "num_labels": 4, "thinking_stages": [2, 4], **overrides})


def trainer(model, labels: torch.Tensor, output_dir, **arguments) -> Trainer:
    """One step of plain SGD on eight images."""
    dataset = Dataset.from_dict({"pixel_values": IMAGES.numpy(), "labels": labels.numpy()}).with_format("torch")
    fields = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "optim": "sgd", "learning_rate": 0.1}
    fields |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1, "save_strategy": "no"}
    fields |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "seed": 0, "logging_steps": 1}
    arguments = TrainingArguments(output_dir=str(output_dir), **{**fields, **arguments})
    return Trainer(model, arguments, train_dataset=dataset, eval_dataset=dataset)


@pytest.mark.parametrize(
    "fields, labels",
    [
        ({"label_smoothing": 0.1}, INDICES),
        ({"problem_type": "multi_label_classification"}, TARGETS),
        ({"num_labels": 1}, torch.linspace(-1, 1, 8)),
    ],
    ids=["single_label", "multi_label", "regression"],
)
@pytest.mark.parametrize("family", ["thinkingvit", "avit"])
def test_four_accumulated_parts_are_one_batch(family, fields, labels, tmp_path):
    model = lively(family, **fields).train()
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    trained = trainer(whole, labels, tmp_path).train()
    in_parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert trainer(parts, labels, tmp_path, **in_parts).train().training_loss == pytest.approx(trained.training_loss)
    # The expected step, without `Trainer`.
    model(IMAGES, labels=labels).loss.backward()
    for (name, parameter), one, four in zip(model.named_parameters(), whole.parameters(), parts.parameters()):
        expected = parameter.detach() - 0.1 * parameter.grad
        torch.testing.assert_close(one.detach(), expected, atol=1e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")
        torch.testing.assert_close(four.detach(), expected, atol=1e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")


def test_parts_with_ignored_images_are_one_batch(tmp_path):
    labels = INDICES.clone()
    labels[:3] = -100
    model = lively("thinkingvit")
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    trainer(whole, labels, tmp_path).train()
    trainer(parts, labels, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4).train()
    for (name, one), four in zip(whole.named_parameters(), parts.parameters()):
        torch.testing.assert_close(one, four, atol=1e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("family, lost", [("thinkingvit", "the last stage only"), ("avit", "ponder and prior losses")])
def test_a_loss_that_trainer_computes_is_warned_of(family, lost, tmp_path):
    logging.warning_once.cache_clear()
    with CaptureLogger(logging.get_logger("hf_thinkingvit.models.module_arguments")) as captured:
        trainer(lively(family), INDICES, tmp_path, label_smoothing_factor=0.1).train()
    assert captured.out.count(lost) == 1
    assert "`label_smoothing_factor`" in captured.out and "set `label_smoothing` in the model's conf" in captured.out
    logging.warning_once.cache_clear()
    with CaptureLogger(logging.get_logger("hf_thinkingvit.models.module_arguments")) as captured:
        trainer(lively(family, label_smoothing=0.1), INDICES, tmp_path).train()
    assert captured.out == ""


def test_evaluation_loss_is_of_the_accepted_answers(tmp_path):
    """`Trainer`'s `label_smoothing_factor` smooths it; the model's `label_smoothing` is for training only."""
    model = lively("thinkingvit", label_smoothing=0.1)
    model.config.threshold = middle_threshold(model, IMAGES)
    logits = model(IMAGES).logits
    own = trainer(model, INDICES, tmp_path).evaluate()["eval_loss"]
    assert own == pytest.approx(F.cross_entropy(logits, INDICES).item(), rel=1e-5)
    smoothed = trainer(model, INDICES, tmp_path, label_smoothing_factor=0.1).evaluate()["eval_loss"]
    assert smoothed == pytest.approx(F.cross_entropy(logits, INDICES, label_smoothing=0.1).item(), rel=1e-5)
