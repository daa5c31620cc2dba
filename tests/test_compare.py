"""The methods of `benchmarks.compare`: a step of each trains, as its shipped configuration says."""

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig


pytest.importorskip("timm")

from benchmarks.compare_methods import COMMON, DATA, METHODS, Sizes, model_config, shipped_config, with_starts
from benchmarks.compare_runs import Job, count_training_macs, run_config
from hf_thinkingvit import ElasticViTConfig, ElasticViTForImageClassification
from hf_thinkingvit.training import TrainingConfig
from hf_thinkingvit.training.losses import TrainingLoss
from tests.compare_jobs import SIZES, build, job


class Drawn:
    """What the counting of multiply-accumulates reads of a run, whose steps compute the sub-networks that are given."""

    def __init__(self, draws, attn_implementation="eager"):
        config = ElasticViTConfig.hydravit(heads=[1, 4], num_attention_heads=4, hidden_size=16, **DRAWN_SIZES)
        self.model = ElasticViTForImageClassification(config)
        self.model.set_attn_implementation(attn_implementation)
        self.draws, self.num_steps, self.model_config = draws, len(draws), config
        self.config = SimpleNamespace(gradient_accumulation_steps=1)
        self.accelerator = SimpleNamespace(device=torch.device("cpu"), unwrap_model=lambda model, **options: model)
        self.optimizer = torch.optim.SGD(self.model.parameters())
        self.loss = self

    def model_arguments(self, step, micro_batch):
        return {"sub_network": [self.draws[step]]}

    def __call__(self, outputs, pixel_values, targets, step, micro_batch):
        return outputs.loss, {}


DRAWN_SIZES = {"num_hidden_layers": 2, "image_size": 16, "patch_size": 4}


def test_training_macs_have_attention_and_are_of_the_draws():
    assert count_training_macs(Drawn([1], "sdpa")) == count_training_macs(Drawn([1], "eager"))
    narrow, wide = (count_training_macs(Drawn([index])) for index in (0, 1))
    assert narrow < wide
    assert count_training_macs(Drawn([0, 0, 1])) == pytest.approx((2 * narrow + wide) / 3)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_each_method_trains(name):
    method = METHODS[name]
    config = run_config(job(name), None if method.start is None else Path("start"))
    config.check()
    model, teacher = build(name).train(), None
    if method.teacher:
        teacher = build(name if method.start_as == "rewired" else method.start).eval()
    loss_of = TrainingLoss(config, model.config, teacher)
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    outputs = model(images, labels=labels, **loss_of.model_arguments(0, 0))
    loss, _ = loss_of(outputs, images, labels, 0)
    loss.backward()
    assert loss.isfinite()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


# What a comparison gives every method: where it starts, where it goes, and how long it takes.
OF_A_COMPARISON = ("output_dir", "resume", "seed", "eval_epochs", "max_eval_samples")
OF_A_START = ("from_vit", "from_pretrained", "teacher", "epochs", "warmup_epochs", "frozen_backbone_epochs")


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.settings])
def test_methods_are_as_in_their_shipped_configurations(name):
    method = METHODS[name]
    base = shipped_config(COMMON[0])
    ours = run_config(Job(name, 0, base, Path("nowhere"), 12), Path("start") if method.start else None)
    shipped = shipped_config(method.settings[0])
    skipped = [*OF_A_COMPARISON, *(OF_A_START if method.start else ()), "model"]
    if name == "dynamicvit":  # it prunes a plain net, and that file the last stage of a ThinkingViT
        skipped += ["image_mean", "image_std", "crop_pct"]
    for field in fields(TrainingConfig):
        if field.name not in skipped:
            assert getattr(ours, field.name) == getattr(shipped, field.name), field.name
    assert ours.frozen_backbone_epochs / ours.epochs == shipped.frozen_backbone_epochs / shipped.epochs
    made = AutoConfig.for_model(ours.model_type, **ours.model)
    expected = AutoConfig.for_model(ours.model_type, **{**Sizes.of(base.model).full, **shipped.model})
    for field in shipped.model:
        value, other = getattr(made, field), getattr(expected, field)
        assert value == (pytest.approx(other, abs=1e-6) if field == "stage_loss_weights" else other), field


def test_flags_are_common_to_methods_whose_configuration_says_nothing_else():
    base = replace(shipped_config(COMMON[0]), clip_grad=3.0, gradient_accumulation_steps=2)
    found = {
        name: run_config(Job(name, 0, base, Path("nowhere"), 12)) for name in ("hydravit", "matformer", "sortednet")
    }
    assert [config.clip_grad for config in found.values()] == [3.0, 0.25, 3.0]
    assert [config.gradient_accumulation_steps for config in found.values()] == [2, 2, 4]


@pytest.mark.parametrize("data", DATA)
def test_all_methods_have_settings_for_the_data(data):
    for name, method in METHODS.items():
        base = shipped_config(COMMON[DATA.index(data)])
        start = Path("start") if method.start else None
        run_config(Job(name, 0, base, Path("nowhere"), 12, data=data), start).check()


def test_every_operating_point_is_of_the_model():
    for name, method in METHODS.items():
        config = model_config(name, SIZES, num_labels=3)
        for point in method.points(config) if method.points else ():
            type(config).from_dict({**config.to_dict(), **point})


def test_fine_tuned_methods_have_their_share_of_the_epochs_and_come_after_their_start():
    assert with_starts(["dynabert"]) == ["plain_wide", "dynabert_widths", "dynabert"]
    assert run_config(job("plain_wide")).epochs == 6
    assert run_config(job("avit"), Path("start")).epochs == 3
    assert run_config(job("dynabert"), Path("start")).epochs == 2
    assert run_config(job("dynabert"), Path("start")).teacher == "start"
