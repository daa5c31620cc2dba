"""The shipped configurations of the baselines are the presets of their models, and those on CIFAR-10 run."""

import pytest
import torch
import yaml
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hf_thinkingvit import EarlyExitViTConfig, ElasticViTConfig, ElasticViTForImageClassification
from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.training import parse_config, train
from hf_thinkingvit.training.starting_point import build_model
from tests.training.test_config import CONFIGS
from tests.training.tiny_runs import LABELS


BASELINES = [path for path in CONFIGS if path.parent.name == "baselines"]
ON_CIFAR = [path for path in BASELINES if path.stem.endswith("cifar10")]
SIZES = {
    "cifar10": {"num_attention_heads": 6, "hidden_size": 96, "num_hidden_layers": 6, "image_size": 32, "patch_size": 4},
    "imagenet": {"num_attention_heads": 12},
}
LABELS_OF_DATA = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}


def preset(stem: str):
    """The configuration of the model that a baseline's preset gives, of the size of the data."""
    method, data = stem.rsplit("_", 1)
    sizes = SIZES[data]
    if method == "hydravit" and data == "cifar10":
        return ElasticViTConfig.hydravit(heads=[3, 6], **sizes)
    if method == "vit":
        return ElasticViTConfig(**sizes)
    if method.startswith("dynabert"):
        return ElasticViTConfig.dynabert(**sizes, **({"depths": [1.0]} if method == "dynabert_widths" else {}))
    if hasattr(ElasticViTConfig, method):
        return getattr(ElasticViTConfig, method)(**sizes)
    return getattr(EarlyExitViTConfig, method)(**sizes)


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_the_model_is_that_of_the_preset(path):
    given = yaml.safe_load(path.read_text())["model"]
    expected = preset(path.stem)
    written = type(expected)(**{**SIZES[path.stem.rsplit("_", 1)[1]], **given})
    skipped = {"drop_path_rate"}  # of the recipe
    for field, value in expected.to_dict().items():
        if field not in skipped:
            ours = written.to_dict()[field]
            assert ours == (pytest.approx(value, rel=1e-4) if field == "stage_loss_weights" and value else value), field


@pytest.mark.parametrize("path", ON_CIFAR, ids=lambda path: path.stem)
def test_a_step_on_cifar(path, images, tmp_path):
    words = ["--config", str(path), "--output_dir", str(tmp_path / "run"), "--dataset", str(images), "--cpu"]
    words += ["--batch_size", "4", "--max_steps", "1", "--num_workers", "0", "--mixed_precision", "no"]
    config = parse_config(words)
    sizes = SIZES["cifar10"]
    if config.from_vit:
        vit = ViTForImageClassification(ViTConfig(**sizes, intermediate_size=384, **LABELS_OF_DATA))
        vit.save_pretrained(tmp_path / "vit")
        words += ["--from_vit", str(tmp_path / "vit")]
    if config.from_pretrained:
        before = "vit_cifar10" if path.stem == "dynabert_widths_cifar10" else "dynabert_widths_cifar10"
        networks = preset(before).sub_networks
        model = ElasticViTForImageClassification(ElasticViTConfig(**sizes, sub_networks=networks, **LABELS_OF_DATA))
        model.save_pretrained(tmp_path / "start")
        evaluation_image_processor(32).save_pretrained(tmp_path / "start")
        words += ["--from_pretrained", str(tmp_path / "start"), "--teacher", str(tmp_path / "start")]
    assert train(parse_config(words))["step"] == 1
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "last")
    assert model.config.model_type == config.model_type and model.config.num_labels == 3


@pytest.mark.parametrize("path", [path for path in BASELINES if path not in ON_CIFAR], ids=lambda path: path.stem)
def test_full_size_models_are_built(path):
    config = parse_config(["--config", str(path)])
    if config.from_pretrained or config.from_vit:
        pytest.skip("starts from saved weights")
    with torch.device("meta"):  # without memory
        assert build_model(config, dict(enumerate(LABELS))).config.num_labels == 3
