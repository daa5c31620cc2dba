import argparse
import json
import pathlib
import runpy
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_thinkingvit import ThinkingViTConfig, ThinkingViTForImageClassification, convert_checkpoint
from hf_thinkingvit.families.thinkingvit import official_name
from tests.conversion.goldens import assert_golden_logits, assert_refused, assert_refused_without
from tests.utils import FIXTURES


GOLDEN = FIXTURES / "thinkingvit_3stage"
STAGES = [1, 2, 4]
golden_state_dict = partial(load_file, GOLDEN / "model.safetensors")
assert_golden = partial(assert_golden_logits, GOLDEN)


def test_hub_layout_to_a_folder_that_transformers_loads(tmp_path):
    converted = convert_checkpoint(GOLDEN, tmp_path, threshold=[0.5, 0.25])
    assert not converted.training
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, ThinkingViTForImageClassification)
    assert loaded.config.thinking_stages == STAGES and loaded.config.threshold == [0.5, 0.25]
    assert_golden(loaded)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert (processor.crop_size["height"], processor.size["shortest_edge"]) == (32, 35)


def test_image_processor_settings_come_from_pretrained_cfg(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] = {"crop_pct": 0.8, "interpolation": "bilinear", "mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}
    config["label_names"] = [f"class {index}" for index in range(20)]
    (folder / "config.json").write_text(json.dumps(config))
    model = convert_checkpoint(folder, tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert (processor.size["shortest_edge"], processor.resample) == (40, 2)
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.1, 0.2, 0.3], [1, 2, 3])
    assert model.config.id2label[7] == "class 7" and model.config.label2id["class 7"] == 7


def test_empty_and_unknown_settings_of_a_config(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] = {"interpolation": "random"}
    (folder / "config.json").write_text(json.dumps(config))
    convert_checkpoint(folder, tmp_path / "a")
    assert AutoImageProcessor.from_pretrained(tmp_path / "a").resample == 3
    config.update(pretrained_cfg=None, model_args=None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="Pass `thinking_stages`"):
        convert_checkpoint(folder, tmp_path / "b")


def test_mixed_precision_keeps_the_wider_one(folder, tmp_path):
    state_dict = golden_state_dict()
    state_dict["cls_token"] = state_dict["cls_token"].half()
    save_file(state_dict, folder / "model.safetensors")
    assert convert_checkpoint(folder, tmp_path / "out").dtype == torch.float32


class TestTrainingCheckpoints:
    @pytest.mark.parametrize("suffix", [".pth", ".pth.tar"])
    def test_prefers_the_averaged_weights(self, suffix, tmp_path):
        zeros = {name: torch.zeros_like(tensor) for name, tensor in golden_state_dict().items()}
        averaged = {f"module.{name}": tensor for name, tensor in golden_state_dict().items()}
        path = tmp_path / f"checkpoint{suffix}"
        arguments = argparse.Namespace(model="thinkingvit", lr=1e-3, opt=None, thinking_stages=STAGES)
        content = {"epoch": 3, "arch": "x", "state_dict": zeros, "state_dict_ema": averaged, "args": arguments}
        torch.save(content, path)
        assert_golden(convert_checkpoint(path, tmp_path / "out"))

    def test_plain_weights_where_there_are_no_averaged_ones(self, tmp_path):
        torch.save({"state_dict": golden_state_dict(), "state_dict_ema": None}, tmp_path / "a.pth")
        assert_golden(convert_checkpoint(tmp_path / "a.pth", tmp_path / "out", thinking_stages=STAGES))

    def test_a_bare_state_dict(self, tmp_path):
        torch.save(golden_state_dict(), tmp_path / "a.pth")
        assert_golden(convert_checkpoint(tmp_path / "a.pth", tmp_path / "out", thinking_stages=STAGES))

    def test_stages_from_the_models_keyword_arguments(self, tmp_path):
        arguments = argparse.Namespace(model_kwargs={"thinking_stages": STAGES})
        torch.save({"state_dict": golden_state_dict(), "args": arguments}, tmp_path / "a.pth")
        assert_golden(convert_checkpoint(tmp_path / "a.pth", tmp_path / "out"))

    def test_a_config_beside_the_file(self, tmp_path):
        torch.save({"state_dict": golden_state_dict()}, tmp_path / "a.pth.tar")
        shutil.copy(GOLDEN / "config.json", tmp_path)
        assert_golden(convert_checkpoint(tmp_path / "a.pth.tar", tmp_path / "out"))

    def test_refuses_to_guess_the_heads(self, tmp_path):
        torch.save(golden_state_dict(), tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"stages of \[16, 32, 64\] channels.*Pass `thinking_stages`"):
            convert_checkpoint(tmp_path / "a.pth", tmp_path / "out")

    def test_never_unpickles_other_objects(self, tmp_path):
        torch.save({"state_dict": golden_state_dict(), "args": pathlib.PurePosixPath("x")}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"holds a `pathlib\.PurePosixPath`.*could run code"):
            convert_checkpoint(tmp_path / "a.pth", tmp_path / "out", thinking_stages=STAGES)
        assert not (tmp_path / "out").exists()


