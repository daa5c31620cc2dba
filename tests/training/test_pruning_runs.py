"""Runs that train token pruning: their loss, and their start from a model that prunes nothing."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from hf_thinkingvit import ThinkingViTForImageClassification
from hf_thinkingvit.training import TrainingConfig, parse_config, train
from hf_thinkingvit.training.distillation import Teacher, token_distance
from hf_thinkingvit.training.losses import TrainingLoss
from hf_thinkingvit.training.recipe import build_optimizer, build_schedule
from hf_thinkingvit.training.starting_point import build_model
from tests.training.test_starting_point import LABELS, named
from tests.training.tiny_runs import flags
from tests.utils import lively_model, random_images


PRUNING = {"pruning_layers": [1], "pruning_keep_rate": 0.5}
CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


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


class TestTokenDistillation:
    def loss(self, model, teacher=None, **fields):
        teacher = Teacher(teacher) if teacher is not None else None
        return TrainingLoss(TrainingConfig(distillation="tokens", label_smoothing=0.0, **fields), model.config, teacher)

    def test_from_the_same_model_without_pruning(self):
        """The real teacher; what it says of its own answer and tokens is 0."""
        teacher, model = lively_model(), lively_model(**PRUNING).train()
        images, labels = random_images(4), torch.tensor([3, 0, 11, 5])
        outputs = model(images, labels)
        total, parts = self.loss(model, teacher, distillation_weight=0.25)(outputs, images, labels, 0)
        with torch.no_grad():
            expected, tokens = teacher(images), teacher.thinkingvit(images).last_hidden_state
        divergence = F.kl_div(
            outputs.logits.log_softmax(-1), expected.logits.log_softmax(-1), reduction="batchmean", log_target=True
        )
        torch.testing.assert_close(parts["answer_distillation"], divergence)
        kept = outputs.keep_decisions[-1].round().bool()
        distance = (outputs.patch_tokens - tokens[:, 1:])[kept].square().mean()
        torch.testing.assert_close(parts["token_distillation"], distance)
        answers = sum(F.cross_entropy(logits, labels) / 3 for logits in outputs.stage_logits)
        torch.testing.assert_close(total, answers + 2.0 * outputs.ratio_loss + 0.25 * (divergence + distance))

    def test_where_no_token_is_kept(self):
        tokens = torch.randn(2, 3, 4, requires_grad=True)
        distance = token_distance(tokens, torch.zeros(2, 3, 4), torch.zeros(2, 3))
        distance.backward()
        assert distance == 0 and not tokens.grad.any()

    def test_what_does_not_fit(self):
        model = lively_model(**PRUNING)
        with pytest.raises(ValueError, match="needs a `teacher`"):
            self.loss(model)
        with pytest.raises(ValueError, match="teacher's `stages`"):
            self.loss(model, lively_model(thinking_stages=[2, 4]))
        with pytest.raises(ValueError, match="teacher's `patch_grid`"):
            self.loss(model, lively_model(patch_size=16))
        with pytest.raises(ValueError, match="prunes no tokens"):
            self.loss(model, model)
        with pytest.raises(ValueError, match="is of models with `pruning_layers`"):
            self.loss(lively_model(), lively_model())


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


def learning_rates(model, config, step: int) -> dict[str, float]:
    """Of each parameter, at a step of epochs of 10 steps."""
    optimizer = build_optimizer(config, model)
    build_schedule(config, optimizer, steps_per_epoch=10).step_update(step)
    by_parameter = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
    return {name: by_parameter[id(parameter)] for name, parameter in model.named_parameters()}


def test_the_backbone_learns_later_and_slower():
    """DynamicViT: not in the first 5 epochs, then with a hundredth of the predictors' rate. Decay as without."""
    model = lively_model(**PRUNING)
    config = TrainingConfig(backbone_learning_rate=0.01, frozen_backbone_epochs=5.0)
    usual = {step: set(learning_rates(model, TrainingConfig(), step).values()) for step in (0, 49, 50, 1500)}
    for step, (rate,) in usual.items():
        for name, found in learning_rates(model, config, step).items():
            factor = 1.0 if "score_predictors" in name else 0.0 if step < 50 else 0.01
            assert found == pytest.approx(factor * rate), name
    plain, split = (build_optimizer(each, model).param_groups for each in (TrainingConfig(), config))
    decays = [{id(p): group["weight_decay"] for group in groups for p in group["params"]} for groups in (plain, split)]
    assert decays[0] == decays[1]


