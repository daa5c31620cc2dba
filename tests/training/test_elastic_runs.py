"""Runs that train an elastic ViT: everything random at once, of sub-networks that the configuration lists."""

import pytest
import torch
import yaml
from transformers import AutoModelForImageClassification

from hf_thinkingvit import ElasticViTConfig
from hf_thinkingvit.training import parse_config, train
from tests.training.tiny_runs import LIVELY, flags


@pytest.mark.parametrize("method, sampling", [("matformer", "all"), ("dynabert", "one"), ("hydravit", "accumulate")])
def test_sub_networks_of_a_configuration_file(images, tmp_path, method, sampling):
    sizes = {"num_attention_heads": 4, "hidden_size": 16, "num_hidden_layers": 4, "image_size": 16, "patch_size": 8}
    networks = getattr(ElasticViTConfig, method)(**sizes).sub_networks
    file = tmp_path / "elastic.yaml"
    file.write_text(yaml.safe_dump({"model_type": "elastic_vit", "model": {**sizes, "sub_networks": networks}}))
    words = flags(images, tmp_path / "run", max_steps=3, stage_sampling=sampling, **LIVELY)
    given = [word for word in words if word.startswith("--model.") and word != "--model.drop_path_rate"]
    for word in given:
        at = words.index(word)
        del words[at : at + 2]
    train(parse_config(["--config", str(file), *words]))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "last").eval()
    assert model.config.sub_networks == networks and model.config.num_labels == 3
    with torch.no_grad():
        answers = [model(torch.rand(2, 3, 16, 16), sub_network=number).logits for number in range(len(networks))]
    assert all(logits.shape == (2, 3) and logits.isfinite().all() for logits in answers)