def official_state_dict(stages: list[int]) -> dict[str, torch.Tensor]:
    """A DeiT-sized official state dict (12 layers, heads of 64), on the meta device."""
    with torch.device("meta"):
        model = ThinkingViTForImageClassification(ThinkingViTConfig(thinking_stages=stages, num_labels=1000))
        state_dict = {official_name(name): tensor for name, tensor in model.state_dict().items()}
        for name in state_dict:
            if ".qkv." in name:
                rows, *columns = state_dict[name].shape
                state_dict[name] = torch.empty(3 * rows, *columns)
    return {name: torch.full(tensor.shape, 0.01, dtype=torch.float16) for name, tensor in state_dict.items()}


@pytest.mark.parametrize(
    "layout, stages",
    [("hub", stages) for stages in ([2, 3], [2, 3, 6], [2, 6], [3, 6], [3, 6, 12], [3, 9], [3, 12])]
    + [("bare", stages) for stages in ([3, 3], [2, 3, 6], [3, 3, 3])],
)
def test_official_configurations(stages, layout, tmp_path):
    """The published folders have only `thinking_stages` in their `config.json`; a single file has none."""
    if layout == "hub":
        source = tmp_path / "source"
        source.mkdir()
        save_file(official_state_dict(stages), source / "model.safetensors")
        config = {"architecture": "thinkingvit_deit", "num_classes": 1000, "model_args": {"thinking_stages": stages}}
        config["pretrained_cfg"] = {"input_size": [3, 224, 224], "crop_pct": 0.9, "interpolation": "bicubic"}
        (source / "config.json").write_text(json.dumps(config))
    else:
        source = tmp_path / "source.pth.tar"
        torch.save({"state_dict": official_state_dict(stages)}, source)
    config = convert_checkpoint(source, tmp_path / "out").config
    assert config.thinking_stages == stages
    assert (config.hidden_size, config.head_dim, config.num_hidden_layers) == (64 * max(stages), 64, 12)
    assert (config.image_size, config.patch_size, config.num_labels) == (224, 16, 1000)
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").size["shortest_edge"] == 248


