"""Quantised models: every stage answers nearly as before, or the quantiser is refused before it leaves layers out."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, BitsAndBytesConfig, QuantoConfig, TorchAoConfig
from transformers.models.vit.modeling_vit import ViTForImageClassification

from hf_thinkingvit import ThinkingViTForSemanticSegmentation
from hf_thinkingvit.inference import AdaptiveEngine
from tests.models.every_family import EVERY_CLASS, EVERY_FAMILY, every_answer
from tests.utils import lively_model, lively_swin, random_images


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SIMILAR = 0.06  # norm of the difference, relative to that of the logits


def assert_similar(found: list[torch.Tensor], expected: list[torch.Tensor], similar: float = SIMILAR) -> None:
    """Nearly the same answers of every stage, but not those of unquantised weights."""
    for ours, theirs in zip(found, expected, strict=True):
        assert 1e-4 < (ours - theirs).norm() / theirs.norm() < similar


def similar_of(family: str) -> float:
    """Where patches with nearly the same score are kept or removed, rounding decides."""
    return 0.2 if "pruned" in family else SIMILAR


def loaded(model, folder, quantization):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)


@pytest.fixture
def int8():
    return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())


@pytest.mark.parametrize("family", EVERY_FAMILY)
@torch.no_grad()
def test_torchao_int8_weights(family, int8, tmp_path):
    model = EVERY_FAMILY[family]()
    quantized = loaded(model, tmp_path, int8)
    plain = [
        name
        for name, module in quantized.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module.weight) is torch.nn.Parameter
    ]
    # As of any model, Transformers leaves the last module in order, the head, as it is.
    assert all(name.rpartition(".")[0] in ("", "decoder") or "class" in name for name in plain)
    assert_similar(every_answer(quantized), every_answer(model), similar_of(family))


@pytest.mark.parametrize("make", [lively_model, lambda: lively_swin(qkv_slicing="each_projection")])
@torch.no_grad()
def test_torchao_int8_activations(make, int8, tmp_path):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    quantized = loaded(make(), tmp_path, TorchAoConfig(Int8DynamicActivationInt8WeightConfig()))
    assert_similar(every_answer(quantized), every_answer(make()))


@pytest.mark.parametrize(
    "family", ["thinkingvit", "thinking_swin", "thinking_swin official", "elastic_vit dynabert", "segmentation"]
)
@torch.no_grad()
def test_weights_that_cannot_be_cut_are_used_whole(family, int8, tmp_path):
    """torchao cuts this layout between blocks only, and a block is a row of the whole matrix."""
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis

    model = EVERY_FAMILY[family]()
    quantization = TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)))
    quantized = loaded(model, tmp_path, quantization)
    found = every_answer(quantized)
    assert_similar(found, every_answer(model))
    for module in quantized.modules():
        if isinstance(module, torch.nn.Linear) and type(module.weight) is not torch.nn.Parameter:
            module.weight = torch.nn.Parameter(module.weight.dequantize(), requires_grad=False)
    for ours, theirs in zip(found, every_answer(quantized), strict=True):  # by leading corners of the rounded weights
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_quantised_after_loading():
    quantization = pytest.importorskip("torchao.quantization")
    model = lively_model()
    expected = every_answer(model)  # which caches views of the weights
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert_similar(every_answer(model), expected)


@torch.no_grad()
def test_saved_and_loaded_again(int8, tmp_path):
    quantized = loaded(lively_model(), tmp_path / "plain", int8)
    quantized.save_pretrained(tmp_path / "quantized")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "quantized", threshold=0.5).eval()
    assert again.config.threshold == 0.5
    again.config.threshold = 0.0
    for ours, theirs in zip(every_answer(again), every_answer(quantized), strict=True):
        torch.testing.assert_close(ours, theirs)
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "quantized" / "model.safetensors").values()}
    assert torch.int8 in dtypes


@pytest.mark.parametrize("family", EVERY_CLASS)
@torch.no_grad()
def test_what_was_loaded_quantised_is_saved_again(family, int8, tmp_path):
    quantized = loaded(EVERY_FAMILY[family](), tmp_path / "plain", int8)
    expected = every_answer(quantized)
    for name in ("first", "second"):
        quantized.save_pretrained(tmp_path / name)
        quantized = type(quantized).from_pretrained(tmp_path / name)
    for ours, theirs in zip(every_answer(quantized), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def by_torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def by_optimum(model):
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


@pytest.mark.parametrize("quantise", [by_torchao, by_optimum])
def test_what_was_quantised_after_loading_is_not_saved(quantise, tmp_path):
    model, library = lively_model(), quantise.__name__.removeprefix("by_")
    quantise(model)
    with pytest.raises(ValueError, match=f"as {library} quantised them, cannot be saved.*quantization_config"):
        model.save_pretrained(tmp_path / "quantized")
    assert not (tmp_path / "quantized").exists()


@torch.no_grad()
def test_engine(int8, tmp_path):
    quantized, images = loaded(lively_model(), tmp_path, int8), random_images(8)
    expected = quantized(images, threshold=[1.5, 1.5])
    results = list(AdaptiveEngine(quantized, batch_size=3, threshold=[1.5, 1.5])(images))
    assert [result.exit_stage for result in results] == expected.exit_stage.tolist()


@torch.no_grad()
def test_lora_on_quantised_weights(int8, tmp_path):
    peft = pytest.importorskip("peft")
    quantized = loaded(lively_model(), tmp_path, int8)
    before = every_answer(quantized)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    adapted = peft.get_peft_model(quantized, config).eval()
    expected = every_answer(adapted)
    assert all((ours - theirs).abs().max() > 1e-2 for ours, theirs in zip(expected, before))
    for ours, theirs in zip(every_answer(adapted.merge_and_unload()), expected, strict=True):  # quantised again
        assert (ours - theirs).norm() / theirs.norm() < SIMILAR


@pytest.mark.parametrize("family", EVERY_FAMILY)
@torch.no_grad()
def test_quanto(family, tmp_path):
    """It replaces the nested layers, also of Swin, whose rows of queries, keys and values the new ones do not know."""
    pytest.importorskip("optimum.quanto")
    model = EVERY_FAMILY[family]()
    quantized = loaded(model, tmp_path, QuantoConfig(weights="int8"))
    assert_similar(every_answer(quantized), every_answer(model), similar_of(family))
    with pytest.raises(ValueError, match="as quanto quantised them, cannot be saved. Save the model before it is"):
        quantized.save_pretrained(tmp_path / "quantized")
    assert not (tmp_path / "quantized").exists()


def test_mean_macs_of_avit_are_those_of_its_sizes(int8, tmp_path):
    model, images = EVERY_FAMILY["avit"](), random_images()
    quantized = loaded(model, tmp_path, int8)
    with torch.no_grad():
        same = model(images).mean_depth == quantized(images).mean_depth
        assert same.any() and torch.equal(quantized(images).macs[same], model(images).macs[same])


REFUSED = {
    "bitsandbytes": BitsAndBytesConfig(load_in_8bit=True),
    "hqq": {"quant_method": "hqq"},
    "gptq": {"quant_method": "gptq", "bits": 4},
}


@pytest.mark.parametrize("method", REFUSED)
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_other_quantisers_are_refused(family, method):
    model = EVERY_FAMILY[family]()
    config = copy.deepcopy(model.config)
    config.quantization_config = REFUSED[method]
    for model_class in (type(model), type(model.base_model)):
        with pytest.raises(ValueError, match=f"{model_class.__name__} cannot be quantised by '{method}'.*torchao"):
            model_class(config)


def test_bitsandbytes_is_refused_at_load_time(tmp_path):
    pytest.importorskip("bitsandbytes")
    lively_model().save_pretrained(tmp_path)
    for quantization in (BitsAndBytesConfig(load_in_8bit=True), BitsAndBytesConfig(load_in_4bit=True)):
        with pytest.raises(ValueError, match="cannot be quantised by 'bitsandbytes'"):
            AutoModelForImageClassification.from_pretrained(tmp_path, quantization_config=quantization)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_torchs_own_quantisation_is_refused(family):
    quantization, model = pytest.importorskip("torch.ao.quantization"), EVERY_FAMILY[family]()
    with warnings.catch_warnings(), pytest.raises(ValueError, match="Use torchao instead"):
        warnings.simplefilter("ignore")
        quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("part", ["thinkingvit.layers", "thinkingvit.layers.0.mlp.fc1", "classifier"])
def test_torchs_own_quantisation_of_a_part_is_refused(part):
    quantization, layers = pytest.importorskip("torch.ao.quantization"), lively_model().get_submodule(part)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="hardly anything of NestedL.*Use torchao instead"):
        warnings.simplefilter("ignore")
        quantization.quantize_dynamic(layers, {torch.nn.Linear}, dtype=torch.qint8)


def test_other_models_start_from_plain_weights_only(int8, tmp_path):
    quantized = loaded(lively_model(), tmp_path, int8)
    with pytest.raises(ValueError, match="no plain parameters, but quantised.*without quantisation"):
        quantized.extract_stage(0)
    with pytest.raises(ValueError, match="no plain parameters, but quantised.*without quantisation"):
        ThinkingViTForSemanticSegmentation.from_thinkingvit(quantized, num_labels=3)
    assert isinstance(lively_model().extract_stage(0), ViTForImageClassification)
