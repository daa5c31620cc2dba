import pytest
import torch
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_thinkingvit import AViTForImageClassification, ThinkingViTForImageClassification
from tests.utils import lively_model, perturbed, random_images


def trained_vit(kind: str = "vit", **overrides):
    """A ViT or DeiT classifier with weights large enough to show in the logits."""
    config_class, model_class = {
        "vit": (ViTConfig, ViTForImageClassification),
        "deit": (DeiTConfig, DeiTForImageClassification),
        "deit_with_teacher": (DeiTConfig, DeiTForImageClassificationWithTeacher),
    }[kind]
    fields = {
        "hidden_size": 24,
        "num_attention_heads": 3,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "image_size": 32,
        "patch_size": 8,
        "id2label": {0: "cat", 1: "dog", 2: "owl"},
        "label2id": {"cat": 0, "dog": 1, "owl": 2},
    }
    return perturbed(model_class(config_class(**{**fields, **overrides})))


@pytest.mark.parametrize("kind", ["vit", "deit"])
@pytest.mark.parametrize("stages", [None, [3], [3, 3], [3, 6], [3, 5, 9]])
@torch.no_grad()
def test_first_stage_answers_as_the_source(kind, stages):
    vit, pixel_values = trained_vit(kind), random_images()
    model = ThinkingViTForImageClassification.from_vit(vit, stages).eval()
    assert model.config.thinking_stages == (stages or [3, 6])
    outputs = model(pixel_values, max_stages=1)
    torch.testing.assert_close(outputs.logits, vit(pixel_values).logits, atol=1e-5, rtol=0)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}


@pytest.mark.parametrize("kind", ["vit", "deit"])
@torch.no_grad()
def test_a_source_of_full_width_fills_the_whole_model(kind):
    vit, pixel_values = trained_vit(kind), random_images()
    model = ThinkingViTForImageClassification.from_vit(vit, thinking_stages=[1, 2, 3]).eval()
    # α is 0, so the last stage is the source.
    torch.testing.assert_close(model(pixel_values, threshold=0.0).logits, vit(pixel_values).logits, atol=1e-5, rtol=0)
    last = model.extract_stage(2).state_dict()
    assert all(torch.equal(last[name], tensor) for name, tensor in vit.state_dict().items())


