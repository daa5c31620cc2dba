"""What the commands and the demo load a model from."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from hf_thinkingvit import ThinkingViTForImageClassification, convert_checkpoint
from hf_thinkingvit.commands.__main__ import main
from hf_thinkingvit.commands.command import check_model_folder
from hf_thinkingvit.commands.loading import load_baseline, load_model
from hf_thinkingvit.families.record import IMAGE_SEGMENTATION
from tests.conversion.segmenter_files import write_official
from tests.utils import FIXTURES


FOLDER = FIXTURES / "thinkingvit_2stage"


@pytest.mark.parametrize("name", ["thinkingvit_2stage", "thinkingswin", "avit", "seg_linear"])
def test_official_checkpoints_are_what_they_are_converted_to(name, tmp_path):
    source = write_official(name, tmp_path / name) if name.startswith("seg_") else FIXTURES / name
    convert_checkpoint(source, tmp_path / "converted")
    model, processor = load_model(str(source), task=None, dtype=torch.float32)
    saved, saved_processor = load_model(str(tmp_path / "converted"), task=None, dtype=torch.float32)
    assert type(model) is type(saved) and not model.training and processor.to_dict() == saved_processor.to_dict()
    weights = saved.state_dict()
    assert all(torch.equal(weights[key], weight) for key, weight in model.state_dict().items())
    assert load_model(str(source), task=None, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_files_and_bare_folders_say_what_they_lack(tmp_path):
    """A file tells the stages by its widths of 64 channels a head, or not at all."""
    weights = load_file(FIXTURES / "avit" / "model.safetensors")
    torch.save({"model": weights}, tmp_path / "avit.pth")
    for source in (tmp_path / "avit.pth", tmp_path):
        with pytest.raises(ValueError, match="`gate_scale`.*folder that `hf-thinkingvit convert` makes of it"):
            load_model(str(source))
    torch.save({"state_dict": load_file(FOLDER / "model.safetensors")}, tmp_path / "model.pth.tar")
    shutil.copy(FOLDER / "config.json", tmp_path / "config.json")
    model, _ = load_model(str(tmp_path / "model.pth.tar"))
    assert model.config.thinking_stages == [1, 2]
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no config.json in it.*It holds adapters: merge them"):
        check_model_folder(str(tmp_path / "adapters"))


def test_another_task_is_refused():
    with pytest.raises(ValueError, match="is a model for image-classification, and this command is for image-segm"):
        load_model(str(FOLDER), IMAGE_SEGMENTATION)


def test_no_head_is_drawn_at_random(tmp_path):
    """Neither of the model of a command, nor of one that it is compared with."""
    model, processor = load_model(str(FOLDER))
    model.base_model.save_pretrained(tmp_path / "bare")
    plain = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32))
    plain.save_pretrained(tmp_path / "plain")
    for name in ("bare", "plain"):
        processor.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match="has no weights for classifier.bias, classifier.weight"):
            load_baseline(str(tmp_path / name))
    with pytest.raises(ValueError, match="has no weights for classifier.bias, classifier.weight"):
        load_model(str(tmp_path / "bare"))


def test_a_baseline_may_be_official_or_of_transformers(tmp_path):
    assert type(load_baseline(str(FOLDER))[0]) is ThinkingViTForImageClassification
    plain = ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    plain.save_pretrained(tmp_path)
    load_model(str(FOLDER))[1].save_pretrained(tmp_path)
    assert type(load_baseline(str(tmp_path))[0]) is ViTForImageClassification


def test_commands_answer_as_with_the_converted_model(tmp_path, capsys):
    convert_checkpoint(FOLDER, tmp_path / "converted")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 36), (200, 90, 10)).save(tmp_path / "pictures" / "a.png")
    lines = []
    for model in (FOLDER, tmp_path / "converted"):
        words = ["--model", str(model), "--dataset", str(tmp_path / "pictures")]
        main(["classify", *words, "--output-dir", str(tmp_path / model.name)])
        lines.append(json.loads((tmp_path / model.name / "classified.jsonl").read_text()))
    assert lines[0] == lines[1] and lines[0]["label"].startswith("LABEL_")
    main(["push", "--model", str(FOLDER), "--repo-id", "org/name", "--dry-run", str(tmp_path / "pushed")])
    pushed, converted = (load_file(tmp_path / name / "model.safetensors") for name in ("pushed", "converted"))
    assert pushed.keys() == converted.keys() and all(torch.equal(pushed[key], converted[key]) for key in pushed)
    texts = [path.read_text() for path in (tmp_path / "pushed").iterdir() if path.suffix in (".json", ".md")]
    assert not any(str(FOLDER.parent) in text for text in texts)
