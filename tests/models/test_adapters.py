"""Adapters of PEFT on every family: in every stage they compute what the merged model computes."""

import copy
import json

import pytest
import torch
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, pipeline

from hf_thinkingvit import ThinkingViTForImageClassification
from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.inference import AdaptiveEngine
from hf_thinkingvit.models.nested_projection import project
from tests.models.adapters import adapted, assert_same, lora
from tests.models.every_family import EVERY_CLASS, EVERY_FAMILY, every_answer
from tests.models.test_modeling_avit import lively_avit
from tests.utils import FIXTURES, counted_flops, lively_model, lively_swin, random_images


peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `boft_n_butterfly_factor`|Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

# The linear layers of attention and MLP under their names in ViT, Swin and the segmentation decoder.
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "qkv", "fc1", "fc2"]


def assert_equals_merged(model: "peft.PeftModel", plain: torch.nn.Module) -> None:
    """The adapters change the answers of every stage, and give those of the merged model."""
    found = every_answer(model)
    for ours, unadapted in zip(found, every_answer(plain), strict=True):
        assert (ours - unadapted).abs().max() > 1e-3
    assert_same(every_answer(copy.deepcopy(model).merge_and_unload()), found)


@pytest.mark.parametrize("family", EVERY_FAMILY)
@torch.no_grad()
def test_lora_equals_the_merged_model_in_every_stage(family):
    plain = EVERY_FAMILY[family]()
    model = adapted(copy.deepcopy(plain), lora())
    assert_equals_merged(model, plain)
    with model.disable_adapter():
        assert_same(every_answer(model), every_answer(plain))


@pytest.mark.parametrize("family", EVERY_CLASS)
@torch.no_grad()
def test_merged_in_place_and_unmerged(family):
    plain = EVERY_FAMILY[family]()
    model = adapted(copy.deepcopy(plain), lora())
    expected = every_answer(model)
    for safe_merge in (False, True):  # the one changes the weights in place, the other replaces their memory
        model.merge_adapter(safe_merge=safe_merge)
        assert_same(every_answer(model), expected)
        model.unmerge_adapter()
        assert_same(every_answer(model), expected)


@torch.no_grad()
def test_a_narrow_stage_uses_the_leading_rows_and_columns_of_the_factors():
    plain = lively_model()
    model = adapted(copy.deepcopy(plain), lora(["fc1"]))
    layer = model.base_model.model.thinkingvit.layers[1].mlp.fc1
    factor_a, factor_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    hidden_states, base = torch.randn(5, 8), layer.base_layer
    factor_b[32:] = float("inf")  # which the first stage, of 8 channels and 32 of the MLP, does not read
    expected = hidden_states @ base.weight[:32, :8].T + base.bias[:32]
    expected = expected + 2 * hidden_states @ factor_a[:, :8].T @ factor_b[:32].T  # lora_alpha / r = 2
    torch.testing.assert_close(project(layer, hidden_states, 32), expected)


OTHER_METHODS = {
    "dora": lambda: lora(PROJECTIONS, use_dora=True),
    "rslora": lambda: lora(PROJECTIONS, use_rslora=True),
    "lora of patches": lambda: lora(["patch_embeddings", "classifier"]),
    "lora with trained copies": lambda: lora(["fc1", "qkv"], modules_to_save=["classifier"]),
    "lora with bias": lambda: lora(["fc1", "o_proj"], lora_bias=True),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=PROJECTIONS, total_step=10),
    "ia3": lambda: peft.IA3Config(target_modules=PROJECTIONS, feedforward_modules=["fc2"]),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=PROJECTIONS),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=PROJECTIONS),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=PROJECTIONS),  # rotates the input
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=PROJECTIONS),  # rotates the output
    "vera": lambda: peft.VeraConfig(r=4, d_initial=1.0, target_modules=PROJECTIONS),
    "hra": lambda: peft.HRAConfig(r=2, target_modules=PROJECTIONS),
    "norms": lambda: peft.LNTuningConfig(target_modules=["layernorm_before", "layernorm_after"]),
}


@pytest.mark.parametrize("method", OTHER_METHODS)
@pytest.mark.parametrize("make", [lively_model, lambda: lively_swin(qkv_slicing="each_projection")])
@torch.no_grad()
def test_other_methods_equal_the_merged_model_in_every_stage(method, make):
    plain = make()
    assert_equals_merged(adapted(copy.deepcopy(plain), OTHER_METHODS[method]()), plain)


