"""Windows cover every pixel once, and masks go where their images go."""

import pytest
import torch

from hf_thinkingvit.windows import WindowPlan, fitted_size


@pytest.mark.parametrize("size", [(24, 40), (16, 16), (17, 61), (9, 30)])
def test_each_pixel_counts_in_one_window(size):
    mask = torch.randint(3, size, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    pixels = mask[None].float().expand(3, -1, -1)
    images, labels = WindowPlan(size=(16, 16), stride=(12, 12)).cut(pixels, mask, ignore_index=255)
    assert images.shape[1:] == (3, 16, 16) and labels.shape[1:] == (16, 16)
    counted = labels != 255
    if min(size) >= 16:
        assert int(counted.sum()) == mask.numel()
        assert torch.bincount(labels[counted], minlength=3).equal(torch.bincount(mask.flatten(), minlength=3))
        assert torch.equal(images[:, 0][counted].long(), labels[counted])
    else:  # enlarged in proportion
        assert int(counted.sum()) == 16 * round(30 * 16 / 9)


def test_overlaps_are_shared_in_their_middle():
    _, labels = WindowPlan(size=(16, 16), stride=(12, 8)).cut(torch.zeros(3, 16, 24), torch.zeros(16, 24), 255)
    first, second = labels != 255
    assert first[:, :12].all() and not first[:, 12:].any()
    assert second[:, 4:].all() and not second[:, :4].any()


def test_scale_of_the_papers():
    assert fitted_size((683, 512), 512, 2048) == (683, 512)
    assert fitted_size((100, 1000), 512, 2048) == (205, 2048)
    assert fitted_size((1024, 2048), 1024, 2048, ratio=0.5) == (512, 1024)
    assert fitted_size((360, 480), None) == (360, 480)
