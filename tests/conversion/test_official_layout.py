"""Which folders and files are official checkpoints, whatever else `from_pretrained` is given."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from hf_thinkingvit import ThinkingViTConfig, ThinkingViTForImageClassification
from tests.conversion.test_loading import FOLDER, assert_golden
from tests.utils import FIXTURES


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pth"])
def test_a_configuration_does_not_hide_that_bare_weights_are_official(name, tmp_path):
    """Transformers would take none of them, and draw every weight of the model."""
    config = ThinkingViTForImageClassification.from_pretrained(FOLDER).config
    weights = load_file(FOLDER / "model.safetensors")
    for folder, content in (("flat", weights), ("nested", {"state_dict": weights, "epoch": 3})):
        (tmp_path / folder).mkdir()
        if name.endswith(".safetensors"):
            save_file(weights, tmp_path / folder / name)
        else:
            torch.save(content, tmp_path / folder / name)
        with pytest.raises(ValueError, match="`config` follows from the files"):
            ThinkingViTForImageClassification.from_pretrained(tmp_path / folder, config=config)
        fields = {"thinking_stages": [1, 2, 4], "image_size": 32}
        assert_golden(ThinkingViTForImageClassification.from_pretrained(tmp_path / folder, **fields))


def test_bare_weights_of_another_library_are_refused_as_well(tmp_path):
    ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)).save_pretrained(
        tmp_path
    )
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="plain Transformers model of type 'vit'"):
        ThinkingViTForImageClassification.from_pretrained(tmp_path, config=ThinkingViTConfig())


def test_bare_weights_of_a_plain_timm_model_say_how_to_start_from_it(tmp_path):
    """Its tensors are also those of an A-ViT, which has no others."""
    shutil.copy(FIXTURES / "avit" / "model.safetensors", tmp_path / "model.safetensors")
    for options in ({}, {"config": ThinkingViTConfig()}):
        with pytest.raises(ValueError, match="plain timm ViT or DeiT.*`ThinkingViTForImageClassification.from_vit"):
            ThinkingViTForImageClassification.from_pretrained(tmp_path, **options)


def test_bare_weights_of_this_package_take_a_configuration(tmp_path):
    """In every form in which Transformers saves and loads them."""
    model = ThinkingViTForImageClassification.from_pretrained(FOLDER)
    model.save_pretrained(tmp_path / "split", max_shard_size="100KB")
    model.save_pretrained(tmp_path / "variant", variant="fp16")
    model.thinkingvit.save_pretrained(tmp_path / "without a head")
    (tmp_path / "pickled").mkdir()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    for name, options in (("split", {}), ("variant", {"variant": "fp16"}), ("pickled", {})):
        (tmp_path / name / "config.json").unlink(missing_ok=True)
        assert_golden(
            ThinkingViTForImageClassification.from_pretrained(tmp_path / name, config=model.config, **options)
        )
    (tmp_path / "without a head" / "config.json").unlink()
    loaded, info = ThinkingViTForImageClassification.from_pretrained(
        tmp_path / "without a head", config=model.config, output_loading_info=True
    )
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert torch.equal(loaded.thinkingvit.layernorm.weight, model.thinkingvit.layernorm.weight)


def test_several_checkpoints_in_a_folder_are_not_chosen_between(tmp_path):
    for name in ("epoch-10.pth", "epoch-9.pth"):
        torch.save(load_file(FOLDER / "model.safetensors"), tmp_path / name)
    with pytest.raises(ValueError, match="several checkpoints in .*: epoch-10.pth, epoch-9.pth. Give the file"):
        ThinkingViTForImageClassification.from_pretrained(tmp_path, thinking_stages=[1, 2, 4])
