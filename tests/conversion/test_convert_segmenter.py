"""Official segmentation checkpoints: every golden number, and files that cannot be trusted."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from hf_thinkingvit import convert_checkpoint
from hf_thinkingvit.conversion.checkpoint import read_checkpoint
from hf_thinkingvit.conversion.convert import load_official
from hf_thinkingvit.models.task_segmentation import resize_logits
from tests.conversion.segmenter_files import write_official
from tests.utils import FIXTURES


GOLDENS = ["seg_linear", "seg_mask"]


@pytest.fixture(params=GOLDENS)
def golden(request):
    return request.param


def expected_of(golden):
    return load_file(FIXTURES / golden / "expected.safetensors")


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prefix", ["", "padded."])
@torch.no_grad()
def test_golden_answers_and_exits(golden, prefix, tmp_path):
    model = load_official(read_checkpoint(write_official(golden, tmp_path)))
    assert model.config.hidden_size == 32 and model.config.thinking_stages == [1, 2]
    expected = {
        name.removeprefix(prefix): tensor for name, tensor in expected_of(golden).items() if name.startswith(prefix)
    }
    pixel_values = expected["pixel_values"]
    outputs = model(pixel_values, output_stage_logits=True, threshold=0.0)
    for stage in range(2):
        assert_near(outputs.stage_logits[stage], expected[f"stage{stage}.patch_logits"])
        alone = model(pixel_values, max_stages=stage + 1)
        assert_near(alone.logits, expected[f"stage{stage}.patch_logits"])
    assert_near(model(pixel_values, max_stages=1).entropy, expected["stage0.entropy"])
    assert_near(outputs.entropy, expected["stage1.entropy"])
    assert_near(resize_logits(outputs.logits, (8, 8), pixel_values.shape[2:]), expected["stage1.logits"])
    if not prefix:
        for stage in range(2):
            tokens = model.base_model(pixel_values, max_stages=stage + 1).last_hidden_state
            assert_near(tokens, expected[f"stage{stage}.last_hidden_state"])
    names = [name for name in expected if name.startswith("threshold.") and name.endswith(".stage")]
    assert len(names) == (3 if prefix else 4)
    for name in names:
        threshold = float(name.removeprefix("threshold.").removesuffix(".stage"))
        # Some τ are an image's own entropy, which does not exit; the file's names round them, maybe upwards.
        outputs = model(pixel_values, threshold=max(threshold - 5e-6, 0.0))
        assert torch.equal(outputs.exit_stage, expected[name])
        logits = [expected[f"stage{stage}.patch_logits"][row] for row, stage in enumerate(expected[name].tolist())]
        assert_near(outputs.logits, torch.stack(logits))


def test_golden_loss_and_gradients(golden, tmp_path):
    model = load_official(read_checkpoint(write_official(golden, tmp_path)), decoder_dropout_prob=0.0).train()
    expected = expected_of(golden)
    outputs = model(expected["pixel_values"], labels=expected["train.labels"])
    outputs.loss.backward()
    assert_near(outputs.loss, expected["train.loss"][0])
    for stage, logits in enumerate(outputs.stage_logits):
        loss = model.loss_function(expected["train.labels"], logits, model.config)
        assert_near(loss, expected["train.stage_losses"][stage])
    parameters, width = dict(model.named_parameters()), model.config.hidden_size
    alpha, cls_token = (
        parameters[f"thinkingvit.{name}"].grad for name in ("recyclers.0.alpha", "embeddings.cls_token")
    )
    assert_near(alpha, expected["train.grad.encoder._thinking_alphas.0"])
    assert_near(cls_token, expected["train.grad.encoder.cls_token"][..., :width])
    if golden == "seg_linear":
        assert_near(parameters["decoder.head.weight"].grad, expected["train.grad.decoder.head.weight"][:, :width])
    else:
        assert_near(parameters["decoder.class_embeddings"].grad, expected["train.grad.decoder.cls_emb"])


@torch.no_grad()
def test_a_converted_folder_loads_and_answers_alike(golden, tmp_path):
    source = write_official(golden, tmp_path / "official", threshold=1.5)
    model = convert_checkpoint(source, tmp_path / "converted")
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "converted")
    pixel_values = expected_of(golden)["padded.pixel_values"]
    torch.testing.assert_close(loaded(pixel_values).logits, model(pixel_values).logits, atol=0, rtol=0)
    assert loaded.config.threshold == 1.5 and loaded.config.exit_criterion == "mean_pixel_entropy"
    assert loaded.config.layer_norm_eps == 1e-5 and loaded.config.position_interpolation == "bilinear"
    assert "somebody" not in (tmp_path / "converted" / "config.json").read_text()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "converted")
    assert dict(processor.size) == {"height": 32, "width": 32}
    assert processor.image_mean == pytest.approx([123.68 / 255, 116.28 / 255, 103.53 / 255])


def test_a_bare_file_whose_widths_do_not_tell_the_heads_is_refused(tmp_path):
    folder = write_official("seg_linear", tmp_path)
    (folder / "variant.yml").unlink()
    with pytest.raises(ValueError, match=r"stages of \[16, 32\] channels.*thinking_stages"):
        load_official(read_checkpoint(folder))


@torch.no_grad()
def test_zero_alphas_are_loaded_as_they_are_and_reported(tmp_path, caplog):
    def without_recycling(state_dict):
        return {**state_dict, "encoder._thinking_alphas.0": torch.zeros(1)}

    model = load_official(read_checkpoint(write_official("seg_linear", tmp_path, change=without_recycling)))
    assert model.thinkingvit.recyclers[0].alpha.item() == 0.0
    assert "every α of token recycling is 0" in caplog.text


@torch.no_grad()
def test_upstream_segmenter_is_one_stage_of_full_width(golden, tmp_path):
    """Without token recycling: its answer is that of the last stage alone, at full width."""

    def upstream(state_dict):
        return {name: tensor for name, tensor in state_dict.items() if "_thinking_" not in name}

    folder = write_official(golden, tmp_path, change=upstream)
    text = (folder / "variant.yml").read_text().replace("  stages: [1, 2]\n", "")
    (folder / "variant.yml").write_text(text.replace("n_cls:", "normalization: vit\n  n_cls:"))
    model = convert_checkpoint(folder, tmp_path / "converted")
    assert model.config.thinking_stages == [4] and model.config.hidden_size == 64
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "converted").image_mean) == [0.5, 0.5, 0.5]
    with_stages = load_official(read_checkpoint(write_official(golden, tmp_path / "staged")))
    pixel_values = expected_of(golden)["pixel_values"]
    narrow = load_official(read_checkpoint(folder), thinking_stages=[2])
    expected = with_stages(pixel_values, sub_network=1).logits
    torch.testing.assert_close(narrow(pixel_values).logits, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("net_kwargs: !!python/object/apply:os.system ['true']\n", "plain YAML"),
        ("net_kwargs: [1, 2]\n", "a section `net_kwargs`"),
        ("- 1\n", "a section `net_kwargs`"),
        ("net_kwargs: {\n", "plain YAML"),
    ],
)
def test_a_yaml_that_is_not_plain_is_refused(tmp_path, text, message):
    folder = write_official("seg_linear", tmp_path)
    (folder / "variant.yml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  n_heads: 4\n", "  n_heads: '12'\n", r"net_kwargs\.n_heads.*positive integer, got '12'"),
        ("  n_heads: 4\n", "  n_heads: -3\n", r"net_kwargs\.n_heads.*positive integer, got -3"),
        ("threshold: 0.5", "threshold: '0.3'", r"threshold.*number.*got '0\.3'"),
        ("loss_weights: null", "loss_weights: [a, a]", r"loss_weights.*2 numbers.*got \['a', 'a'\]"),
        ("loss_weights: null", "loss_weights: [1, 1, 1]", r"loss_weights.*2 numbers.*got \[1, 1, 1\]"),
        ("    dropout: 0.1", "    dropout: often", r"decoder\.dropout.*got 'often'"),
        ("  n_cls:", "  normalization: [a]\n  n_cls:", r"normalization.*'deit', 'vit'.*got \['a'\]"),
    ],
)
def test_a_value_of_the_yaml_that_does_not_fit_is_refused(old, new, message, tmp_path):
    folder = write_official("seg_mask", tmp_path / "official")
    text = (folder / "variant.yml").read_text()
    assert old in text
    (folder / "variant.yml").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(folder, tmp_path / "converted")


def test_exits_dropout_and_normalisation_of_the_yaml(tmp_path):
    folder = write_official("seg_mask", tmp_path / "official")
    text = (folder / "variant.yml").read_text().replace("threshold: 0.5", "threshold: [0.3]")
    text = text.replace("loss_weights: null", "loss_weights: [1, 3]")
    (folder / "variant.yml").write_text(text.replace("  n_cls:", "  normalization: deit\n  n_cls:"))
    config = convert_checkpoint(folder, tmp_path / "converted").config
    assert (config.threshold, config.stage_loss_weights) == ([0.3], [0.25, 0.75])
    assert config.decoder_dropout_prob == 0.1
    mean = AutoImageProcessor.from_pretrained(tmp_path / "converted").image_mean
    assert [255 * value for value in mean] == pytest.approx([123.68, 116.28, 103.53], abs=1e-4)


def test_a_missing_tensor_is_named(tmp_path):
    def incomplete(state_dict):
        return {name: tensor for name, tensor in state_dict.items() if name != "decoder.mask_norm.bias"}

    with pytest.raises(ValueError, match=r"Missing keys: decoder\.mask_norm\.bias"):
        load_official(read_checkpoint(write_official("seg_mask", tmp_path, change=incomplete)))


def test_a_stage_wider_than_the_container_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"stages of \[1, 5\] heads"):
        load_official(read_checkpoint(write_official("seg_linear", tmp_path)), thinking_stages=[1, 5])