class TestRefusals:
    """Each error names what is wrong, and nothing is written."""

    refuse = staticmethod(assert_refused)

    @pytest.mark.parametrize(
        "missing", ["norm.weight", "blocks.1.attn.qkv.bias", "proj_layer2.weight", "alpha.1", "head.bias"]
    )
    def test_missing_keys(self, missing, folder, tmp_path):
        assert_refused_without(missing, golden_state_dict(), folder, tmp_path)

    def test_a_missing_layer(self, folder, tmp_path):
        state_dict = {name: tensor for name, tensor in golden_state_dict().items() if "blocks.2." not in name}
        save_file(state_dict, folder / "model.safetensors")
        self.refuse(folder, tmp_path, r"Missing keys: .*blocks\.2\.norm1\.weight")

    def test_a_missing_tensor_that_tells_the_size(self, folder, tmp_path):
        state_dict = golden_state_dict()
        del state_dict["patch_embed.proj.weight"]
        save_file(state_dict, folder / "model.safetensors")
        self.refuse(folder, tmp_path, r"Missing keys: patch_embed\.proj\.weight")

    def test_unexpected_keys(self, folder, tmp_path):
        save_file({**golden_state_dict(), "blocks.0.ls1.gamma": torch.zeros(3)}, folder / "model.safetensors")
        self.refuse(folder, tmp_path, r"Missing keys: none. Unexpected keys: blocks\.0\.ls1\.gamma")

    @pytest.mark.parametrize(
        "name, shape",
        [
            ("blocks.0.attn.qkv.weight", (4, 192)),
            ("blocks.0.attn.qkv.bias", ()),
            ("patch_embed.proj.weight", (64, 192)),
            ("pos_embed", (17, 64)),
        ],
    )
    def test_tensors_of_impossible_shapes(self, name, shape, folder, tmp_path):
        save_file({**golden_state_dict(), name: torch.zeros(shape)}, folder / "model.safetensors")
        self.refuse(folder, tmp_path, name)

    def test_misshapen_tensors(self, folder, tmp_path):
        save_file({**golden_state_dict(), "norm.weight": torch.zeros(3)}, folder / "model.safetensors")
        self.refuse(folder, tmp_path, r"norm\.weight .*expected \(64,\), got \(3,\)")

    def test_stages_that_do_not_fit_the_tensors(self, folder, tmp_path):
        self.refuse(folder, tmp_path, r"proj_layer\.weight", thinking_stages=[2, 2, 4])

    def test_an_unrelated_checkpoint(self, tmp_path):
        torch.save({"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(3)}, tmp_path / "a.pth")
        self.refuse(
            tmp_path / "a.pth",
            tmp_path,
            r"none of the known families.*Missing keys.*patch_embed.*Unexpected keys: conv1\.weight",
        )

    @pytest.mark.parametrize("name", ["model.safetensors", "a.pth"])
    def test_a_truncated_file(self, name, folder, tmp_path):
        path = folder / name
        if name == "a.pth":
            torch.save(golden_state_dict(), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        self.refuse(path, tmp_path, name)

    def test_files_that_hold_something_else(self, tmp_path):
        (tmp_path / "a.pth").write_text("not a checkpoint")
        self.refuse(tmp_path / "a.pth", tmp_path, "damaged or no PyTorch checkpoint")
        torch.save([1, 2], tmp_path / "b.pth")
        self.refuse(tmp_path / "b.pth", tmp_path, "must hold a dict")
        torch.save({"epoch": 3}, tmp_path / "c.pth")
        self.refuse(tmp_path / "c.pth", tmp_path, r"no state dict.*\['epoch'\]")

    def test_a_broken_config(self, folder, tmp_path):
        (folder / "config.json").write_text("{")
        self.refuse(folder, tmp_path, "config.json is not valid JSON")

    def test_nothing_there(self, tmp_path):
        (tmp_path / "empty").mkdir()
        self.refuse(tmp_path / "empty", tmp_path, "There is no model in .*empty", error=FileNotFoundError)
        self.refuse("no-such-org/no-such-model", tmp_path, "no file or folder here", error=FileNotFoundError)
        self.refuse(tmp_path / "absent.pth", tmp_path, "no file or folder here", error=FileNotFoundError)

    def test_does_not_write_over_the_source(self, folder):
        before = (folder / "config.json").read_text()
        with pytest.raises(ValueError, match="must be a folder other than the source's"):
            convert_checkpoint(folder, folder)
        assert (folder / "config.json").read_text() == before


def test_command_line(tmp_path, monkeypatch, capsys):
    command = [sys.executable, "-m", "hf_thinkingvit.conversion"]
    arguments = [str(GOLDEN), str(tmp_path / "out"), "--threshold", "0.5", "0.25"]
    process = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("ThinkingViTForImageClassification, 0.17 M parameters")
    model = ThinkingViTForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.threshold == [0.5, 0.25]
    monkeypatch.setattr(sys, "argv", ["conversion", str(tmp_path / "absent"), str(tmp_path / "b")])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("hf_thinkingvit.conversion", run_name="__main__")
    assert "conversion: error: " in capsys.readouterr().err.splitlines()[-1]
