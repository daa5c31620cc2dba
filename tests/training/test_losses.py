import pytest
import torch
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from hf_thinkingvit.training import TrainingConfig
from hf_thinkingvit.training.losses import TrainingLoss
from tests.models.test_modeling_avit import lively_avit
from tests.utils import lively_model, random_images


LABELS = torch.tensor([3, 0, 11, 5])


def config(**overrides) -> TrainingConfig:
    return TrainingConfig(**{"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0, **overrides})


def outputs_of(model, labels=LABELS):
    return model.train()(random_images(4), labels=labels)


def vit_teacher(**overrides) -> ViTForImageClassification:
    fields = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = ViTForImageClassification(ViTConfig(**fields, image_size=32, patch_size=16, num_labels=12, **overrides))
        for parameter in model.parameters():
            parameter.data.normal_()
    return model.eval()


def test_is_the_models_own_loss_where_nothing_is_added():
    outputs = outputs_of(lively_model(stage_loss_weights=[0.2, 0.3, 0.5]))
    model_config = lively_model(stage_loss_weights=[0.2, 0.3, 0.5]).config
    loss, parts = TrainingLoss(config(), model_config)(outputs, None, LABELS, 0)
    torch.testing.assert_close(loss, outputs.loss)
    assert set(parts) == {"stage_0_loss", "stage_1_loss", "stage_2_loss"}


def test_names_the_loss_of_each_stage():
    model = lively_model(thinking_stages=[2, 4], stage_loss_weights=[0.25, 0.75])
    outputs = outputs_of(model)
    loss, parts = TrainingLoss(config(), model.config)(outputs, None, LABELS, 0)
    torch.testing.assert_close(loss, outputs.loss)
    expected = {
        f"stage_{index}_loss": F.cross_entropy(logits, LABELS).item()
        for index, logits in enumerate(outputs.stage_logits)
    }
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(expected)


def test_mixed_targets_are_probabilities():
    model = lively_model()
    outputs, targets = outputs_of(model), torch.rand(4, 12).softmax(dim=-1)
    loss, _ = TrainingLoss(config(label_smoothing=0.1), model.config)(outputs, None, targets, 0)
    expected = sum(-(targets * logits.log_softmax(-1)).sum(-1).mean() for logits in outputs.stage_logits) / 3
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("stages", [[2, 4], [1, 2, 4]])
def test_in_place_distillation_teaches_earlier_stages_only(stages):
    model = lively_model(thinking_stages=stages)
    outputs = outputs_of(model)
    loss, _ = TrainingLoss(config(inplace_distillation=1.0), model.config)(outputs, None, LABELS, 0)
    *early, last = outputs.stage_logits
    temperature = 3.0
    expected = F.cross_entropy(last, LABELS)
    for logits in early:
        target = (last.detach() / temperature).softmax(-1)
        log_ratio = target.log() - (logits / temperature).log_softmax(-1)
        expected = expected + temperature**2 * (target * log_ratio).sum(-1).mean()
    torch.testing.assert_close(loss, expected / len(stages))
    # The last stage gets no gradient from the distillation of the earlier ones.
    own = torch.autograd.grad(F.cross_entropy(last, LABELS) / len(stages), last, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, last)[0], own)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_every_stage_learns_from_a_teacher(kind):
    model, teacher, images = lively_model(), vit_teacher(), random_images(4)
    outputs = outputs_of(model)
    whole = TrainingLoss(config(distillation=kind, distillation_weight=1.0), model.config, teacher)
    loss, _ = whole(outputs, images, LABELS, 0)
    answer = teacher(images).logits
    if kind == "hard":
        expected = sum(F.cross_entropy(logits, answer.argmax(-1)) for logits in outputs.stage_logits) / 3
    else:
        target = (answer / 3).softmax(-1)
        parts = [(target * (target.log() - (z / 3).log_softmax(-1))).sum(-1).mean() for z in outputs.stage_logits]
        expected = 9 * sum(parts) / 3
    torch.testing.assert_close(loss, expected)


def test_avit_keeps_its_ponder_and_prior_losses():
    model = lively_avit(ponder_loss_weight=0.5)
    outputs = outputs_of(model)
    loss, parts = TrainingLoss(config(label_smoothing=0.1), model.config)(outputs, None, LABELS, 0)
    task = F.cross_entropy(outputs.logits, LABELS, label_smoothing=0.1)
    torch.testing.assert_close(loss, task + 0.5 * outputs.ponder_loss + 1e-3 * outputs.prior_loss)
    assert set(parts) == {"ponder_loss", "prior_loss"}


@pytest.mark.parametrize("targets", [LABELS, torch.eye(12)[LABELS]], ids=["indices", "mixed"])
def test_without_a_teacher_both_heads_learn_from_the_labels(targets):
    model = lively_avit(distilled=True)
    outputs = outputs_of(model)
    loss, _ = TrainingLoss(config(), model.config)(outputs, None, targets, 0)
    heads = F.cross_entropy(outputs.cls_logits, LABELS) + F.cross_entropy(outputs.distillation_logits, LABELS)
    beside = model.config.ponder_loss_weight * outputs.ponder_loss + 1e-3 * outputs.prior_loss
    torch.testing.assert_close(loss, heads / 2 + beside)


def test_the_distillation_head_learns_from_the_teacher():
    model, teacher, images = (
        lively_avit(distilled=True, ponder_loss_weight=0.0, prior_loss_weight=0.0),
        vit_teacher(),
        random_images(4),
    )
    outputs = outputs_of(model)
    loss, _ = TrainingLoss(config(label_smoothing=0.1), model.config, teacher)(outputs, images, LABELS, 0)
    from_labels = F.cross_entropy(outputs.cls_logits, LABELS, label_smoothing=0.1)
    from_teacher = F.cross_entropy(outputs.distillation_logits, teacher(images).logits.argmax(-1))
    torch.testing.assert_close(loss, (from_labels + from_teacher) / 2)


def test_refuses_what_the_model_cannot_do():
    with pytest.raises(ValueError, match="sandwich needs a stage between"):
        TrainingLoss(config(stage_sampling="sandwich"), lively_model(thinking_stages=[2, 4]).config)
    with pytest.raises(ValueError, match="at least two stages"):
        TrainingLoss(config(inplace_distillation=0.5), lively_avit().config)
    with pytest.raises(ValueError, match="cross-entropy are of single-label classification"):
        TrainingLoss(config(), lively_model(problem_type="multi_label_classification").config)


@pytest.mark.parametrize("lively", [lively_model, lively_avit])
def test_asks_the_model_for_what_it_is_computed_from(lively):
    """It asks for stage logits, so the model does not warn of a loss computed outside."""
    model = lively().train()
    logging.warning_once.cache_clear()
    with CaptureLogger(logging.get_logger("hf_thinkingvit.models.module_arguments")) as captured:
        model(random_images(4), **TrainingLoss(config(), model.config).model_arguments(0, 0))
    assert captured.out == ""
