"""Shipped configurations of the baselines: each is a published preset and takes a step; DynaBERT's two phases."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForImageClassification

from hf_thinkingvit import ElasticViTForImageClassification
from hf_thinkingvit.families import FAMILIES
from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.training import parse_config, train
from hf_thinkingvit.training.distillation import Teacher
from hf_thinkingvit.training.losses import TrainingLoss
from tests.models.test_weights_from_vit import trained_vit
from tests.training.tiny_runs import flags


CONFIGS = sorted((Path(__file__).parents[2] / "examples" / "configs" / "baselines").glob("*.yaml"))
CIFAR = {"num_attention_heads": 6, "hidden_size": 96, "num_hidden_layers": 6, "image_size": 32, "patch_size": 4}
ARGUMENTS = {"dynabert_widths": {"depths": [1.0]}, "hydravit_cifar10": {"heads": [3, 6]}}
# What the presets leave to the user, and what says how to train.
FREE = ("drop_path_rate", "label_smoothing")
# Their smallest size, of the same shape.
TINY = {"image_size": 32, "patch_size": 16, "num_labels": 3}


def published(path: Path, **overrides):
    """The preset's configuration, of the size that the file or its starting point has."""
    method, _, data = path.stem.rpartition("_")
    family = FAMILIES[yaml.safe_load(path.read_text())["model_type"]]
    name = method.partition("_widths")[0].partition("_depths")[0]
    make = getattr(family.config_class, name, family.config_class)  # a plain ViT has no preset
    heads = 12 if family.model_type == "elastic_vit" else 3
    sizes = CIFAR if data == "cifar10" else {"num_attention_heads": heads}
    arguments = ARGUMENTS.get(method) or ARGUMENTS.get(path.stem) or {}
    return make(**{**sizes, **arguments, **overrides})


def test_every_method_has_one_of_each_size():
    methods = {method for method, _, _ in (path.stem.rpartition("_") for path in CONFIGS)}
    expected = {"hydravit", "matformer", "sortednet", "dynabert_widths", "dynabert_depths"}
    expected |= {"branchynet", "vit_ee", "fastbert", "pabee", "act", "pondernet"}
    assert methods == expected | {"vit"}
    assert {path.stem for path in CONFIGS} == {"vit_cifar10"} | {
        f"{method}_{data}" for method in expected for data in ("cifar10", "imagenet")
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_is_the_preset_and_takes_a_step(path):
    run, preset = parse_config(["--config", str(path)]), published(path)
    family = FAMILIES[run.model_type]
    sizes = {name: getattr(preset, name) for name in CIFAR} if run.from_vit or run.from_pretrained else {}
    config = family.config_class(**{**sizes, **run.model})
    found, expected = config.to_dict(), preset.to_dict()
    if config.model_type == "early_exit_vit":
        assert found.pop("stage_loss_weights") == pytest.approx(expected.pop("stage_loss_weights"), abs=1e-6)
    for name in FREE:
        del found[name], expected[name]
    assert found == expected

    torch.manual_seed(0)
    heads = preset.num_attention_heads
    tiny = published(path, hidden_size=4 * heads, num_hidden_layers=4, intermediate_size=8 * heads, **TINY)
    model = family.classifier(tiny).train()
    for pattern in run.freeze:
        kept = [each for name, each in model.named_parameters() if name.startswith(pattern.removesuffix("*"))]
        assert kept
        for parameter in kept:
            parameter.requires_grad_(False)
    teacher = Teacher(family.classifier(tiny)) if run.teacher else None
    loss = TrainingLoss(run, tiny, teacher)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    total, parts = loss(model(images, labels, **loss.model_arguments(0, 0)), images, labels, 0)
    total.backward()
    assert total.isfinite() and parts is not None
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_dynabert_from_a_plain_vit_through_both_phases(images, tmp_path):
    """The start is rewired; the first phase trains widths, the second starts from it with widths and depths."""
    names = {0: "cat", 1: "dog", 2: "owl"}
    labels = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    vit = trained_vit(image_size=16, num_attention_heads=4, num_hidden_layers=2, **labels)
    rewired = ElasticViTForImageClassification.from_vit(
        vit, "dynabert", "importance", torch.rand(6, 3, 16, 16), torch.arange(6) % 3, depths=[1.0]
    )
    start = tmp_path / "rewired"
    rewired.save_pretrained(start)
    evaluation_image_processor(16).save_pretrained(start)
    for phase, source, depths in (("widths", "whole", [1.0]), ("depths", "same_width", [0.5, 1.0])):
        sizes = {name: getattr(vit.config, name) for name in CIFAR} | {
            "intermediate_size": vit.config.intermediate_size
        }
        networks = FAMILIES["elastic_vit"].config_class.dynabert(depths=depths, **sizes).sub_networks
        file = tmp_path / f"{phase}.yaml"
        file.write_text(
            yaml.safe_dump(
                {
                    "model_type": "elastic_vit",
                    "from_pretrained": str(start),
                    "teacher": str(start),
                    "distillation": "hidden_states",
                    "teacher_sub_network": source,
                    "model": {"sub_networks": networks},
                }
            )
        )
        words = flags(images, tmp_path / phase, max_steps=2, gradient_accumulation_steps=2)
        for word in [word for word in words if word.startswith("--model.")]:
            at = words.index(word)
            del words[at : at + 2]
        train(parse_config(["--config", str(file), *words]))
        start = tmp_path / phase / "last"
        model = AutoModelForImageClassification.from_pretrained(start)
        assert model.config.sub_networks == networks
        assert not torch.equal(model.elastic_vit.layers[0].mlp.fc1.weight, rewired.elastic_vit.layers[0].mlp.fc1.weight)
