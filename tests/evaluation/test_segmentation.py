"""Mean IoU of every stage and at every τ, from one pass."""

import pytest
import torch
from torch.nn import functional as F

from hf_thinkingvit.evaluation import collect_stage_confusions, segmentation_measures, stage_macs
from tests.models.segmentation_models import NUM_LABELS, lively_segmenter, random_masks, spread_threshold
from tests.utils import random_images


SIZE = (37, 30)


@pytest.fixture
def images():
    return random_images(9, SIZE)


@pytest.fixture
def labels():
    labels = random_masks(9, SIZE)
    labels[:, :5] = 255
    return labels


def counted_measures(predicted, labels):
    """The measures by their definitions, class by class."""
    predicted, labels = predicted[labels != 255], labels[labels != 255]
    ious = [
        ((predicted == c) & (labels == c)).sum().item() / ((predicted == c) | (labels == c)).sum().item()
        for c in range(NUM_LABELS)
    ]
    return {
        "mean_iou": sum(ious) / NUM_LABELS,
        "per_category_iou": ious,
        "overall_accuracy": (predicted == labels).double().mean().item(),
    }


@torch.no_grad()
def predictions(logits):
    return F.interpolate(logits, size=(40, 32), mode="bilinear", align_corners=False)[..., :37, :30].argmax(dim=1)


@torch.no_grad()
def test_one_pass_gives_what_a_run_at_each_threshold_gives(images, labels):
    model = lively_segmenter()
    batches = [{"pixel_values": images[rows], "labels": labels[rows]} for rows in (slice(0, 4), slice(4, 9))]
    collected = collect_stage_confusions(model, batches, progress=False)
    costs = torch.tensor(stage_macs(model.config, SIZE)).cumsum(0).double() / 1e9
    for threshold in (0.0, spread_threshold(model, images), 10.0):
        outputs = model(images, threshold=threshold)
        row = collected.row(threshold)
        for name, value in counted_measures(predictions(outputs.logits), labels).items():
            assert row[name] == pytest.approx(value), name
        assert torch.equal(collected.exit_stages(threshold), outputs.exit_stage)
        assert row["gmacs"] == pytest.approx(costs[outputs.exit_stage].mean().item())
        assert row["exit_shares"] == pytest.approx([(outputs.exit_stage == s).double().mean().item() for s in range(3)])
    for stage, row in enumerate(collected.stage_rows()):
        logits = model(images, threshold=0.0, max_stages=stage + 1).logits
        for name, value in counted_measures(predictions(logits), labels).items():
            assert row[name] == pytest.approx(value), name


def test_classes_that_are_nowhere_do_not_count():
    confusion = torch.tensor([[3, 1, 0, 0], [0, 0, 0, 0], [0, 2, 2, 0], [0, 0, 0, 0]])
    measures = segmentation_measures(confusion)
    assert measures["per_category_iou"] == [0.75, 0.0, 0.5, None]
    assert measures["per_category_accuracy"] == [0.75, None, 0.5, None]
    assert measures["mean_iou"] == pytest.approx(1.25 / 3) and measures["mean_accuracy"] == 0.625
    assert measures["overall_accuracy"] == 0.625
    nothing = segmentation_measures(torch.zeros(2, 2))
    assert nothing["mean_iou"] is None and nothing["overall_accuracy"] is None


def test_what_cannot_be_evaluated_is_refused(images, labels):
    model = lively_segmenter()
    with pytest.raises(ValueError, match="no images"):
        collect_stage_confusions(model, [], progress=False)
    with pytest.raises(ValueError, match=r"`labels` must have the shape"):
        collect_stage_confusions(model, [{"pixel_values": images, "labels": labels[:, 1:]}], progress=False)
    with pytest.raises(ValueError, match="must lie between 0 and 6"):
        collect_stage_confusions(model, [{"pixel_values": images, "labels": labels + 1}], progress=False)
