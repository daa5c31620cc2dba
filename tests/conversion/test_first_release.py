"""Checkpoints of the first release: supernets of 12 heads, whatever stages were trained."""

import argparse
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_thinkingvit import ThinkingViTConfig, ThinkingViTForImageClassification, convert_checkpoint
from hf_thinkingvit.families.thinkingvit import official_name
from tests.utils import FIXTURES


GOLDEN = FIXTURES / "thinkingvit_first_release"
SCHEDULES = ([2, 3], [2, 3, 6], [2, 6], [3, 6], [3, 6, 12], [3, 9], [3, 12])


def golden_content() -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(GOLDEN / "checkpoint.pth.tar", weights_only=True)


@torch.no_grad()
def assert_golden(model) -> None:
    expected = load_file(GOLDEN / "expected.safetensors")
    thresholds = [name.split(".", 1)[1].removesuffix(".stage") for name in expected if name.endswith(".stage")]
    assert len(thresholds) == 5
    for threshold in thresholds:
        outputs = model(expected["pixel_values"], threshold=float(threshold))
        torch.testing.assert_close(outputs.logits, expected[f"threshold.{threshold}.logits"], atol=1e-4, rtol=0)
        assert torch.equal(outputs.exit_stage, expected[f"threshold.{threshold}.stage"])
    stage_logits = model(expected["pixel_values"], output_stage_logits=True).stage_logits
    for stage, logits in enumerate(stage_logits):
        torch.testing.assert_close(logits, expected[f"stage{stage}.logits"], atol=1e-4, rtol=0)


def write_source(folder, content: dict, stages=None):
    """A checkpoint with the golden `config.json` (for sizes that the tensors do not determine), without its stages."""
    folder.mkdir()
    config = json.loads((GOLDEN / "config.json").read_text())
    del config["model_args"]["thinking_stages"]
    (folder / "config.json").write_text(json.dumps(config))
    args = argparse.Namespace(model="deit_base_patch16_224", **({} if stages is None else {"thinking_stages": stages}))
    torch.save({**content, "args": args}, folder / "checkpoint.pth.tar")
    return folder / "checkpoint.pth.tar"


