import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, pipeline

from hf_thinkingvit import convert_checkpoint
from hf_thinkingvit.conversion.labels import imagenet_1k_classes
from tests.utils import FIXTURES


@pytest.fixture(params=["thinkingvit_2stage", "thinkingswin", "avit"])
def source(request, tmp_path):
    """A golden folder, with a classifier of 1000 classes that answers 281."""
    folder = shutil.copytree(FIXTURES / request.param, tmp_path / "source")
    state_dict = load_file(folder / "model.safetensors")
    head = "head.fc" if "head.fc.weight" in state_dict else "head"
    state_dict[f"{head}.weight"] = torch.zeros(1000, state_dict[f"{head}.weight"].shape[1])
    state_dict[f"{head}.bias"] = 5.0 * torch.nn.functional.one_hot(torch.tensor(281), 1000).float()
    save_file(state_dict, folder / "model.safetensors")
    return folder


def test_a_thousand_classes_are_imagenets(source, tmp_path):
    convert_checkpoint(source, tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert [config.id2label[index] for index in (0, 134, 517, 638, 639, 999)] == [
        "tench, Tinca tinca",
        "crane",
        "crane2",
        "maillot",
        "maillot, tank suit",
        "toilet tissue, toilet paper, bathroom tissue",
    ]
    assert config.label2id == {label: index for index, label in config.id2label.items()}
    classifier = pipeline("image-classification", model=str(tmp_path / "out"))
    assert classifier(str(FIXTURES.parents[1] / "examples/images/cat.png"))[0]["label"] == "tabby, tabby cat"


def test_other_names_win(source, tmp_path):
    names = {index: f"class {index}" for index in range(1000)}
    config = convert_checkpoint(source, tmp_path / "override", id2label=names).config
    assert config.id2label == names and config.label2id["class 7"] == 7
    settings = json.loads((source / "config.json").read_text())
    # Two classes of one name stay two. A name that leads to two classes leads to none.
    settings["label_names"] = ["crane", *list(names.values())[1:-1], "crane"]
    (source / "config.json").write_text(json.dumps(settings))
    convert_checkpoint(source, tmp_path / "files")
    config = AutoConfig.from_pretrained(tmp_path / "files")
    assert (config.num_labels, config.id2label[0], config.id2label[999]) == (1000, "crane", "crane")
    assert "crane" not in config.label2id and config.label2id["class 7"] == 7
    with pytest.raises(ValueError, match="contradict each other: 'class 0' is class 1"):
        convert_checkpoint(source, tmp_path / "wrong", id2label=names, label2id={"class 0": 1})
    assert not (tmp_path / "wrong").exists()


def test_fewer_classes_are_not_imagenets(tmp_path):
    assert convert_checkpoint(FIXTURES / "avit", tmp_path).config.id2label[0] == "LABEL_0"


def test_names_as_timm_has_them():
    names = imagenet_1k_classes()
    assert len(set(names)) == 1000
    timm_data = pytest.importorskip("timm.data")
    classes = timm_data.ImageNetInfo("imagenet-1k")
    theirs = [classes.index_to_description(index) for index in range(1000)]
    # The second crane has another name on the Hub, so that names are unique.
    assert [(mine, name) for mine, name in zip(names, theirs) if mine != name] == [("crane2", "crane")]
