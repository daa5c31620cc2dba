"""Runs that train token pruning: their loss, and their start from a model that prunes nothing."""

import pytest
import torch
from torch.nn import functional as F

from hf_thinkingvit import ThinkingViTForImageClassification
from hf_thinkingvit.training import TrainingConfig, parse_config, train
from hf_thinkingvit.training.losses import TrainingLoss
from hf_thinkingvit.training.starting_point import build_model
from tests.training.test_starting_point import LABELS, named
from tests.training.tiny_runs import flags
from tests.utils import lively_model, random_images


PRUNING = {"pruning_layers": [1], "pruning_keep_rate": 0.5}


def start(source, **model):
    said: list[str] = []
    config = TrainingConfig(mixup=0.0, cutmix=0.0, from_pretrained=str(source), model=model)
    config.check()
    return build_model(config, LABELS, said.append), "\n".join(said)


@pytest.mark.parametrize("with_labels", [True, False], ids=["labels", "mixup"])
def test_the_ratio_loss_is_added_and_logged(with_labels):
    """With mixup, the model is called without labels."""
    model = lively_model(pruning_ratio_loss_weight=3.0, **PRUNING).train()
    loss, labels = TrainingLoss(TrainingConfig(label_smoothing=0.0), model.config), torch.tensor([3, 0, 11, 5])
    arguments = loss.model_arguments(0, 0) | ({"labels": labels} if with_labels else {})
    outputs = model(random_images(4), **arguments)
    total, parts = loss(outputs, None, labels, 0)
    answers = sum(F.cross_entropy(logits, labels) / 3 for logits in outputs.stage_logits)
    torch.testing.assert_close(total, answers + 3.0 * outputs.ratio_loss)
    assert parts["ratio_loss"] == outputs.ratio_loss and not parts["ratio_loss"].requires_grad


def test_starts_from_a_model_that_prunes_nothing(tmp_path):
    """All of its weights stay; the predictors are new, and with a keep rate of 1 it answers alike."""
    source = lively_model(**named(*LABELS.values()))
    source.save_pretrained(tmp_path)
    model, said = start(tmp_path, **PRUNING)
    assert "`pruning_layers` None → [1]" in said and "`pruning_keep_rate` None → 0.5" in said
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    weight = model.thinkingvit.score_predictors[0].in_proj.weight
    assert weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.2)
    with torch.no_grad():
        images = random_images()
        torch.testing.assert_close(model.eval()(images, keep_rate=1.0).logits, source(images).logits)


def test_trained_predictors_are_not_replaced(tmp_path):
    lively_model(**named(*LABELS.values()), **PRUNING).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`model.pruning_layers` is"):
        start(tmp_path, pruning_layers=[1, 2])
    model, said = start(tmp_path, pruning_keep_rate=0.75)
    assert model.config.pruning_keep_rate == 0.75 and "`pruning_keep_rate` 0.5 → 0.75" in said


def test_a_run(images, tmp_path):
    fields = {"model.pruning_layers": "[1]", "model.pruning_keep_rate": 0.5}
    train(parse_config(flags(images, tmp_path, max_steps=2, **fields)))
    model = ThinkingViTForImageClassification.from_pretrained(tmp_path / "last")
    assert model.config.pruning_layers == [1] and len(model.thinkingvit.score_predictors) == 1
