"""Pooled features of the bare models: what the classifiers read, of each stage, and by Transformers' own pipeline."""

import logging

import pytest
import torch
from PIL import Image
from transformers import AutoModel, pipeline

from hf_thinkingvit.image_processing import evaluation_image_processor
from tests.models.every_family import EVERY_FAMILY
from tests.utils import lively_model, lively_swin, random_images


STAGED = ["thinkingvit", "thinkingvit pruned", "thinking_swin", "thinking_swin official"]
CLASSIFIERS = [family for family in EVERY_FAMILY if not family.startswith("segmentation")]


@pytest.mark.parametrize("family", STAGED)
@torch.no_grad()
def test_pooled_features_of_a_stage_are_what_its_classifier_reads(family):
    model, images = EVERY_FAMILY[family](), random_images()
    logits = model(images, output_stage_logits=True).stage_logits
    for stage, expected in enumerate(logits):
        outputs = model.base_model(images, max_stages=stage + 1)
        assert outputs.pooler_output.shape == (6, outputs.last_hidden_state.shape[-1])
        torch.testing.assert_close(model.classifier(outputs.pooler_output), expected)
        alone = model.base_model(images, sub_network=stage).pooler_output
        torch.testing.assert_close(model.classifier(alone), model(images, sub_network=stage).logits)


@pytest.mark.parametrize("family", ["elastic_vit hydravit", "elastic_vit dynabert", "elastic_vit separate"])
@torch.no_grad()
def test_pooled_features_of_a_sub_network(family):
    model, images = EVERY_FAMILY[family](), random_images()
    for number in range(len(model.config.networks)):
        pooled = model.base_model(images, sub_network=number).pooler_output
        torch.testing.assert_close(model.classifier_of(number)(pooled), model(images, sub_network=number).logits)


@pytest.mark.parametrize("family", ["early_exit_vit", "early_exit_vit layers", "avit", "avit distilled"])
@torch.no_grad()
def test_pooled_features_of_models_of_one_width(family):
    model, images = EVERY_FAMILY[family](), random_images()
    pooled, outputs = model.base_model(images).pooler_output, model(images)
    expected = outputs.cls_logits if family.endswith("distilled") else outputs.logits
    torch.testing.assert_close(model.classifier(pooled), expected, atol=1e-5, rtol=1e-5)
    if family.startswith("early"):
        shallow = model.base_model(images, max_stages=1)
        assert torch.equal(shallow.pooler_output, shallow.last_hidden_state[:, 0])
        assert not torch.allclose(shallow.pooler_output, pooled)


@pytest.mark.parametrize("family", CLASSIFIERS)
@torch.no_grad()
def test_pipeline(family, tmp_path, caplog):
    model, image = EVERY_FAMILY[family](), Image.new("RGB", (40, 36), (180, 60, 20))
    model.save_pretrained(tmp_path)
    processor = evaluation_image_processor(32)
    processor.save_pretrained(tmp_path)
    with caplog.at_level(logging.ERROR):
        extractor = pipeline("image-feature-extraction", model=str(tmp_path))
    assert "not supported" not in caplog.text
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    expected = model.base_model(pixel_values)
    torch.testing.assert_close(extractor(image, pool=True, return_tensors=True), expected.pooler_output)
    torch.testing.assert_close(extractor(image, return_tensors=True), expected.last_hidden_state)
    (pooled,) = extractor(image, pool=True)
    assert isinstance(pooled, list) and len(pooled) == expected.pooler_output.shape[1]


@pytest.mark.parametrize("make", [lively_model, lively_swin])
@torch.no_grad()
def test_pipeline_of_a_stage(make, tmp_path):
    model, image = make(), Image.new("RGB", (32, 32), (180, 60, 20))
    model.save_pretrained(tmp_path)
    evaluation_image_processor(32).save_pretrained(tmp_path)
    pixel_values = evaluation_image_processor(32)(image, return_tensors="pt")["pixel_values"]
    for stage in range(3):
        arguments = {"model": str(tmp_path), "model_kwargs": {"out_stage": stage}}
        extractor = pipeline("image-feature-extraction", **arguments)
        expected = model.base_model(pixel_values, max_stages=stage + 1).pooler_output
        torch.testing.assert_close(extractor(image, pool=True, return_tensors=True), expected)
    bare = AutoModel.from_pretrained(tmp_path, out_stage=0)
    full = model.base_model(pixel_values).pooler_output
    torch.testing.assert_close(bare(pixel_values, max_stages=3).pooler_output, full)  # an argument wins
    head = type(model).from_pretrained(tmp_path, out_stage=0)  # whose heads do not read the field
    assert torch.equal(head(pixel_values).logits, model(pixel_values).logits)


@torch.no_grad()
def test_segmentation_backbone_has_features_too():
    model, images = EVERY_FAMILY["segmentation"](), random_images()
    assert model.base_model(images).pooler_output.shape == (6, 32)


@torch.no_grad()
def test_as_a_tuple():
    model, images = lively_model(), random_images()
    expected = model.base_model(images)
    tokens, pooled = model.base_model(images, return_dict=False)
    assert torch.equal(tokens, expected.last_hidden_state) and torch.equal(pooled, expected.pooler_output)