def test_narrow_stages_stay_cheap():
    """The layers within LoRA adapters compute their leading corner; what is left are the thin factors."""
    model, images = lively_model(hidden_size=256), random_images(1)
    plain = [counted_flops(lambda stage=stage: model(images, sub_network=stage)) for stage in range(3)]
    model = adapted(model, lora(r=1))
    found = [counted_flops(lambda stage=stage: model(images, sub_network=stage)) for stage in range(3)]
    assert found[0] < 1.2 * plain[0] and found[1] < 1.1 * plain[1] and found[2] < 1.1 * plain[2]


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_gradients_reach_the_adapters_alone(family):
    model = adapted(EVERY_FAMILY[family](), lora()).train()
    images = random_images()
    shape = (6, 32, 32) if family.startswith("segmentation") else (6,)
    labels = torch.randint(7, shape, generator=torch.Generator().manual_seed(4))
    arguments = {"sub_network": list(range(8 if "dynabert" in family else 4))} if "elastic" in family else {}
    model(images, labels=labels, **arguments).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient and all("lora_" in name for name in with_gradient)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == with_gradient


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    images, labels, gradients = random_images(), torch.arange(6), []
    for checkpointing in (False, True):
        model = lively_model()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model = adapted(model, lora(["q_proj", "fc2"])).train()
        model(images, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient is not None for each in gradients for gradient in each.values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("family", ["thinkingvit", "thinking_swin", "avit", "segmentation"])
@torch.no_grad()
def test_saved_and_loaded(family, tmp_path):
    model = adapted(EVERY_FAMILY[family](), lora(r=2))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    loaded = peft.PeftModel.from_pretrained(EVERY_FAMILY[family](), tmp_path).eval()
    assert_same(every_answer(loaded), every_answer(model))


@torch.no_grad()
def test_folder_of_adapters_loads_by_the_auto_class(tmp_path):
    lively_model().save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model = adapted(base, lora(modules_to_save=["classifier"], target_modules=["q_proj", "fc1"]))
    model.save_pretrained(tmp_path / "adapters")
    assert json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["base_model_name_or_path"]
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "adapters", threshold=0.5)
    assert loaded.config.threshold == 0.5
    loaded.config.threshold = 0.0
    assert_same(every_answer(loaded.eval()), every_answer(model))


@pytest.fixture
def official_adapters(tmp_path):
    """A folder of adapters of an official checkpoint, and the answers of the model that they were saved from."""
    source = FIXTURES / "thinkingvit_3stage"
    base = ThinkingViTForImageClassification.from_pretrained(source, threshold=0.0)
    model = adapted(base, lora(["q_proj", "fc1"], modules_to_save=["classifier"]))
    model.save_pretrained(tmp_path / "adapters")
    with torch.no_grad():
        return tmp_path / "adapters", model(official_images(), output_stage_logits=True).stage_logits


def official_images() -> torch.Tensor:
    return load_file(FIXTURES / "thinkingvit_3stage" / "expected.safetensors")["pixel_values"]


@torch.no_grad()
def test_adapters_of_an_official_checkpoint(official_adapters):
    """Their folder names it: it is converted in memory, and gets the adapters."""
    folder, expected = official_adapters
    model, processor, info = ThinkingViTForImageClassification.from_pretrained_with_processor(
        folder, threshold=0.0, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()) and list(model.peft_config) == ["default"] and not model.training
    assert_same(model(official_images(), output_stage_logits=True).stage_logits, expected)
    assert processor.crop_size.height == 32
    named = ThinkingViTForImageClassification.from_pretrained(folder, threshold=0.5, adapter_name="mine")
    assert list(named.peft_config) == ["mine"] and named.config.threshold == 0.5
    base = ThinkingViTForImageClassification.from_pretrained(FIXTURES / "thinkingvit_3stage", threshold=0.0)
    by_peft = peft.PeftModel.from_pretrained(base, folder)
    assert_same(by_peft(official_images(), output_stage_logits=True).stage_logits, expected)
    by_auto = peft.AutoPeftModel.from_pretrained(folder, import_allowlist=["hf_thinkingvit"])
    assert_same(by_auto(official_images(), threshold=0.0, output_stage_logits=True).stage_logits, expected)


def test_adapters_of_an_official_checkpoint_do_not_get_a_random_base(official_adapters):
    folder, _ = official_adapters
    config = ThinkingViTForImageClassification.from_pretrained(FIXTURES / "thinkingvit_3stage").config
    with pytest.raises(ValueError):  # Transformers' own: Auto classes do not convert
        AutoModelForImageClassification.from_pretrained(folder)
    load = r'`ThinkingViTForImageClassification.from_pretrained\("{}", threshold=0.9\)`'
    for loads, place in ((AutoModelForImageClassification, folder), (ThinkingViTForImageClassification, folder)):
        with pytest.raises(ValueError, match="`config` follows from the files.*" + load.format(place)):
            loads.from_pretrained(folder, config=config)


