"""Official checkpoints by `from_pretrained` of the model classes: as a folder, as a file, and from a Hub."""

import copy
import io
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    TorchAoConfig,
    ViTConfig,
    ViTForImageClassification,
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
from tests.hub_server import TOKEN, Repository, running_hub
from tests.test_hub import online
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


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pth"])
def test_a_configuration_does_not_hide_that_bare_weights_are_official(name, tmp_path):
    """Transformers would take none of them, and draw every weight of the model."""
    config = ThinkingViTForImageClassification.from_pretrained(FOLDER).config
    weights = load_file(FOLDER / "model.safetensors")
    for folder, content in (("flat", weights), ("nested", {"state_dict": weights, "epoch": 3})):
        (tmp_path / folder).mkdir()
        if name.endswith(".safetensors"):
            save_file(weights, tmp_path / folder / name)
        else:
            torch.save(content, tmp_path / folder / name)
        with pytest.raises(ValueError, match="`config` follows from the files"):
            ThinkingViTForImageClassification.from_pretrained(tmp_path / folder, config=config)
        fields = {"thinking_stages": [1, 2, 4], "image_size": 32}
        assert_golden(ThinkingViTForImageClassification.from_pretrained(tmp_path / folder, **fields))


def test_bare_weights_of_another_library_are_refused_as_well(tmp_path):
    ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)).save_pretrained(
        tmp_path
    )
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="plain Transformers model of type 'vit'"):
        ThinkingViTForImageClassification.from_pretrained(tmp_path, config=ThinkingViTConfig())


def test_bare_weights_of_a_plain_timm_model_say_how_to_start_from_it(tmp_path):
    """Its tensors are also those of an A-ViT, which has no others."""
    shutil.copy(FIXTURES / "avit" / "model.safetensors", tmp_path / "model.safetensors")
    for options in ({}, {"config": ThinkingViTConfig()}):
        with pytest.raises(ValueError, match="plain timm ViT or DeiT.*`ThinkingViTForImageClassification.from_vit"):
            ThinkingViTForImageClassification.from_pretrained(tmp_path, **options)


def test_bare_weights_of_this_package_take_a_configuration(tmp_path):
    """In every form in which Transformers saves and loads them."""
    model = ThinkingViTForImageClassification.from_pretrained(FOLDER)
    model.save_pretrained(tmp_path / "split", max_shard_size="100KB")
    model.save_pretrained(tmp_path / "variant", variant="fp16")
    model.thinkingvit.save_pretrained(tmp_path / "without a head")
    (tmp_path / "pickled").mkdir()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    for name, options in (("split", {}), ("variant", {"variant": "fp16"}), ("pickled", {})):
        (tmp_path / name / "config.json").unlink(missing_ok=True)
        assert_golden(
            ThinkingViTForImageClassification.from_pretrained(tmp_path / name, config=model.config, **options)
        )
    (tmp_path / "without a head" / "config.json").unlink()
    loaded, info = ThinkingViTForImageClassification.from_pretrained(
        tmp_path / "without a head", config=model.config, output_loading_info=True
    )
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert torch.equal(loaded.thinkingvit.layernorm.weight, model.thinkingvit.layernorm.weight)


def test_several_checkpoints_in_a_folder_are_not_chosen_between(tmp_path):
    for name in ("epoch-10.pth", "epoch-9.pth"):
        torch.save(load_file(FOLDER / "model.safetensors"), tmp_path / name)
    with pytest.raises(ValueError, match="several checkpoints in .*: epoch-10.pth, epoch-9.pth. Give the file"):
        ThinkingViTForImageClassification.from_pretrained(tmp_path, thinking_stages=[1, 2, 4])


def test_auto_classes_say_what_converts(tmp_path):
    published = shutil.copytree(FOLDER, tmp_path / "published")
    config = json.loads((FOLDER / "config.json").read_text()) | {"pretrained_cfg": {"crop_pct": 0.9}}
    (published / "config.json").write_text(json.dumps(config))
    (tmp_path / "bare").mkdir()
    shutil.copy(FOLDER / "model.safetensors", tmp_path / "bare" / "model.pth")
    for source in (FOLDER, published, tmp_path / "bare"):
        for load in (AutoModelForImageClassification.from_pretrained, AutoConfig.from_pretrained):
            with pytest.raises(ValueError, match="is an official checkpoint, which Auto classes do not convert"):
                load(source)


def test_auto_classes_load_what_is_not_official_as_ever(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unknown"}))
    with pytest.raises(ValueError, match="does not recognize this architecture"):
        AutoConfig.from_pretrained(tmp_path)
    plain = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}, "num_classes": 2, "label_names": ["a", "b"]}
    (tmp_path / "config.json").write_text(json.dumps(plain))
    config, unused = AutoConfig.from_pretrained(tmp_path, return_unused_kwargs=True, other=1)
    assert config.model_type == "timm_wrapper" and unused == {"other": 1}
    with pytest.raises(OSError):
        AutoConfig.from_pretrained(tmp_path / "missing")


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


