import argparse
import json
import runpy
import shutil
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_thinkingvit import ThinkingSwinConfig, ThinkingSwinForImageClassification, convert_checkpoint
from hf_thinkingvit.families.thinking_swin import official_name
from tests.conversion.goldens import assert_golden_logits, assert_refused, assert_refused_without
from tests.utils import FIXTURES


GOLDEN = FIXTURES / "thinkingswin"
ROUNDS = [[2, 2, 2], [2, 4, 8]]
golden_state_dict = partial(load_file, GOLDEN / "model.safetensors")
assert_golden = partial(assert_golden_logits, GOLDEN)


def test_hub_layout_to_a_folder_that_transformers_loads(tmp_path):
    converted = convert_checkpoint(GOLDEN, tmp_path, threshold=0.5)
    assert not converted.training
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, ThinkingSwinForImageClassification)
    config = loaded.config
    assert (config.head_rounds, config.threshold, config.qkv_slicing) == (ROUNDS, 0.5, "leading_rows")
    assert (config.embed_dim, config.depths, config.num_heads) == (16, [2, 2, 2], [2, 4, 8])
    assert (config.window_size, config.patch_size, config.image_size, config.mlp_ratio) == (4, 4, 64, 4.0)
    assert_golden(loaded)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert (processor.crop_size["height"], processor.size["shortest_edge"]) == (64, 71)


@pytest.mark.parametrize("source", ["namespace", "override", "config"])
@pytest.mark.parametrize("weights", ["state_dict_ema", "state_dict"])
def test_training_checkpoints(source, weights, tmp_path):
    """Averaged weights are preferred; rounds come from the pickled arguments, the caller or a `config.json`."""
    content = {"epoch": 3, "state_dict": {name: 0 * tensor for name, tensor in golden_state_dict().items()}}
    content[weights] = {f"module.{name}": tensor for name, tensor in golden_state_dict().items()}
    overrides = {}
    if source == "namespace":
        content["args"] = argparse.Namespace(lr=1e-3, img_size=64, model_kwargs={"head_rounds": ROUNDS})
    elif source == "override":
        overrides = {"head_rounds": ROUNDS, "image_size": 64}
    else:
        shutil.copy(GOLDEN / "config.json", tmp_path)
    torch.save(content, tmp_path / "a.pth.tar")
    assert_golden(convert_checkpoint(tmp_path / "a.pth.tar", tmp_path / "out", **overrides))


def test_buffers_that_follow_from_the_sizes(folder, tmp_path):
    buffers = {
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.long),
        "layers.0.blocks.1.attn_mask": torch.zeros(16, 16, 16),
    }
    save_file({**golden_state_dict(), **buffers}, folder / "model.safetensors")
    assert_golden(convert_checkpoint(folder, tmp_path / "out"))


def test_the_published_folder(tmp_path):
    """The sizes of Swin-S are read from the tensors; `config.json` is as on the Hub, with little but the rounds."""
    with torch.device("meta"):
        model = ThinkingSwinForImageClassification(ThinkingSwinConfig(num_labels=1000))
    official = {official_name(name): tensor for name, tensor in model.state_dict().items()}
    state_dict = {name: torch.full(tensor.shape, 0.01, dtype=torch.float16) for name, tensor in official.items()}
    state_dict["proj_layer.upsample.weight"] = torch.full((384, 1, 8, 8), 0.01, dtype=torch.float16)
    state_dict["proj_layer.proj.weight"] = torch.full((96, 384, 1, 1), 0.01, dtype=torch.float16)
    source = tmp_path / "source"
    source.mkdir()
    save_file(state_dict, source / "model.safetensors")
    config = {"architecture": "swin_small_patch4_window7_224", "num_classes": 1000}
    config["model_args"] = {"head_rounds": [[3, 3, 6, 12], [3, 6, 12, 24]], "build_token_projector": True}
    config["pretrained_cfg"] = {"input_size": [3, 224, 224], "crop_pct": 0.9, "interpolation": "bicubic"}
    (source / "config.json").write_text(json.dumps(config))
    converted = convert_checkpoint(source, tmp_path / "out").config.to_dict()
    expected = ThinkingSwinConfig(num_labels=1000).to_dict()
    labels = {"id2label", "label2id"}  # ImageNet-1K's
    assert {name for name in expected if converted[name] != expected[name]} <= {"dtype", "architectures", *labels}
    assert converted["id2label"][281] == "tabby, tabby cat" and len(converted["id2label"]) == 1000