@torch.no_grad()
def test_a_source_as_wide_as_a_middle_stage():
    vit, pixel_values = trained_vit(), random_images()
    model = ThinkingViTForImageClassification.from_vit(vit, thinking_stages=[1, 3, 4]).eval()
    logits = model(pixel_values, threshold=0.0, max_stages=2).logits
    torch.testing.assert_close(logits, vit(pixel_values).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_settings_of_the_source_carry_over_and_overrides_win():
    vit = trained_vit(
        qkv_bias=False, hidden_act="gelu_new", layer_norm_eps=1e-3, num_channels=1, hidden_dropout_prob=0.1
    )
    model = ThinkingViTForImageClassification.from_vit(vit, [3, 6], threshold=0.7, hidden_dropout_prob=0.0).eval()
    config = model.config
    assert (config.qkv_bias, config.hidden_act, config.layer_norm_eps, config.num_channels) == (
        False,
        "gelu_new",
        1e-3,
        1,
    )
    assert (config.threshold, config.hidden_dropout_prob, config.intermediate_size) == (0.7, 0.0, 96)
    pixel_values = random_images()[:, :1]
    torch.testing.assert_close(model(pixel_values, max_stages=1).logits, vit(pixel_values).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["vit", "deit"])
@torch.no_grad()
def test_from_a_folder(kind, tmp_path):
    vit, pixel_values = trained_vit(kind), random_images()
    vit.save_pretrained(tmp_path)
    model = ThinkingViTForImageClassification.from_vit(tmp_path).eval()
    torch.testing.assert_close(model(pixel_values, max_stages=1).logits, vit(pixel_values).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("distillation_token", [False, True])
@torch.no_grad()
def test_extracted_first_stage_is_a_plain_vit_with_the_same_logits(distillation_token, tmp_path):
    model, pixel_values = lively_model(use_distillation_token=distillation_token), random_images()
    vit = model.extract_stage(0)
    assert type(vit) is (DeiTForImageClassification if distillation_token else ViTForImageClassification)
    assert not vit.training
    vit.save_pretrained(tmp_path)
    vit = type(vit).from_pretrained(tmp_path)
    expected = model(pixel_values, max_stages=1).logits
    torch.testing.assert_close(vit(pixel_values).logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_extracted_later_stage_is_the_stage_without_recycling():
    model, pixel_values = lively_model(), random_images()
    for recycler in model.thinkingvit.recyclers:
        recycler.alpha.zero_()
    for stage in range(3):
        expected = model(pixel_values, threshold=0.0, max_stages=stage + 1).logits
        torch.testing.assert_close(model.extract_stage(stage)(pixel_values).logits, expected, atol=1e-5, rtol=0)


def test_there_and_back_changes_no_weight():
    vit = trained_vit()
    back = ThinkingViTForImageClassification.from_vit(vit, [3, 6]).extract_stage(0).state_dict()
    assert back.keys() == vit.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in vit.state_dict().items())


def test_refuses_stages_that_are_no_list():
    with pytest.raises(ValueError, match="`thinking_stages`"):
        ThinkingViTForImageClassification.from_vit(trained_vit(), 3)


def test_refuses_a_source_wider_than_every_stage():
    with pytest.raises(ValueError, match=r"`thinking_stages` \(\[1, 2\]\) must have a stage of 3 heads or more"):
        ThinkingViTForImageClassification.from_vit(trained_vit(), [1, 2])


def test_a_source_between_two_stages_fills_the_leading_channels():
    vit = trained_vit()
    model = ThinkingViTForImageClassification.from_vit(vit, [2, 6])
    weight = vit.classifier.weight
    assert torch.equal(model.classifier.weight[:, : weight.shape[1]], weight)


def test_refuses_other_models(tmp_path):
    with pytest.raises(ValueError, match="Expected a `ViTForImageClassification`.*got ResNetForImageClassification"):
        ThinkingViTForImageClassification.from_vit(ResNetForImageClassification(ResNetConfig()))
    with pytest.raises(ValueError, match="no classification head"):
        ThinkingViTForImageClassification.from_vit(trained_vit(num_labels=0, id2label={}, label2id={}))
    ViTModel(trained_vit().config).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"no complete image classifier.*classifier\.bias"):
        ThinkingViTForImageClassification.from_vit(tmp_path / "bare")
    trained_vit("deit_with_teacher").save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="got DeiTForImageClassificationWithTeacher"):
        ThinkingViTForImageClassification.from_vit(tmp_path / "teacher")


@pytest.mark.parametrize(
    "overrides",
    [
        {"hidden_size": 96},
        {"num_attention_heads": 12},
        {"num_hidden_layers": 3},
        {"image_size": 64},
        {"qkv_bias": False},
        {"use_distillation_token": True},
    ],
)
def test_refuses_overrides_of_what_the_weights_fix(overrides):
    with pytest.raises(ValueError, match=f"`{next(iter(overrides))}` cannot be overridden"):
        ThinkingViTForImageClassification.from_vit(trained_vit(), [3, 6], **overrides)


def from_thinkingvit(vit, **overrides):
    return ThinkingViTForImageClassification.from_vit(vit, [3, 6], **overrides)


START = {"thinkingvit": from_thinkingvit, "avit": AViTForImageClassification.from_vit}