def test_command_line_gives_the_official_numbers(tmp_path):
    """The averaged weights, cut to six heads."""
    command = [sys.executable, "-m", "hf_thinkingvit.conversion", str(GOLDEN / "checkpoint.pth.tar"), str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("ThinkingViTForImageClassification, 0.10 M parameters")
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    config = model.config
    assert (config.thinking_stages, config.hidden_size, config.intermediate_size) == ([3, 6], 48, 192)
    assert_golden(model)


@pytest.mark.parametrize("stages", [["3", "6"], "['3', '6']", '("3", "6")', "3 6", (3.0, 6.0)], ids=str)
def test_stages_as_training_scripts_pickle_them(stages, tmp_path):
    source = write_source(tmp_path / "source", golden_content(), stages)
    assert_golden(convert_checkpoint(source, tmp_path / "out"))


def test_stages_from_the_caller_win(tmp_path):
    source = write_source(tmp_path / "source", golden_content(), [3, 12])
    assert_golden(convert_checkpoint(source, tmp_path / "out", thinking_stages=[3, 6]))


def test_names_with_a_wrappers_prefix(tmp_path):
    content = golden_content()
    content["state_dict_ema"] = {f"module.{name}": tensor for name, tensor in content["state_dict_ema"].items()}
    assert_golden(convert_checkpoint(write_source(tmp_path / "source", content, [3, 6]), tmp_path / "out"))


def supernet(stages: list[int], num_layers: int) -> dict[str, torch.Tensor]:
    """A supernet's state dict of published size, 12 heads of 64 channels; each tensor is one number, expanded."""
    with torch.device("meta"):
        config = ThinkingViTConfig(
            thinking_stages=stages, num_attention_heads=12, num_hidden_layers=num_layers, num_labels=1000
        )
        model = ThinkingViTForImageClassification(config)
    shapes = {official_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, (rows, *columns) in shapes.items():
        if ".qkv." in name:
            shapes[name] = (3 * rows, *columns)
    shapes.update({f"alpha.{index}": (1,) for index in range(12)})
    return {name: torch.full((), 0.01, dtype=torch.float16).expand(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("stages", SCHEDULES, ids=str)
def test_published_schedules(stages, tmp_path):
    """A single file: all sizes come from its tensors, the stages from the pickled arguments."""
    args = argparse.Namespace(
        model="deit_base_patch16_224", img_size=None, thinking_stages=[str(heads) for heads in stages]
    )
    source = tmp_path / "checkpoint.pth.tar"
    torch.save({"arch": args.model, "state_dict": supernet(stages, num_layers=2), "args": args}, source)
    config = convert_checkpoint(source, tmp_path / "out").config
    assert config.thinking_stages == stages
    assert (config.hidden_size, config.head_dim, config.intermediate_size) == (64 * max(stages), 64, 256 * max(stages))
    assert (config.num_hidden_layers, config.image_size, config.patch_size, config.num_labels) == (2, 224, 16, 1000)


def test_three_to_six_has_22_million_parameters(tmp_path):
    source = tmp_path / "checkpoint.pth.tar"
    torch.save({"state_dict": supernet([3, 6], num_layers=12)}, source)
    model = convert_checkpoint(source, tmp_path / "out", thinking_stages=[3, 6])
    assert round(model.num_parameters() / 1e6, 1) == 22.1


class TestRefusals:
    """Each error names what is wrong, and nothing is written."""

    def refuse(self, tmp_path, match, changes=(), stages=(3, 6), missing=()):
        content = golden_content()
        content["state_dict_ema"].update(dict(changes))
        for name in missing:
            del content["state_dict_ema"][name]
        source = write_source(tmp_path / "source", content, stages and list(stages))
        with pytest.raises(ValueError, match=match):
            convert_checkpoint(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", ["alpha.12", "proj_layer2.weight", "blocks.0.ls1.gamma"])
    def test_other_unexpected_keys(self, name, tmp_path):
        self.refuse(tmp_path, rf"Missing keys: none\. Unexpected keys: {name}\.", {name: torch.zeros(96, 48)})

    @pytest.mark.parametrize("name", ["alpha.0", "proj_layer.bias", "blocks.2.mlp.fc1.weight"])
    def test_missing_keys(self, name, tmp_path):
        self.refuse(tmp_path, rf"Missing keys: {name}\. Unexpected keys: none", missing=[name])

    @pytest.mark.parametrize("stages", [[3, 6], [3, 12], None], ids=str)
    def test_a_missing_last_alpha(self, stages, tmp_path):
        """The number of α identifies the first release: later ones have fewer."""
        self.refuse(tmp_path, r"supernet of 12 heads, .* it lacks alpha\.11\.", stages=stages, missing=["alpha.11"])

    def test_more_heads_than_there_are(self, tmp_path):
        self.refuse(tmp_path, r"asks for 16 heads, but the supernet has 12", stages=[3, 16])

    def test_stages_that_nobody_states(self, tmp_path):
        """The tensors have the same width for every schedule: guessing would give 3 → 12."""
        self.refuse(tmp_path, r"supernet of 12 heads.*Pass `thinking_stages`", stages=None)

    @pytest.mark.parametrize("stages", ["three, six", [3, None], [3, 6.5], [0, 6]], ids=str)
    def test_stages_that_are_no_heads(self, stages, tmp_path):
        content = golden_content()
        source = write_source(tmp_path / "source", content, stages)
        with pytest.raises(ValueError, match=r"must be the heads of each stage, such as \[3, 6\]"):
            convert_checkpoint(source, tmp_path / "out")

    def test_a_projection_of_another_stage(self, tmp_path):
        self.refuse(tmp_path, r"proj_layer\.weight .*expected \(48, 16\), got \(48, 24\)", stages=[2, 6])

    @pytest.mark.parametrize(
        "name, shape", [("blocks.0.attn.qkv.weight", (100, 96)), ("norm.weight", ()), ("pos_embed", (1, 17, 95))]
    )
    def test_tensors_of_impossible_shapes(self, name, shape, tmp_path):
        self.refuse(tmp_path, name.replace(".", r"\."), {name: torch.zeros(shape)})


def test_later_releases_may_not_hold_further_alphas(tmp_path):
    """Only the first release has an α for each head."""
    folder = shutil.copytree(FIXTURES / "thinkingvit_3stage", tmp_path / "source")
    state_dict = load_file(folder / "model.safetensors")
    torch.save({**state_dict, "alpha.2": torch.zeros(1)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"Unexpected keys: alpha\.2"):
        convert_checkpoint(folder, tmp_path / "out")