class TestRefusals:
    """Each error names what is wrong, and nothing is written."""

    refuse = staticmethod(assert_refused)

    @pytest.mark.parametrize(
        "missing",
        ["norm.weight", "layers.1.blocks.1.attn.qkv.bias", "proj_layer.upsample.weight", "alpha.0", "head.fc.bias"],
    )
    def test_missing_keys(self, missing, folder, tmp_path):
        assert_refused_without(missing, golden_state_dict(), folder, tmp_path)

    def test_unexpected_keys(self, folder, tmp_path):
        save_file({**golden_state_dict(), "layers.0.blocks.0.ls1.gamma": torch.zeros(3)}, folder / "model.safetensors")
        self.refuse(folder, tmp_path, r"Missing keys: none. Unexpected keys: layers\.0\.blocks\.0\.ls1\.gamma")

    def test_a_missing_layer(self, folder, tmp_path):
        state_dict = {name: tensor for name, tensor in golden_state_dict().items() if "layers.1." not in name}
        save_file(state_dict, folder / "model.safetensors")
        self.refuse(folder, tmp_path, r"layers\.1\.blocks\.0")

    @pytest.mark.parametrize(
        "name, shape",
        [
            ("layers.1.blocks.0.attn.qkv.weight", (4, 192)),
            ("proj_layer.upsample.weight", (16, 16)),
            ("proj_layer.proj.weight", (16, 16, 3, 3)),
            ("patch_embed.proj.weight", (16, 48)),
            ("layers.2.blocks.0.attn.relative_position_bias_table", ()),
        ],
    )
    def test_tensors_of_impossible_shapes(self, name, shape, folder, tmp_path):
        save_file({**golden_state_dict(), name: torch.zeros(shape)}, folder / "model.safetensors")
        self.refuse(folder, tmp_path, name)

    def test_rounds_that_do_not_fit_the_tensors(self, folder, tmp_path):
        self.refuse(folder, tmp_path, r"proj_layer\.upsample\.weight", head_rounds=[[1, 1, 1], [2, 4, 8]])
        self.refuse(folder, tmp_path, "`head_rounds` asks for the heads", head_rounds=[[2, 2, 2], [2, 4, 16]])

    def test_nothing_says_what_the_rounds_are(self, tmp_path):
        torch.save(golden_state_dict(), tmp_path / "a.pth")
        self.refuse(tmp_path / "a.pth", tmp_path, r"Pass `head_rounds`.*--head-rounds")


def test_command_line(tmp_path, monkeypatch, capsys):
    torch.save(golden_state_dict(), tmp_path / "a.pth")
    words = ["conversion", str(tmp_path / "a.pth"), str(tmp_path / "out"), "--head-rounds"]
    monkeypatch.setattr(sys, "argv", [*words, "2,2,2", "2,4,8"])
    runpy.run_module("hf_thinkingvit.conversion", run_name="__main__")
    assert capsys.readouterr().out.startswith("ThinkingSwinForImageClassification, 0.15 M parameters")
    assert ThinkingSwinForImageClassification.from_pretrained(tmp_path / "out").config.head_rounds == ROUNDS
    monkeypatch.setattr(sys, "argv", [*words, "2,x"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("hf_thinkingvit.conversion", run_name="__main__")
    assert "--head-rounds" in capsys.readouterr().err