@pytest.mark.parametrize("start", START.values(), ids=START)
@pytest.mark.parametrize("kind", ["vit", "deit"])
class TestLabels:
    """With another number of labels than the source: its backbone weights, and a new classifier."""

    @pytest.mark.parametrize(
        "overrides, id2label",
        [
            ({"num_labels": 5}, {index: f"LABEL_{index}" for index in range(5)}),
            ({"id2label": {0: "a", 1: "b"}}, {0: "a", 1: "b"}),
            ({"label2id": {"b": 1, "a": 0}}, {0: "a", 1: "b"}),
            ({"num_labels": 2, "id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}, {0: "a", 1: "b"}),
        ],
        ids=["num_labels", "id2label", "label2id", "all"],
    )
    @torch.no_grad()
    def test_another_number(self, start, kind, overrides, id2label, caplog):
        torch.manual_seed(0)
        vit = trained_vit(kind).double()
        model = start(vit, **overrides)
        assert model.config.id2label == id2label
        assert model.config.label2id == {label: index for index, label in id2label.items()}
        assert (model.dtype, model.training, model.num_labels) == (torch.float64, False, len(id2label))
        heads = [name for name, _ in model.named_parameters() if "classifier." in name]
        for name in heads:
            head = model.get_parameter(name)
            assert head.shape[0] == len(id2label)
            assert head.dim() == 1 or 0.01 < head.std() < 0.03  # as initialised, `initializer_range` 0.02
        body = dict(model.base_model.named_parameters())
        for name, parameter in vit.base_model.named_parameters():
            ours = body[name.replace("patch_embeddings.projection.", "patch_embeddings.")]
            assert torch.equal(ours[tuple(slice(size) for size in parameter.shape)], parameter)
        assert model(random_images().double()).logits.shape == (6, len(id2label))
        warning = f"Some weights of {type(model).__name__} were not initialized from the given {type(vit).__name__}"
        (message,) = (record.getMessage() for record in caplog.records if "newly initialized" in record.getMessage())
        assert message.startswith(warning) and "TRAIN this model" in message
        assert all(name in message for name in heads) and "embeddings" not in message

    @pytest.mark.parametrize("overrides", [{"num_labels": 3}, {"id2label": {0: "a", 1: "b", 2: "c"}}], ids=str)
    @torch.no_grad()
    def test_the_same_number_keeps_the_classifier(self, start, kind, overrides, caplog):
        vit = trained_vit(kind)
        model = start(vit, **overrides)
        expected = overrides.get("id2label", vit.config.id2label)
        assert model.config.id2label == expected
        assert model.config.label2id == {label: index for index, label in expected.items()}
        assert torch.equal(model.classifier.weight[:, :24], vit.classifier.weight)
        assert "newly initialized" not in caplog.text

    def test_refuses_labels_that_contradict_each_other(self, start, kind):
        vit = trained_vit(kind)
        with pytest.raises(ValueError, match=r"`num_labels` is 5, but `id2label` or `label2id` names 2 classes"):
            start(vit, num_labels=5, id2label={0: "a", 1: "b"})
        with pytest.raises(ValueError, match=r"must number the classes from 0 to 1, got \[1, 2\]"):
            start(vit, id2label={1: "a", 2: "b"})
        with pytest.raises(ValueError, match=r"contradict each other: 'b' is class 0"):
            start(vit, id2label={0: "a", 1: "b"}, label2id={"b": 0, "a": 1})

    @torch.no_grad()
    def test_a_source_without_classifier(self, start, kind, tmp_path):
        """For example a pretrained ViT that is not fine-tuned yet."""
        vit = trained_vit(kind)
        vit.base_model.save_pretrained(tmp_path / "bare")
        with pytest.raises(ValueError, match=r"lacks \['classifier.bias', 'classifier.weight'\].*or pass `num_labels`"):
            start(tmp_path / "bare")
        for source in (tmp_path / "bare", trained_vit(kind, num_labels=0, id2label={}, label2id={})):
            model = start(source, num_labels=7)
            assert model(random_images()).logits.shape == (6, 7)
        layer = start(tmp_path / "bare", num_labels=7).base_model.layers[0]
        assert torch.equal(layer.mlp.fc1.weight[:48, :24], vit.base_model.layers[0].mlp.fc1.weight)


@pytest.mark.parametrize("training", [True, False])
def test_takes_the_mode_of_the_source(training):
    assert ThinkingViTForImageClassification.from_vit(trained_vit().train(training)).training == training


@pytest.mark.parametrize("stage_index", [3, -1, 1.0, True])
def test_refuses_a_stage_that_is_not_there(stage_index):
    with pytest.raises(ValueError, match="`stage_index` must be an integer from 0 to 2"):
        lively_model().extract_stage(stage_index)
