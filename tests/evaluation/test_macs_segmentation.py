"""Costs of segmentation models: beside a run of the model, and beside the published numbers."""

import pytest
import torch

from hf_thinkingvit import ThinkingViTConfig
from hf_thinkingvit.evaluation.macs import published_stage_macs, stage_macs
from tests.models.segmentation_models import lively_segmenter
from tests.utils import counted_flops, random_images


@pytest.mark.parametrize("decoder_type", ["linear", "mask_transformer"])
@pytest.mark.parametrize("image_size", [(32, 32), (48, 16), (37, 30)])
def test_the_count_is_that_of_a_run(decoder_type, image_size):
    model = lively_segmenter(decoder_type, decoder_hidden_size=24, decoder_num_attention_heads=3)
    counted = []
    with torch.no_grad():
        for max_stages in (1, 2, 3):
            images = random_images(2, image_size)
            flops = counted_flops(lambda: model(images, threshold=0.0, max_stages=max_stages))
            counted.append(flops // 4)  # two operations each, two images
    expected = stage_macs(model.config, image_size)
    assert counted == [sum(expected[: stage + 1]) for stage in range(3)]


def test_the_published_cost_of_a_window():
    """10.4 and 42.2 GMACs for ADE20K, windows of 512 × 512; 100 and 343 for Cityscapes, counted at 1024 × 1024."""
    config = ThinkingViTConfig(num_labels=150, decoder_type="linear", image_size=512)
    first, second = published_stage_macs(config)
    assert first / 1e9 == pytest.approx(10.4, abs=0.05) and (first + second) / 1e9 == pytest.approx(42.2, abs=0.05)
    first, second = published_stage_macs(config, 1024)
    assert first / 1e9 == pytest.approx(100, abs=0.5) and (first + second) / 1e9 == pytest.approx(343, abs=0.5)
