"""A saved folder works without this package installed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_thinkingvit import ThinkingViTForImageClassification
from hf_thinkingvit.image_processing import evaluation_image_processor
from tests.models.test_modeling_avit import lively_avit
from tests.models.test_modeling_early_exit_vit import lively_method
from tests.models.test_modeling_elastic_vit import lively_elastic
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
from pathlib import Path
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification, pipeline

root, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
pixel_values = load_file(root / "inputs.safetensors")["pixel_values"]
for family, overrides in cases.items():
    folder, again = root / family, root / "again" / family
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, **overrides)
    with torch.no_grad():
        outputs = dict(model(pixel_values))
        outputs["tokens"] = AutoModel.from_pretrained(folder, trust_remote_code=True)(pixel_values).last_hidden_state
    save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, root / f"{family}.safetensors")
    model.save_pretrained(again)
    classifier = pipeline("image-classification", model=str(folder), trust_remote_code=True)
    print(type(classifier.model).__module__)
    if not hasattr(model, "run_stage"):
        continue
    for place in map(str, (folder, again)):
        classifier = pipeline(
            "adaptive-image-classification", model=place, image_processor=str(folder), trust_remote_code=True
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
    assert type(pipeline(model=str(folder), trust_remote_code=True)).__name__ == "StagedImageClassificationPipeline"
"""


PIXEL_VALUES = random_images()
MODELS = {
    "thinkingvit": lively_model(pruning_layers=[1, 2], pruning_keep_rate=0.5),
    "thinking_swin": lively_swin(),
    "avit": lively_avit(),
    "early_exit_vit": lively_method("pondernet", exit_criterion="q_exit"),  # by which answers are not random
    "elastic_vit": lively_elastic(),
}
OVERRIDES = {
    "thinkingvit": {"threshold": middle_threshold(MODELS["thinkingvit"], PIXEL_VALUES)},
    "thinking_swin": {"threshold": middle_threshold(MODELS["thinking_swin"], PIXEL_VALUES)},
    "avit": {"halting_epsilon": 0.02},
    "early_exit_vit": {"threshold": 0.5},
    "elastic_vit": {"default_sub_network": 1},
}


@pytest.fixture(scope="module")
def loaded_elsewhere(tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder of saved models and their results in a process without the package, and the modules of their classes."""
    root = tmp_path_factory.mktemp("remote_code")
    for family, model in MODELS.items():
        model.save_pretrained(root / family)
        evaluation_image_processor(32).save_pretrained(root / family)
    save_file({"pixel_values": PIXEL_VALUES}, root / "inputs.safetensors")
    # -I: no site packages of the user, no PYTHONPATH, no working directory on the path
    environment = {"HF_HOME": str(root / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-I", "-c", SCRIPT, str(root), json.dumps(OVERRIDES)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return root, process.stdout.split()


def test_the_code_comes_from_the_folder(loaded_elsewhere):
    _, modules = loaded_elsewhere
    for family, module in zip(OVERRIDES, modules, strict=True):
        assert re.fullmatch(rf"transformers_modules\.{family}(\.\w+)*\.modeling_{family}", module)


@pytest.mark.parametrize("family", OVERRIDES)
def test_loads_without_the_package_and_gives_equal_outputs(family, loaded_elsewhere):
    root, _ = loaded_elsewhere
    model, found = MODELS[family], load_file(root / f"{family}.safetensors")
    arguments = {"sub_network": 1} if family == "elastic_vit" else OVERRIDES[family]
    with torch.no_grad():
        expected = dict(model(PIXEL_VALUES, **arguments))
        expected["tokens"] = model.base_model(PIXEL_VALUES).last_hidden_state
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=lambda m: f"{name}: {m}")
    if family != "elastic_vit":
        assert len(expected["macs" if family == "avit" else "exit_stage"].unique()) > 1
    # A folder that it saves is complete again.
    names = {path.name for path in (root / family).glob("*.py")}
    backbone = "nested_swin.py" if family == "thinking_swin" else "nested_vit.py"
    assert {f"modeling_{family}.py", f"configuration_{family}.py", backbone} <= names
    for name in names:
        assert (root / "again" / family / name).read_text() == (root / family / name).read_text()
    staged = family not in ("avit", "elastic_vit")
    config = json.loads((root / "again" / family / "config.json").read_text())
    assert ("custom_pipelines" in config) == staged
    for place in (f"{family}_by_pipeline", f"again/{family}_by_pipeline") if staged else ():
        assert {path.name for path in (root / place).glob("*.py")} == names


def test_saved_folder_names_its_code(tmp_path):
    lively_model().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_thinkingvit.ThinkingViTConfig",
        "AutoModel": "modeling_thinkingvit.ThinkingViTModel",
        "AutoModelForImageClassification": "modeling_thinkingvit.ThinkingViTForImageClassification",
        "AutoBackbone": "modeling_thinkingvit_backbone.ThinkingViTBackbone",
    }


@pytest.mark.parametrize("threshold", [0.9, [0.9, 0.1]])
def test_reloading_with_another_threshold(threshold, tmp_path):
    model = lively_model()
    model.save_pretrained(tmp_path)
    loaded = ThinkingViTForImageClassification.from_pretrained(tmp_path, threshold=threshold)
    assert loaded.config.threshold == threshold and model.config.threshold == 0.0
    for (name, expected), tensor in zip(model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(tensor, expected), name
