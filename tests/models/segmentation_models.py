"""Small segmentation models that tests share."""

import torch

from hf_thinkingvit import ThinkingViTForSemanticSegmentation
from tests.utils import lively, tiny_config


NUM_LABELS = 7


def lively_segmenter(decoder_type: str = "linear", **overrides) -> ThinkingViTForSemanticSegmentation:
    """Three stages on 32 × 32 images with patches of 8 × 8, in evaluation mode, whose parts all show in the logits."""
    fields = {"decoder_type": decoder_type, "num_labels": NUM_LABELS, "position_interpolation": "bilinear"}
    return lively(ThinkingViTForSemanticSegmentation, tiny_config(**{**fields, **overrides}))


@torch.no_grad()
def spread_threshold(model, pixel_values: torch.Tensor) -> list[float]:
    """One τ per exit at which about a third of the images leave at each stage; rounding decides nothing."""
    thresholds, rows = [], torch.arange(len(pixel_values))
    for stage in range(model.config.num_stages - 1):
        scores = model(pixel_values, max_stages=stage + 1, threshold=0.0).entropy[rows].sort().values
        place = max(len(scores) // (model.config.num_stages - stage), 1)
        thresholds.append(float((scores[place - 1] + scores[place]) / 2))
        rows = rows[model(pixel_values, max_stages=stage + 1, threshold=0.0).entropy[rows] >= thresholds[-1]]
    return thresholds


def random_masks(count: int, size: tuple[int, int]) -> torch.Tensor:
    return torch.randint(NUM_LABELS, (count, *size), generator=torch.Generator().manual_seed(3))
