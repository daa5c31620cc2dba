"""The saved folder must work where this package is not installed."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_thinkingvit import ThinkingViTForImageClassification
from hf_thinkingvit.image_processing import evaluation_image_processor
from tests.utils import lively_model, middle_threshold, random_images


SCRIPT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_thinkingvit":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
try:
    import hf_thinkingvit
except ModuleNotFoundError:
    pass
else:
    sys.exit("the package is importable")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification, pipeline

folder, inputs, results, saved_again = sys.argv[1:]
given = load_file(inputs)
threshold = given["threshold"].item()
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, threshold=threshold)
with torch.no_grad():
    outputs = model(given["pixel_values"])
    tokens = AutoModel.from_pretrained(folder, trust_remote_code=True)(given["pixel_values"]).last_hidden_state
save_file({"logits": outputs.logits, "exit_stage": outputs.exit_stage, "tokens": tokens}, results)
model.save_pretrained(saved_again)
classifier = pipeline("image-classification", model=folder, trust_remote_code=True)
print(type(classifier.model).__module__)
"""


def test_loads_without_the_package_and_gives_equal_logits(tmp_path):
    model, pixel_values = lively_model(), random_images()
    threshold = torch.tensor(middle_threshold(model, pixel_values))
    folder, inputs, results = tmp_path / "model", tmp_path / "inputs.safetensors", tmp_path / "results.safetensors"
    model.save_pretrained(folder)
    evaluation_image_processor(32).save_pretrained(folder)
    save_file({"pixel_values": pixel_values, "threshold": threshold}, inputs)

    arguments = [str(folder), str(inputs), str(results), str(tmp_path / "again")]
    # -I: no site packages of the user, no PYTHONPATH, no working directory on the path
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    command = [sys.executable, "-I", "-c", SCRIPT, *arguments]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip().startswith("transformers_modules.")

    found = load_file(results)
    with torch.no_grad():
        expected = model(pixel_values, threshold=float(threshold))
        tokens = model.thinkingvit(pixel_values).last_hidden_state
    assert len(expected.exit_stage.unique()) > 1
    assert torch.equal(found["exit_stage"], expected.exit_stage)
    torch.testing.assert_close(found["logits"], expected.logits)
    torch.testing.assert_close(found["tokens"], tokens)
    # What it saves in turn is complete again.
    for name in ("modeling_thinkingvit.py", "configuration_thinkingvit.py", "early_exit.py", "nested_layers.py"):
        assert (tmp_path / "again" / name).read_text() == (folder / name).read_text()


def test_saved_folder_names_its_code(tmp_path):
    lively_model().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_thinkingvit.ThinkingViTConfig",
        "AutoModel": "modeling_thinkingvit.ThinkingViTModel",
        "AutoModelForImageClassification": "modeling_thinkingvit.ThinkingViTForImageClassification",
    }


@pytest.mark.parametrize("threshold", [0.9, [0.9, 0.1]])
def test_reloading_with_another_threshold(threshold, tmp_path):
    model = lively_model()
    model.save_pretrained(tmp_path)
    loaded = ThinkingViTForImageClassification.from_pretrained(tmp_path, threshold=threshold)
    assert loaded.config.threshold == threshold and model.config.threshold == 0.0
    for (name, expected), tensor in zip(model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(tensor, expected), name
