"""Entropies over maps, the loss of segmentation, and the masks that it refuses."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_thinkingvit import EXIT_CRITERIA
from hf_thinkingvit.models import exit_scores, modeling_thinkingvit_segmentation
from hf_thinkingvit.models.exit_scores import entropy, mean_grid_entropy, mean_pixel_entropy
from tests.models.segmentation_models import lively_segmenter, random_masks
from tests.utils import random_images


LOGITS = torch.randn(3, 11, 5, 4, generator=torch.Generator().manual_seed(0)) * 4


@pytest.mark.parametrize("patch_size", [(8, 8), (16, 16), (4, 6), (1, 1), (3, 5)])
@pytest.mark.parametrize("grid", [(5, 4), (1, 4), (5, 1), (1, 1)])
@pytest.mark.parametrize("cached", [exit_scores.CACHED_NUMBERS, 11 * 4 * 8 * 2, 1])  # the others make several blocks
def test_mean_pixel_entropy_is_that_of_the_resized_map(patch_size, grid, cached, monkeypatch):
    monkeypatch.setattr(exit_scores, "CACHED_NUMBERS", cached)
    logits = LOGITS[:, :, : grid[0], : grid[1]]
    size = (grid[0] * patch_size[0], grid[1] * patch_size[1])
    resized = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    expected = entropy(resized.movedim(1, -1)).mean(dim=(1, 2))
    torch.testing.assert_close(mean_pixel_entropy(logits, patch_size), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mean_pixel_entropy(logits * 100, patch_size).isfinite(), torch.ones(3).bool())


def test_mean_grid_entropy_is_the_mean_over_patches():
    torch.testing.assert_close(mean_grid_entropy(LOGITS), entropy(LOGITS.movedim(1, -1)).mean(dim=(1, 2)))


@pytest.mark.parametrize("name", ["mean_pixel_entropy", "mean_grid_entropy"])
def test_the_scale_of_the_entropies(name):
    measure = mean_grid_entropy if name == "mean_grid_entropy" else lambda logits: mean_pixel_entropy(logits, (4, 4))
    maximum = EXIT_CRITERIA[name].maximum(11, 10)
    assert measure(torch.zeros(1, 11, 2, 2)).item() == pytest.approx(maximum) == pytest.approx(math.log(11))
    certain = torch.zeros(1, 11, 2, 2)
    certain[:, 3] = 1e4
    assert measure(certain).item() == 0.0  # not below: at τ = 0 nothing exits
    broken = LOGITS.clone()
    broken[1, 2, 0, 0] = torch.nan
    assert measure(broken).isnan().tolist() == [False, True, False]
    assert measure(LOGITS.half()).dtype == torch.float32


def test_a_class_that_is_ruled_out_counts_as_if_it_were_not_there():
    ruled_out = LOGITS.clone()
    ruled_out[:, 2] = -torch.inf
    without = torch.cat([LOGITS[:, :2], LOGITS[:, 3:]], dim=1)
    torch.testing.assert_close(mean_grid_entropy(ruled_out), mean_grid_entropy(without))
    torch.testing.assert_close(mean_pixel_entropy(ruled_out, (4, 4)), mean_pixel_entropy(without, (4, 4)))
    ruled_out[1, :, 0, 0] = -torch.inf  # no class is left, as for `entropy`
    assert mean_grid_entropy(ruled_out).isnan().tolist() == [False, True, False]
    assert mean_pixel_entropy(ruled_out, (4, 4)).isnan().tolist() == [False, True, False]


def test_an_ignore_index_that_is_a_class_is_refused():
    with pytest.raises(ValueError, match="semantic_loss_ignore_index.*300 classes.*-100"):
        lively_segmenter(num_labels=300)
    assert lively_segmenter(num_labels=300, semantic_loss_ignore_index=-100).config.num_labels == 300


def test_logits_that_cover_padding_are_reported(monkeypatch):
    reports = []
    monkeypatch.setattr(modeling_thinkingvit_segmentation.logger, "warning_once", reports.append)
    model = lively_segmenter().eval()
    patch_size = model.config.patch_size
    with torch.no_grad():
        model(torch.zeros(1, 3, 2 * patch_size, 3 * patch_size))
        assert not reports
        model(torch.zeros(1, 3, 2 * patch_size - 1, 3 * patch_size))
    assert len(reports) == 1 and "cover the padding" in reports[0] and "resize_logits" in reports[0]


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return output


def test_the_map_of_pixels_is_never_held_whole():
    with LargestTensor() as largest:
        mean_pixel_entropy(torch.randn(2, 150, 32, 32), (16, 16))
    assert largest.numel <= 2 * 150 * (32 * 16) * 3  # one row of patches and its neighbours: a 170th of the map


def test_the_grid_entropy_decides_where_it_is_configured():
    model, images = lively_segmenter(exit_criterion="mean_grid_entropy", threshold=0.0), random_images(6)
    with torch.no_grad():
        outputs = model(images, max_stages=1)
        torch.testing.assert_close(outputs.entropy, mean_grid_entropy(outputs.logits))
        middle = outputs.entropy.sort().values[2:4].mean().item()
        assert (model(images, threshold=[middle, 0.0]).exit_stage == 0).sum() == 3


def test_the_training_loss_is_the_weighted_sum_of_the_stages_pixel_losses():
    model = lively_segmenter(stage_loss_weights=[0.5, 0.2, 0.3], label_smoothing=0.1).train()
    images, labels = random_images(3, (37, 30)), random_masks(3, (37, 30))
    labels[0, :10] = 255
    outputs = model(images, labels=labels)
    expected = 0.0
    for weight, logits in zip([0.5, 0.2, 0.3], outputs.stage_logits):
        pixels = F.interpolate(logits, size=(40, 32), mode="bilinear", align_corners=False)[..., :37, :30]
        expected += weight * F.cross_entropy(pixels, labels, ignore_index=255, label_smoothing=0.1)
    torch.testing.assert_close(outputs.loss, expected)
    outputs.loss.backward()
    assert all(recycler.alpha.grad.abs() > 0 for recycler in model.thinkingvit.recyclers)
    model.eval()
    accepted = model(images, labels=labels)
    pixels = F.interpolate(accepted.logits, size=(40, 32), mode="bilinear", align_corners=False)[..., :37, :30]
    torch.testing.assert_close(accepted.loss, F.cross_entropy(pixels, labels, ignore_index=255))


def test_a_mask_of_the_ignore_index_alone_has_loss_0():
    model = lively_segmenter().train()
    loss = model(random_images(2), labels=torch.full((2, 32, 32), 255)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.isnan().any() for p in model.parameters())


def test_parts_of_a_batch_sum_to_the_loss_of_the_whole():
    model, images, labels = lively_segmenter(), random_images(4), random_masks(4, (32, 32))
    whole = model(images, labels=labels).loss
    parts = [
        model(images[rows], labels=labels[rows], num_items_in_batch=labels.numel()).loss for rows in ([0], [1, 2, 3])
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_another_ignore_index():
    model = lively_segmenter(semantic_loss_ignore_index=-1)
    labels = random_masks(2, (32, 32))
    labels[:, :16] = -1
    pixels = F.interpolate(model(random_images(2)).logits, size=(32, 32), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(pixels, labels, ignore_index=-1)
    torch.testing.assert_close(model(random_images(2), labels=labels).loss, expected)


def with_value(value):
    labels = random_masks(2, (32, 32))
    labels[1, 3, 5] = value
    return labels


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (random_masks(2, (32, 31)), r"shape \(batch_size, height, width\) = \(2, 32, 32\).*got \(2, 32, 31\)"),
        (random_masks(2, (4, 4)), r"got \(2, 4, 4\)"),
        (random_masks(3, (32, 32)), r"got \(3, 32, 32\)"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.long), "must be read as indices"),
        ([[0]], "got list"),
        (random_masks(2, (32, 32)).float(), "class indices .torch.long."),
        (random_masks(2, (32, 32)).to(torch.uint8), "class indices .torch.long."),
        (with_value(7), r"between 0 and 6, or be 255.*got \[7\] in 1 pixels.*image 1 at row 3, column 5"),
        (with_value(-100), r"got \[-100\]"),
    ],
)
def test_masks_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        lively_segmenter()(random_images(2), labels=labels)


@pytest.mark.parametrize("threshold", [-0.5, math.nan, [0.5]])
def test_a_threshold_that_is_none_is_refused(threshold):
    with pytest.raises(ValueError, match="`threshold` must be"):
        lively_segmenter()(random_images(2), threshold=threshold)
