"""The folder of a segmentation model must work where this package is not installed."""

import json
import subprocess
import sys

import torch
from safetensors.torch import load_file, save_file

from tests.models.segmentation_models import lively_segmenter, spread_threshold
from tests.utils import random_images


SCRIPT = """
import sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_thinkingvit":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSemanticSegmentation

root = Path(sys.argv[1])
pixel_values = load_file(root / "inputs.safetensors")["pixel_values"]
model = AutoModelForSemanticSegmentation.from_pretrained(root / "saved", trust_remote_code=True)
with torch.no_grad():
    outputs = dict(model(pixel_values))
AutoModel.from_pretrained(root / "bare", trust_remote_code=True)
AutoModelForSemanticSegmentation.from_pretrained(root / "bare", trust_remote_code=True)
model.save_pretrained(root / "again")
save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, root / "outputs.safetensors")
"""


def test_the_folder_brings_its_code(tmp_path):
    model, images = lively_segmenter("mask_transformer"), random_images(9, (37, 30))
    model.config.threshold = spread_threshold(model, images)
    model.save_pretrained(tmp_path / "saved")
    model.base_model.save_pretrained(tmp_path / "bare")
    save_file({"pixel_values": images}, tmp_path / "inputs.safetensors")
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], check=True, cwd=tmp_path)
    outputs = load_file(tmp_path / "outputs.safetensors")
    with torch.no_grad():
        expected = model(images)
    assert len(expected.exit_stage.unique()) == 3
    for name in ("logits", "exit_stage", "entropy"):
        torch.testing.assert_close(outputs[name], expected[name])
    for folder in ("saved", "bare", "again"):
        auto_map = json.loads((tmp_path / folder / "config.json").read_text())["auto_map"]
        entry = "modeling_thinkingvit_segmentation.ThinkingViTForSemanticSegmentation"
        assert auto_map["AutoModelForSemanticSegmentation"] == entry
        assert (tmp_path / folder / "modeling_thinkingvit_segmentation.py").is_file()
