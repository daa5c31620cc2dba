"""The saved folder must work where this package is not installed."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_thinkingvit import ThinkingViTForImageClassification
from hf_thinkingvit.image_processing import evaluation_image_processor
from tests.models.test_modeling_avit import lively_avit
from tests.utils import lively_model, lively_swin, middle_threshold, random_images


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

import json
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification, pipeline

folder, inputs, results, saved_again, overrides = sys.argv[1:]
pixel_values = load_file(inputs)["pixel_values"]
overrides = json.loads(overrides)
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, **overrides)
with torch.no_grad():
    outputs = dict(model(pixel_values))
    outputs["tokens"] = AutoModel.from_pretrained(folder, trust_remote_code=True)(pixel_values).last_hidden_state
save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, results)
model.save_pretrained(saved_again)
classifier = pipeline("image-classification", model=folder, trust_remote_code=True)
print(type(classifier.model).__module__)

if hasattr(model, "run_stage"):
    from PIL import Image

    for place in (folder, saved_again):
        classifier = pipeline(
            "adaptive-image-classification", model=place, image_processor=folder, trust_remote_code=True
        )
        assert type(classifier).__module__.startswith("transformers_modules."), type(classifier)
        images = [Image.effect_noise((40, 50), sigma).convert("RGB") for sigma in (20, 60, 90, 120)]
        images.insert(2, "nowhere.png")
        results = classifier(images, on_error="return", batch_size=2, **overrides)
        alone = [classifier(image, on_error="return", **overrides) for image in images]
        assert [len(result) for result in results] == [5, 5, 1, 5, 5], results
        assert "nowhere.png" in results[2][0]["error"]
        for result, other in zip(results, alone):
            assert [entry.get("label") for entry in result] == [entry.get("label") for entry in other]
            assert [entry.get("exit_stage") for entry in result] == [entry.get("exit_stage") for entry in other]
        classifier.save_pretrained(place + "_by_pipeline")
    # Without a task, the folder's own.
    assert type(pipeline(model=folder, trust_remote_code=True)).__name__ == "StagedImageClassificationPipeline"
"""


STAGED = {"thinkingvit": lively_model, "thinking_swin": lively_swin}


@pytest.mark.parametrize("family", [*STAGED, "avit"])
def test_loads_without_the_package_and_gives_equal_outputs(family, tmp_path):
    pixel_values = random_images()
    if family in STAGED:
        model = STAGED[family]()
        overrides = {"threshold": middle_threshold(model, pixel_values)}
    else:
        model, overrides = lively_avit(), {"halting_epsilon": 0.02}
    folder, inputs, results = tmp_path / "model", tmp_path / "inputs.safetensors", tmp_path / "results.safetensors"
    model.save_pretrained(folder)
    evaluation_image_processor(32).save_pretrained(folder)
    save_file({"pixel_values": pixel_values}, inputs)

    arguments = [str(folder), str(inputs), str(results), str(tmp_path / "again"), json.dumps(overrides)]
    # -I: no site packages of the user, no PYTHONPATH, no working directory on the path
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    command = [sys.executable, "-I", "-c", SCRIPT, *arguments]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip().startswith("transformers_modules.")

    found = load_file(results)
    with torch.no_grad():
        expected = dict(model(pixel_values, **overrides))
        expected["tokens"] = model.base_model(pixel_values).last_hidden_state
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=lambda m: f"{name}: {m}")
    assert len(expected["exit_stage" if family in STAGED else "macs"].unique()) > 1
    # What it saves in turn is complete again.
    names = {path.name for path in folder.glob("*.py")}
    backbone = "nested_swin.py" if family == "thinking_swin" else "nested_vit.py"
    assert {f"modeling_{family}.py", f"configuration_{family}.py", backbone} <= names
    for name in names:
        assert (tmp_path / "again" / name).read_text() == (folder / name).read_text()
    assert ("custom_pipelines" in json.loads((tmp_path / "again" / "config.json").read_text())) == (family in STAGED)
    for place in ("model_by_pipeline", "again_by_pipeline") if family in STAGED else ():
        assert {path.name for path in (tmp_path / place).glob("*.py")} == names


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
