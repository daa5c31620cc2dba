"""What is no official checkpoint is named, with the call that takes it."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

from hf_thinkingvit.conversion import convert_checkpoint
from tests.utils import lively_model


SIZES = {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 1, "intermediate_size": 48}


def deit(folder):
    DeiTForImageClassification(DeiTConfig(**SIZES, image_size=32, patch_size=16)).save_pretrained(folder)


def swin(folder):
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    SwinForImageClassification(config).save_pretrained(folder)


def resnet(folder):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=2)
    ResNetForImageClassification(config).save_pretrained(folder)


def own(folder):
    lively_model().save_pretrained(folder)


def own_weights(folder):
    own(folder)
    (folder / "config.json").unlink()


def timm_deit(folder):
    pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=32, patch_size=16, embed_dim=12, depth=1, num_heads=3, num_classes=5)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "deit_tiny_patch16_224"}))


def numbers(folder):
    folder.mkdir()
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "make, message",
    [
        (deit, r"plain Transformers model of type 'deit'.*ThinkingViTForImageClassification.from_vit\(\".*source\"\)"),
        (swin, r"plain Transformers model of type 'swin'.*ThinkingSwinForImageClassification.from_swin\("),
        (resnet, "Transformers model of type 'resnet', for which there is no conversion"),
        (own, r"a ThinkingViT of this package already.*from_pretrained\(\".*source\"\)"),
        (own_weights, "weights of a ThinkingViT of this package, without a config.json"),
        (timm_deit, r"is a DeiT and does not state the gate.*plain timm ViT or DeiT, .*from_vit\(\"facebook/deit"),
        (numbers, "none of the known families"),
    ],
)
def test_what_it_is_and_what_takes_it(make, message, tmp_path):
    make(tmp_path / "source")
    with pytest.raises(ValueError, match=message) as refusal:
        convert_checkpoint(tmp_path / "source", tmp_path / "out")
    assert ("Missing keys" in str(refusal.value)) == (make is numbers)
    assert not (tmp_path / "out").exists()