def test_a_slower_backbone_keeps_its_layer_decay():
    """Both factors count; the predictors have neither."""
    model = lively_model(**PRUNING)
    both, decayed = TrainingConfig(backbone_learning_rate=0.01, layer_decay=0.5), TrainingConfig(layer_decay=0.5)
    expected = learning_rates(model, decayed, 1500)
    assert len(set(expected.values())) > 3
    for name, found in learning_rates(model, both, 1500).items():
        assert found == pytest.approx(expected[name] * (1.0 if "score_predictors" in name else 0.01)), name


@pytest.mark.parametrize("fields", [{"backbone_learning_rate": 0.1}, {"frozen_backbone_epochs": 1.0}], ids=str)
def test_rates_of_a_backbone_need_predictors(fields):
    with pytest.raises(ValueError, match=r"are of models with `model.pruning_layers`"):
        build_optimizer(TrainingConfig(**fields), lively_model())


@pytest.mark.parametrize("name, rate", [("dynamicvit_small", 0.7), ("thinkingvit_3_6_dynamicvit", 0.8)])
def test_the_shipped_recipe_is_dynamicvits(name, rate, tmp_path):
    """Also where it starts from a model that was trained with stochastic depth, which DynamicViT's recipe has not."""
    config = parse_config(["--config", str(CONFIGS / f"{name}_imagenet.yaml")])
    assert (config.epochs, config.batch_size, config.scaled_learning_rate) == (30, 1024, 1e-3)
    assert (config.backbone_learning_rate, config.frozen_backbone_epochs, config.distillation_weight) == (0.01, 5, 0.5)
    assert (config.model["pruning_keep_rate"], config.model["pruning_ratio_loss_weight"]) == (rate, 2.0)
    lively_model(drop_path_rate=0.1, **named(*LABELS.values())).save_pretrained(tmp_path)
    fields = {name: value for name, value in config.model.items() if name != "pruning_layers"}
    model, _ = start(tmp_path, **{**fields, "pruning_layers": [1], "threshold": 0.5})
    assert model.config.drop_path_rate == 0 and "cls_token" in "".join(config.freeze)


def test_a_run_with_a_frozen_backbone_goes_on(images, tmp_path):
    """Interrupted and resumed, it is the run without interruption."""
    fields = {
        "model.pruning_layers": "[1]",
        "backbone_learning_rate": 0.1,
        "frozen_backbone_epochs": 1,
        "save_steps": 1,
    }
    train(parse_config(flags(images, tmp_path / "whole", max_steps=5, **fields)))
    train(parse_config(flags(images, tmp_path / "parts", max_steps=2, **fields)))
    train(parse_config(flags(images, tmp_path / "parts", max_steps=5, resume="auto", **fields)))
    whole, parts = (
        ThinkingViTForImageClassification.from_pretrained(tmp_path / name / "last").state_dict()
        for name in ("whole", "parts")
    )
    for name, expected in whole.items():
        assert torch.equal(parts[name], expected), name


def test_a_run(images, tmp_path):
    fields = {"model.pruning_layers": "[1]", "model.pruning_keep_rate": 0.5}
    train(parse_config(flags(images, tmp_path, max_steps=2, **fields)))
    model = ThinkingViTForImageClassification.from_pretrained(tmp_path / "last")
    assert model.config.pruning_layers == [1] and len(model.thinkingvit.score_predictors) == 1


def test_a_run_from_the_model_that_teaches_it(images, tmp_path):
    """As the shipped configurations train."""
    train(parse_config(flags(images, tmp_path / "plain", max_steps=1)))
    plain = tmp_path / "plain" / "last"
    fields = {"from_pretrained": plain, "teacher": plain, "distillation": "tokens", "frozen_backbone_epochs": 9}
    train(parse_config(flags(images, tmp_path / "pruned", max_steps=2, **{"model.pruning_layers": "[1]"}, **fields)))
    source, model = (
        ThinkingViTForImageClassification.from_pretrained(folder).state_dict()
        for folder in (plain, tmp_path / "pruned" / "last")
    )
    for name, tensor in model.items():  # the backbone is frozen to the end
        assert name not in source or torch.equal(tensor, source[name]), name
    assert model.keys() - source.keys()