@torch.no_grad()
def test_processor_of_adapters_is_that_of_their_base(tmp_path):
    lively_model().save_pretrained(tmp_path / "base")
    evaluation_image_processor(32).save_pretrained(tmp_path / "base")
    base = ThinkingViTForImageClassification.from_pretrained(tmp_path / "base")
    model = adapted(base, lora(["q_proj"]))
    model.save_pretrained(tmp_path / "adapters")
    loaded, processor = ThinkingViTForImageClassification.from_pretrained_with_processor(tmp_path / "adapters")
    assert processor.crop_size.height == 32
    assert_same(every_answer(loaded), every_answer(model))


@pytest.mark.skipif(Version(peft.__version__) < Version("0.22"), reason="Transformers adds adapters by newer PEFT")
@torch.no_grad()
def test_adapters_of_transformers_are_saved_alone(tmp_path):
    model = lively_model()
    model.add_adapter(lora(["q_proj", "fc1"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(lively_model(), tmp_path).eval()
    assert_same(every_answer(loaded), every_answer(model))


def test_trainer_trains_the_adapters(tmp_path):
    model = peft.get_peft_model(lively_model(), lora(["q_proj", "v_proj"], modules_to_save=["classifier"]))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    images = random_images(8)
    rows = [{"pixel_values": image, "labels": label % 12} for label, image in enumerate(images)]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=4, learning_rate=0.1, use_cpu=True, report_to="none"
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(tmp_path / "saved")
    loaded = peft.PeftModel.from_pretrained(lively_model(), tmp_path / "saved").eval()
    with torch.no_grad():
        assert_same(every_answer(loaded), every_answer(model.eval()))


@torch.no_grad()
def test_several_adapters():
    model = adapted(lively_model(), lora(["q_proj", "fc1"]))
    first = every_answer(model)
    model.add_adapter("second", lora(["fc2", "fc1"], init_lora_weights=False))
    model.set_adapter("second")
    second = every_answer(model.eval())
    assert (first[0] - second[0]).abs().max() > 1e-3
    model.set_adapter("default")
    assert_same(every_answer(model), first)
    # One adapter for each image of a batch, which only holds while all of them stay.
    images, names = random_images(2), ["default", "second"]
    found = model(images, adapter_names=names, output_stage_logits=True).stage_logits
    for row, expected in ((0, first), (1, second)):
        assert_same([logits[row] for logits in found], [logits[row] for logits in expected[:3]])
    threshold = float(model(images, adapter_names=names, max_stages=1).entropy.mean())  # one leaves, one goes on
    with pytest.raises(ValueError, match="`adapter_names` should be the same as the number of inputs"):
        model(images, adapter_names=names, threshold=[threshold, 0.0])


@pytest.mark.slow
@torch.no_grad()
def test_compiled_stages_notice_adapters():
    model, images = lively_model(num_hidden_layers=1, thinking_stages=[2, 4]), random_images(2)
    model.compile_stages([2], backend="eager")
    plain = model(images, max_stages=1).logits
    wrapped = adapted(model, lora(["q_proj"]))
    found = wrapped(images, max_stages=1).logits
    assert (found - plain).abs().max() > 1e-3
    with wrapped.disable_adapter():
        torch.testing.assert_close(wrapped(images, max_stages=1).logits, plain)
    model.compile_stages(None)
    torch.testing.assert_close(wrapped(images, max_stages=1).logits, found)


@torch.no_grad()
def test_engine_runs_the_adapters():
    model, images = adapted(lively_model(), lora()), random_images(8)
    expected = model(images, threshold=[1.5, 1.5])
    results = list(AdaptiveEngine(model, batch_size=3, threshold=[1.5, 1.5])(images))
    assert [result.exit_stage for result in results] == expected.exit_stage.tolist()
    torch.testing.assert_close(torch.stack([result.logits for result in results]), expected.logits)


def test_adaptive_pipeline_runs_the_adapters():
    model, image = adapted(lively_model(), lora()), Image.new("RGB", (40, 32), (200, 90, 10))
    arguments = {"image_processor": evaluation_image_processor(32), "top_k": 1}
    classifier = pipeline("adaptive-image-classification", model=model, **arguments)
    adapted_score = classifier([image, image], threshold=0.0)[1][0]["score"]
    expected = pipeline("adaptive-image-classification", model=copy.deepcopy(model).merge_and_unload(), **arguments)
    assert adapted_score == pytest.approx(expected(image, threshold=0.0)[0]["score"], abs=1e-5)
    with model.disable_adapter():
        assert classifier(image, threshold=0.0)[0]["score"] != pytest.approx(adapted_score, abs=1e-3)


@pytest.mark.parametrize("make", [lively_model, lively_avit])
@torch.no_grad()
def test_in_half_precision(make):
    model = adapted(make(), lora(["q_proj", "fc1"]))
    expected = every_answer(model)[0]
    half = every_answer(model.to(torch.bfloat16), random_images().to(torch.bfloat16))[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.1 * float(expected.abs().max()), rtol=0)
