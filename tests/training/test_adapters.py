"""Training with LoRA adapters: what learns, what is saved, and runs that go on."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hf_thinkingvit import ThinkingViTForImageClassification
from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.training import TrainingConfig, TrainingRun, finetune, parse_config, train
from hf_thinkingvit.training.adapters import merged
from tests.models.every_family import lively_exits
from tests.models.test_modeling_avit import lively_avit
from tests.training.test_finetuning import SHORT, photos  # noqa: F401, a fixture
from tests.training.tiny_runs import LABELS, flags
from tests.utils import lively_model, lively_swin


pytest.importorskip("peft")

ID2LABEL = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
SOURCES = {
    "thinkingvit": lambda: lively_model(thinking_stages=[1, 2], hidden_size=16, num_hidden_layers=2, **ID2LABEL),
    "thinking_swin": lambda: lively_swin(**ID2LABEL),
    "avit": lambda: lively_avit(**ID2LABEL),
    "early_exit_vit": lambda: lively_exits(**ID2LABEL),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for name, make in SOURCES.items():
        make().save_pretrained(folder / name)
        evaluation_image_processor(32).save_pretrained(folder / name)
    return folder


def words(images, output_dir, source, **overrides) -> list[str]:
    fields = {"epochs": 2, "lora_rank": 2, "from_pretrained": source, "model_type": source.name, **overrides}
    given = flags(images, output_dir, **fields)
    pairs = zip(given[::2], given[1::2], strict=True)
    return [word for pair in pairs if not pair[0].startswith("--model.") for word in pair]  # the source has its own


@pytest.mark.parametrize("family", SOURCES)
def test_layers_learn_by_adapters_and_the_rest_as_it_is(family, sources, images, tmp_path):
    run = TrainingRun(parse_config(words(images, tmp_path, sources / family, ema_decay=0)))
    trained = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    base = run.model.base_model_prefix
    layers = {name for name in trained if name.startswith(f"{base}.layers.")}
    assert layers and all(".lora_" in name for name in layers)
    assert not any(name.startswith((f"{base}.embeddings.", f"{base}.layernorm.")) for name in trained)
    assert "classifier.weight" in trained
    assert any("recyclers" in name for name in trained) == family.startswith("thinking")
    before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    run.run()
    changed = {name for name, parameter in run.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == trained


def test_saved_models_are_merged(sources, images, tmp_path):
    run = TrainingRun(parse_config(words(images, tmp_path, sources / "thinkingvit", ema_decay=0, learning_rate=0.1)))
    run.run()
    saved = load_file(tmp_path / "last" / "model.safetensors")
    source = load_file(sources / "thinkingvit" / "model.safetensors")
    assert saved.keys() == source.keys()
    names = [name for name in saved if not torch.equal(saved[name], source[name])]
    assert {name.split(".")[1] for name in names if ".layers." in name} == {"layers"}
    assert not any(part in name for name in names for part in ("embeddings", "layernorm"))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "last", threshold=0.0)
    pixel_values = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        found = loaded(pixel_values, output_stage_logits=True).stage_logits
        expected = run.model.eval()(pixel_values, output_stage_logits=True).stage_logits
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert "LoRA of rank 2, merged" in (tmp_path / "last" / "README.md").read_text()


@pytest.mark.slow
def test_a_run_goes_on_with_its_adapters(sources, images, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(parse_config(words(images, whole, sources / "thinkingvit")))
    train(parse_config(words(images, parts, sources / "thinkingvit", max_steps=3)))
    train(parse_config(words(images, parts, sources / "thinkingvit", resume="auto")))
    expected = load_file(whole / "last" / "model.safetensors")
    for name, weight in load_file(parts / "last" / "model.safetensors").items():
        assert torch.equal(weight, expected[name]), name
    with pytest.raises(ValueError, match="belongs to another run.*lora_rank"):
        train(parse_config(words(images, parts, sources / "thinkingvit", resume="auto", lora_rank=3)))


def test_frozen_layers_get_no_adapters(sources, images, tmp_path):
    given = words(images, tmp_path, sources / "thinkingvit", freeze="thinkingvit.layers.0.*")
    run = TrainingRun(parse_config(given))
    assert not any("layers.0." in name for name, each in run.model.named_parameters() if each.requires_grad)
    with pytest.raises(ValueError, match="every linear map of the layers is frozen"):
        TrainingRun(parse_config(words(images, tmp_path, sources / "thinkingvit", freeze="thinkingvit.layers.*")))


def test_from_a_plain_vit_only_within_its_width(images, tmp_path):
    fields = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(**fields, image_size=16, patch_size=8)).save_pretrained(tmp_path / "vit")
    given = ["--dataset", str(images), "--output_dir", str(tmp_path / "run"), "--eval_split", "test", "--cpu"]
    given += ["--from_vit", str(tmp_path / "vit"), "--lora_rank", "2", "--batch_size", "8", "--num_workers", "0"]
    with pytest.raises(ValueError, match="the model is wider than .*its further channels are new"):
        TrainingRun(parse_config([*given, "--model.thinking_stages", "2", "4"]))
    run = TrainingRun(parse_config([*given, "--model.thinking_stages", "1", "2"]))
    assert any(".lora_A." in name for name, _ in run.model.named_parameters())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"lora_rank": 2}, "`lora_rank` adapts trained weights"),
        ({"lora_rank": -1}, "`lora_rank` must be an integer, at least 0"),
        ({"lora_rank": True}, "`lora_rank` must be an integer, at least 0"),
        ({"lora_alpha": 4.0}, "`lora_alpha` must be above 0, and goes with `lora_rank`"),
    ],
)
def test_fields_that_do_not_fit(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(dataset="images", output_dir=str(tmp_path), **fields).check()


@pytest.mark.slow
def test_fine_tuning_in_one_call(photos, tmp_path):  # noqa: F811
    source = tmp_path / "source"
    lively_model(thinking_stages=[1, 2], hidden_size=16, num_hidden_layers=1).save_pretrained(source)
    evaluation_image_processor(32).save_pretrained(source)
    done = finetune(photos, source, tmp_path / "out", lora_rank=2, **SHORT)
    assert type(done.model) is ThinkingViTForImageClassification
    assert not any("lora" in name for name, _ in done.model.named_parameters())
    assert "LoRA of rank 2, merged" in (done.folder / "README.md").read_text()
    assert AutoConfig.from_pretrained(done.folder).threshold == done.calibration.threshold


def test_a_model_without_adapters_is_not_copied():
    model = lively_model()
    assert merged(model) is model
