"""Transformers' own segmentation pipeline, and the image processor of segmentation models."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, pipeline

from hf_thinkingvit.image_processing import segmentation_image_processor
from tests.models.segmentation_models import NUM_LABELS, lively_segmenter


@pytest.fixture
def folder(tmp_path):
    model = lively_segmenter(id2label={index: f"class {index}" for index in range(NUM_LABELS)})
    model.save_pretrained(tmp_path)
    segmentation_image_processor(32).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


def test_the_pipeline_masks_every_class_of_the_image(folder, image):
    segmenter = pipeline("image-segmentation", model=str(folder))
    inputs = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    with torch.no_grad():
        logits = segmenter.model(**inputs).logits
    expected = F.interpolate(logits, size=(50, 70), mode="bilinear", align_corners=False).argmax(dim=1)[0].numpy()
    masks = {entry["label"]: np.array(entry["mask"]) > 0 for entry in segmenter(image)}
    assert len(masks) > 1 and set(masks) == {f"class {index}" for index in np.unique(expected)}
    for label, mask in masks.items():
        assert np.array_equal(mask, expected == int(label.split()[1]))


def test_the_pipelines_threshold_of_masks_is_not_the_threshold_of_exits(folder, image):
    """τ is a field of the configuration, given on loading."""
    segmenter = pipeline("image-segmentation", model=str(folder), model_kwargs={"threshold": 10.0})
    exits = []
    segmenter.model.register_forward_hook(lambda module, args, output: exits.append(output.exit_stage.item()))
    segmenter(image, threshold=0.0)
    segmenter.model.config.threshold = 0.0
    segmenter(image, threshold=0.9)
    assert exits == [0, 2]
