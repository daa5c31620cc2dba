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
    """A golden folder, with a classifier of 1000 classes that always predicts 281."""
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
    # Two classes with one name stay two classes, and `label2id` leaves the name out.
    settings["label_names"] = ["crane", *list(names.values())[1:-1], "crane"]
    (source / "config.json").write_text(json.dumps(settings))
    convert_checkpoint(source, tmp_path / "files")
    config = AutoConfig.from_pretrained(tmp_path / "files")
    assert (config.num_labels, config.id2label[0], config.id2label[999]) == (1000, "crane", "crane")
    assert "crane" not in config.label2id and config.label2id["class 7"] == 7
    with pytest.raises(ValueError, match="contradict each other: 'class 0' is class 1"):
        convert_checkpoint(source, tmp_path / "wrong", id2label=names, label2id={"class 0": 1})
    assert not (tmp_path / "wrong").exists()


TWENTY = [f"class {index}" for index in range(20)]


@pytest.mark.parametrize(
    "names, message",
    [
        (TWENTY[:19], r"20 classes of .*model\.safetensors, got 19 names"),
        ([*TWENTY, "a", "b"], r"20 classes of .*, got 22 names"),
        ([], r"20 classes of .*, got 0 names"),
        ("imagenet", "strings.*got str 'imagenet'"),
        (dict.fromkeys(TWENTY, 1), "strings.*got dict"),
        ([*TWENTY[:19], 19], "strings.*got int 19"),
        ([*TWENTY[:19], None], "strings.*got NoneType None"),
    ],
    ids=["too few", "too many", "none", "text", "dict", "a number", "null"],
)
def test_names_that_are_not_one_for_each_class(names, message, tmp_path):
    """Names from the files or the caller are refused, not replaced by LABEL_0 and so on."""
    folder = shutil.copytree(FIXTURES / "avit", tmp_path / "source")
    settings = json.loads((folder / "config.json").read_text())
    num_labels = load_file(folder / "model.safetensors")["head.bias"].shape[0]
    assert num_labels == 20
    (folder / "config.json").write_text(json.dumps({**settings, "label_names": names}))
    with pytest.raises(ValueError, match=rf"`label_names` of its config\.json must be .*{message}"):
        convert_checkpoint(folder, tmp_path / "out")
    (folder / "config.json").write_text(json.dumps(settings))
    given = dict(enumerate(names)) if isinstance(names, list) else names
    with pytest.raises(ValueError, match="`id2label` must be"):
        convert_checkpoint(folder, tmp_path / "out", id2label=given)
    if isinstance(names, list):
        with pytest.raises(ValueError, match="`label2id` must be"):
            convert_checkpoint(folder, tmp_path / "out", label2id={name: index for index, name in enumerate(names)})
    assert not (tmp_path / "out").exists()


def test_names_of_the_caller_for_twenty_classes(tmp_path):
    label2id = {name: index for index, name in enumerate(TWENTY)}
    assert convert_checkpoint(FIXTURES / "avit", tmp_path / "a", label2id=label2id).config.id2label[7] == "class 7"
    given = {str(index): name for index, name in enumerate(TWENTY)}
    assert convert_checkpoint(FIXTURES / "avit", tmp_path / "b", id2label=given).config.label2id == label2id


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
