"""Official checkpoints by `from_pretrained` of the model classes: as a folder and as a file."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    TorchAoConfig,
    pipeline,
)
from transformers.utils import logging

from hf_thinkingvit import (
    AViTForImageClassification,
    AViTModel,
    ElasticViTForImageClassification,
    ThinkingSwinForImageClassification,
    ThinkingSwinModel,
    ThinkingViTBackbone,
    ThinkingViTConfig,
    ThinkingViTForImageClassification,
    ThinkingViTForSemanticSegmentation,
    ThinkingViTModel,
    convert_checkpoint,
)
from tests.conversion.segmenter_files import write_official
from tests.utils import FIXTURES


FOLDER = FIXTURES / "thinkingvit_3stage"
OFFICIAL = {
    "thinkingvit_3stage": ThinkingViTForImageClassification,
    "thinkingvit_first_release": ThinkingViTForImageClassification,
    "thinking_dynamicvit": ThinkingViTForImageClassification,
    "thinkingswin": ThinkingSwinForImageClassification,
    "avit": AViTForImageClassification,
    "seg_mask": ThinkingViTForSemanticSegmentation,
}


@pytest.fixture(params=OFFICIAL)
def official(request, tmp_path) -> tuple[Path, type]:
    """The folder of an official checkpoint, and the class that loads it."""
    name = request.param
    folder = write_official(name, tmp_path / name) if name.startswith("seg_") else FIXTURES / name
    return folder, OFFICIAL[name]


def pixel_values() -> torch.Tensor:
    return load_file(FOLDER / "expected.safetensors")["pixel_values"]


@torch.no_grad()
def assert_golden(model, golden: Path = FOLDER) -> None:
    expected = load_file(golden / "expected.safetensors")
    logits = model(expected["pixel_values"], threshold=0.0).logits
    last = f"stage{model.config.num_stages - 1}.logits"
    torch.testing.assert_close(logits, expected[last], atol=1e-4, rtol=0)


def test_the_same_as_converting_into_a_folder(official, tmp_path):
    source, model_class = official
    model, processor, info = model_class.from_pretrained_with_processor(source, output_loading_info=True)
    assert not model.training and not any(info.values())
    assert model.config.name_or_path == model.name_or_path == str(source)
    convert_checkpoint(source, tmp_path / "converted")
    other, other_processor = model_class.from_pretrained_with_processor(tmp_path / "converted")
    assert type(model) is type(other) is model_class
    differing = ("_name_or_path", "transformers_version", "auto_map")
    ours, theirs = ({**each.config.to_dict(), **dict.fromkeys(differing)} for each in (model, other))
    assert ours == theirs
    weights = other.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert processor.to_dict() == other_processor.to_dict()


def test_fields_of_the_configuration_override(tmp_path):
    model = ThinkingViTForImageClassification.from_pretrained(FOLDER, threshold=[0.9, 0.5], drop_path_rate=0.1)
    assert model.config.threshold == [0.9, 0.5] and model.config.drop_path_rate == 0.1
    assert model.config.thinking_stages == [1, 2, 4]
    assert_golden(model)
    names = {index: f"class {index}" for index in range(20)}
    model = ThinkingViTForImageClassification.from_pretrained(FOLDER, id2label=names)
    assert model.config.id2label[7] == "class 7" and model.config.label2id["class 7"] == 7
    with pytest.raises(TypeError, match="no_such_field"):
        ThinkingViTForImageClassification.from_pretrained(FOLDER, no_such_field=1)
    with pytest.raises(ValueError, match="`threshold`"):
        ThinkingViTForImageClassification.from_pretrained(FOLDER, threshold=[0.1, 0.2, 0.3])


def test_other_labels_are_another_size():
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        ThinkingViTForImageClassification.from_pretrained(FOLDER, num_labels=5)
    model, info = ThinkingViTForImageClassification.from_pretrained(
        FOLDER, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert len(info["mismatched_keys"]) == 2 and model.config.num_labels == 5
    assert model.classifier.weight.shape[0] == 5 and model.classifier.weight.abs().sum() > 0
    converted = ThinkingViTForImageClassification.from_pretrained(FOLDER).thinkingvit.state_dict()
    assert all(torch.equal(weight, converted[name]) for name, weight in model.thinkingvit.state_dict().items())


def test_files_of_a_training_script(tmp_path):
    state_dict = {f"module.{name}": weight for name, weight in load_file(FOLDER / "model.safetensors").items()}
    content = {"state_dict_ema": state_dict, "epoch": 3}
    torch.save(content, tmp_path / "model.pth.tar")
    fields = {"thinking_stages": [1, 2, 4], "image_size": 32}
    for source in (tmp_path / "model.pth.tar", str(tmp_path), tmp_path):  # the file, and the folder that it is alone in
        model = ThinkingViTForImageClassification.from_pretrained(source, threshold=0.25, **fields)
        assert model.config.threshold == 0.25
        assert_golden(model)
    (tmp_path / "model.pth.tar").write_bytes((tmp_path / "model.pth.tar").read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        ThinkingViTForImageClassification.from_pretrained(tmp_path / "model.pth.tar", **fields)


@torch.no_grad()
def test_bare_models_and_backbones():
    expected = load_file(FOLDER / "expected.safetensors")["stage2.last_hidden_state"]
    bare = ThinkingViTModel.from_pretrained(FOLDER)
    torch.testing.assert_close(bare(pixel_values()).last_hidden_state, expected, atol=1e-4, rtol=0)
    maps = ThinkingViTBackbone.from_pretrained(FOLDER)(pixel_values()).feature_maps
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), expected[:, 1:], atol=1e-4, rtol=0)
    assert isinstance(ThinkingSwinModel.from_pretrained(FIXTURES / "thinkingswin"), ThinkingSwinModel)
    assert AViTModel.from_pretrained(FIXTURES / "avit").config.gate_scale == 4.0
    segmenter = ThinkingViTForSemanticSegmentation.from_thinkingvit(FOLDER, num_labels=3)
    assert torch.equal(segmenter.thinkingvit.layers[0].mlp.fc1.weight, bare.layers[0].mlp.fc1.weight)


@pytest.mark.parametrize(
    "model_class, right",
    [
        (ThinkingSwinForImageClassification, "ThinkingViTForImageClassification"),
        (AViTModel, "ThinkingViTForImageClassification"),
        (ElasticViTForImageClassification, "ThinkingViTForImageClassification"),
        (ThinkingViTForSemanticSegmentation, "ThinkingViTForImageClassification"),
    ],
)
def test_another_class_is_refused_and_the_right_one_named(model_class, right):
    with pytest.raises(ValueError, match=f"for {right}, and not for {model_class.__name__}: load it with `{right}"):
        model_class.from_pretrained(FOLDER)


def test_dtype_and_quantisation(tmp_path):
    model = ThinkingViTForImageClassification.from_pretrained(FOLDER, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.thinkingvit.layers[0].mlp.fc1.weight.dtype == torch.bfloat16
    folder = shutil.copytree(FOLDER, tmp_path / "half")
    save_file({k: v.half() for k, v in load_file(FOLDER / "model.safetensors").items()}, folder / "model.safetensors")
    assert ThinkingViTForImageClassification.from_pretrained(folder).dtype == torch.float16
    assert ThinkingViTForImageClassification.from_pretrained(folder, dtype=torch.float32).dtype == torch.float32
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = ThinkingViTForImageClassification.from_pretrained(FOLDER, quantization_config=config)
    weight = model.thinkingvit.layers[0].mlp.fc1.weight
    assert type(weight) is not torch.nn.Parameter and weight.dtype == torch.float32


def test_saved_afterwards_it_is_an_ordinary_model(tmp_path):
    ThinkingViTForImageClassification.from_pretrained(FOLDER, threshold=[0.5, 0.25]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "thinkingvit" and config["architectures"] == ["ThinkingViTForImageClassification"]
    assert_golden(AutoModelForImageClassification.from_pretrained(tmp_path))


def test_a_configuration_alone_is_refused():
    """All its fields would be defaults, silently."""
    with pytest.raises(ValueError, match="has no `model_type`, so it is none of ThinkingViTConfig"):
        ThinkingViTConfig.from_pretrained(FOLDER)


def test_other_sources_are_loaded_as_ever(tmp_path):
    model = ThinkingViTForImageClassification.from_pretrained(FOLDER)
    model.save_pretrained(tmp_path / "saved")
    assert_golden(ThinkingViTForImageClassification.from_pretrained(tmp_path / "saved"))
    weights = model.state_dict()
    assert_golden(ThinkingViTForImageClassification.from_pretrained(None, config=model.config, state_dict=weights))
    config = copy.deepcopy(model.config)
    shutil.copytree(tmp_path / "saved", tmp_path / "bare").joinpath("config.json").unlink()
    assert_golden(ThinkingViTForImageClassification.from_pretrained(tmp_path / "bare", config=config))
    with pytest.raises(OSError):
        ThinkingViTForImageClassification.from_pretrained(tmp_path / "empty", config=config)
    for missing in (tmp_path / "nothing", "org/nothing", "nothing.pth"):
        with pytest.raises(OSError):
            ThinkingViTForImageClassification.from_pretrained(missing)


def test_arguments_for_other_layouts_are_refused():
    with pytest.raises(ValueError, match="`variant` is about files in Transformers' layout"):
        ThinkingViTForImageClassification.from_pretrained(FOLDER, variant="fp16")
    for load in (ThinkingViTForImageClassification.from_pretrained, AutoModelForImageClassification.from_pretrained):
        with pytest.raises(
            ValueError, match="`config` follows from the files.*fields of it instead, as in `ThinkingViT"
        ):
            load(FOLDER, config=ThinkingViTConfig())


@torch.no_grad()
def test_token_pruning_is_turned_off(tmp_path):
    """As it is for a saved model: `None` is a value."""
    source, images = FIXTURES / "thinking_dynamicvit", torch.randn(2, 3, 32, 32)
    pruned = ThinkingViTForImageClassification.from_pretrained(source)
    pruned.save_pretrained(tmp_path)
    off = {"pruning_layers": None, "pruning_keep_rate": None}
    model, info = ThinkingViTForImageClassification.from_pretrained(source, **off, output_loading_info=True)
    saved = ThinkingViTForImageClassification.from_pretrained(tmp_path, **off)
    assert model.config.pruning_layers is model.config.pruning_keep_rate is None and not any(info.values())
    assert model.config.exit_criterion == pruned.config.exit_criterion and model.config.exit_at_threshold
    logits = [each(images, threshold=0.0).logits for each in (pruned, model, saved)]
    assert (logits[0] - logits[1]).abs().max() > 1e-4 and torch.equal(logits[1], logits[2])
    with pytest.raises(ValueError, match="`pruning_keep_rate` .* has no effect without `pruning_layers`"):
        ThinkingViTForImageClassification.from_pretrained(source, pruning_layers=None)


@pytest.mark.parametrize("name", ["thinkingvit_3stage", "thinking_dynamicvit"])
def test_none_means_what_it_means_for_a_saved_model(name, tmp_path):
    source = FIXTURES / name
    stages = len(ThinkingViTForImageClassification.from_pretrained(source).config.thinking_stages)
    given = {"stage_loss_weights": [1 / stages] * stages, "out_stage": 0}
    convert_checkpoint(source, tmp_path, **given)
    nones = dict.fromkeys([*given, "threshold", "exit_criterion"])
    ours, saved = (
        ThinkingViTForImageClassification.from_pretrained(each, **nones).config for each in (source, tmp_path)
    )
    assert {field: getattr(ours, field) for field in nones} == {field: getattr(saved, field) for field in nones}
    assert ours.stage_loss_weights is ours.out_stage is None


def test_a_stated_threshold_is_not_read_on_another_scale(tmp_path):
    """Of the largest probability, the published τ of 0 would let every image leave at the first stage."""
    source = FIXTURES / "thinking_dynamicvit"
    convert_checkpoint(source, tmp_path)
    for each in (source, tmp_path):
        with pytest.raises(ValueError, match="on another scale: give both `exit_criterion` and `threshold`"):
            ThinkingViTForImageClassification.from_pretrained(each, exit_criterion="max_probability")
        fields = {"exit_criterion": "max_probability", "threshold": 0.75}
        assert ThinkingViTForImageClassification.from_pretrained(each, **fields).config.threshold == 0.75


def test_labels_that_are_none_are_not_given():
    model = ThinkingViTForImageClassification.from_pretrained(FOLDER, num_labels=None, id2label=None, label2id=None)
    assert model.config.num_labels == 20


def test_the_load_report_names_the_source(caplog):
    with caplog.at_level("WARNING", logger="transformers"):
        logging.get_logger("transformers").addHandler(caplog.handler)
        try:
            model = ThinkingViTForImageClassification.from_pretrained(
                FOLDER, num_labels=5, ignore_mismatched_sizes=True
            )
        finally:
            logging.get_logger("transformers").removeHandler(caplog.handler)
    assert "MISMATCH" in caplog.text and f"from: {FOLDER}\n" in caplog.text
    assert "_official_source" not in vars(model.config) and model.config.name_or_path == str(FOLDER)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(device_map):
    model = ThinkingViTForImageClassification.from_pretrained(FOLDER, device_map=device_map)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert_golden(model.cpu())


def test_device_map_with_a_disk(tmp_path):
    devices = {"thinkingvit": "cpu", "classifier": "disk"}
    model = ThinkingViTForImageClassification.from_pretrained(FOLDER, device_map=devices, offload_folder=tmp_path)
    assert model.classifier.weight.is_meta
    assert_golden(model)


def test_code_of_a_folder_says_what_converts(monkeypatch):
    """Models that were loaded with the code of their folder come without the conversion."""
    monkeypatch.setattr("hf_thinkingvit.models.weights_from_official._converter", None)
    with pytest.raises(ValueError, match="in the layout of its authors.*hf-thinkingvit converts it: install it"):
        ThinkingViTForImageClassification.from_pretrained(FOLDER)


def test_missing_fields_are_named(tmp_path):
    shutil.copy(FIXTURES / "avit" / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="`gate_scale`"):
        AViTForImageClassification.from_pretrained(tmp_path)


def test_subfolder(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "weights" / "inner")
    assert_golden(ThinkingViTForImageClassification.from_pretrained(tmp_path / "weights", subfolder="inner"))


def test_adaptive_pipeline_of_model_and_processor():
    from PIL import Image

    model, processor = ThinkingViTForImageClassification.from_pretrained_with_processor(FOLDER, threshold=0.0)
    classifier = pipeline("adaptive-image-classification", model=model, image_processor=processor)
    answer = classifier(Image.new("RGB", (50, 40), (200, 30, 30)), top_k=1)[0]
    assert answer["exit_stage"] == 2 and answer["label"] in model.config.label2id