LOAD = """
import json, sys
import torch
from safetensors.torch import load_file
from hf_thinkingvit import ThinkingViTForImageClassification
from hf_thinkingvit.commands.loading import load_model

expected, *jobs = sys.argv[1:]
expected = load_file(expected)
for job in jobs:
    repo_id, arguments = json.loads(job)
    by_command = arguments.pop("by_command", False)
    load = load_model if by_command else ThinkingViTForImageClassification.from_pretrained_with_processor
    try:
        model, processor = load(repo_id, **arguments)
    except Exception as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)[:300]}))
        continue
    with torch.no_grad():
        logits = model(expected["pixel_values"], threshold=0.0).logits
    difference = (logits - expected["stage2.logits"]).abs().max().item()
    size = processor.size["shortest_edge"]
    print(json.dumps({"difference": difference, "threshold": model.config.threshold, "size": size}))
"""


def load_from_there(server, home: Path, *jobs: tuple[str, dict]) -> list[dict]:
    """Loads in another process, whose client asks this Hub and caches in `home`."""
    environment = {**online(server, home), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", LOAD, str(FOLDER / "expected.safetensors"), *map(json.dumps, jobs)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def server():
    """A Hub with an official checkpoint, whose newest commit has other weights, and a private copy of it."""
    config = (FOLDER / "config.json").read_bytes()
    weights = load_file(FOLDER / "model.safetensors")
    with running_hub() as server:
        for repo_id, private in (("authors/thinkingvit", False), ("org/private", True)):
            repository = server.repositories[repo_id] = Repository(private)
            for factor in (1, 2):
                changed = {**weights, "head.weight": factor * weights["head.weight"]}
                files = {"config.json": config, "model.safetensors": _as_file(changed), "README.md": b"#"}
                repository.commit({**files, "pytorch_model.bin": b"not wanted", "other.pth": b"not wanted"})
        bare = server.repositories["authors/bare"] = Repository(private=False)
        content = io.BytesIO()
        torch.save({"state_dict": weights}, content)
        bare.commit({"thinkingvit.pth.tar": content.getvalue(), "README.md": b"#"})
        yield server


def _as_file(weights: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save(weights)


@pytest.mark.slow
def test_from_a_hub(server, tmp_path):
    public, (pinned, old) = "authors/thinkingvit", (each[1][0] for each in _commits(server))
    if find_spec("peft") is not None:
        _add_adapters(server, tmp_path, public, pinned)
        adapters = [("authors/adapters", {}), ("authors/adapters", {"local_files_only": True})]
    else:
        adapters = []
    found = load_from_there(
        server,
        tmp_path,
        (public, {"threshold": 0.9}),
        (public, {"threshold": 0.9, "revision": pinned}),
        (public, {"local_files_only": True}),
        (public, {"local_files_only": True, "revision": pinned}),
        (public, {}),
        (public, {"cache_dir": str(tmp_path / "elsewhere"), "revision": pinned}),
        ("org/private", {"revision": old, "token": TOKEN}),
        ("org/private", {}),
        ("org/missing", {}),
        (public, {"config": str(tmp_path)}),  # with which Transformers would draw every weight
        ("authors/bare", {"config": str(tmp_path)}),
        ("authors/bare", {"thinking_stages": [1, 2, 4], "image_size": 32}),
        ("authors/bare", {"thinking_stages": [1, 2, 4], "image_size": 32, "local_files_only": True}),
        (public, {"by_command": True, "revision": pinned}),
        *adapters,
    )
    assert len(found) == 14 + len(adapters)
    newest, *others = found[:7]
    assert newest["difference"] > 0.1 and newest["threshold"] == 0.9 and newest["size"] == 35
    assert [each["difference"] < 1e-4 for each in others] == [True, False, True, False, True, True]
    assert (tmp_path / "elsewhere").is_dir()
    assert [each["error"] for each in found[7:11]] == ["OSError", "OSError", "ValueError", "ValueError"]
    assert "org/private" in found[7]["message"] and all("`config`" in each["message"] for each in found[9:11])
    assert all(each["difference"] < 1e-4 for each in found[11:])
    assert not [line for line in server.requests if line.startswith("GET") and line.endswith((".bin", "/other.pth"))]
    # Once for each commit and cache: other loads are from the cache.
    assert _downloads(server, public) == 3


def _commits(server) -> list[list[tuple]]:
    return [server.repositories[repo_id].commits for repo_id in ("authors/thinkingvit", "org/private")]


def _add_adapters(server, tmp_path: Path, base: str, revision: str) -> None:
    """A repository of new adapters, which change no answer."""
    import peft

    model = ThinkingViTForImageClassification.from_pretrained(FOLDER)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapters")
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": base, "revision": revision}
    weights = (tmp_path / "adapters" / "adapter_model.safetensors").read_bytes()
    repository = server.repositories["authors/adapters"] = Repository(private=False)
    repository.commit({"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": weights})


def _downloads(server, repo_id: str) -> int:
    return sum(
        line.startswith(f"GET /{repo_id}/resolve/") and line.endswith("/model.safetensors") for line in server.requests
    )
