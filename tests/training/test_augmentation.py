"""Images and masks are augmented together."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_thinkingvit.training import TrainingConfig
from hf_thinkingvit.training.augmentation import SegmentationAugmentation
from hf_thinkingvit.training.seeding import seeded
from tests.segmentation_data import picture


MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def augmentation(size=(16, 16), **fields):
    fields = {"image_mean": MEAN, "image_std": STD, "photometric_distortion": 0.0, **fields}
    return SegmentationAugmentation(TrainingConfig(**fields), size, ignore_index=255)


def test_pixels_and_labels_stay_together():
    """The lightness of a pixel tells its class, after scaling (but for borders between classes) and flips too."""
    image, mask = picture(0)
    augment = augmentation(scale_jitter=[1.0, 2.0])
    together = []
    for seed in range(20):
        with seeded(seed):
            pixels, labels = augment(Image.fromarray(image), torch.from_numpy(mask))
        assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
        assert labels.shape == (16, 16) and labels.dtype == torch.int64
        lightness = (pixels[0] * STD[0] + MEAN[0]) * 255
        right = ((lightness - 30) / 100).round().long() == labels
        together.append(right[labels != 255].double().mean().item())
    assert np.mean(together) > 0.93


def test_small_images_are_padded():
    pixels, labels = augmentation(size=(40, 64), scale_jitter=[0.5, 0.5])(
        Image.fromarray(picture(0)[0]), torch.zeros(24, 40, dtype=torch.uint8)
    )
    assert (labels[:12, :20] == 0).all() and (labels != 255).sum() == 12 * 20
    assert not pixels[:, 12:].any() and not pixels[:, :, 20:].any() and pixels[:, :12, :20].any()


@pytest.mark.parametrize("share, expected", [(0.75, 1.0), (1.0, 0.0)])
def test_crops_are_not_of_one_class(share, expected):
    """A corner of another class is met by nearly every crop that is drawn up to ten times, and by few drawn once."""
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[:, 20:] = 1
    augment = augmentation(size=(16, 16), scale_jitter=[1.0, 1.0], crop_class_share=share)
    image, mixed = Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8)), []
    for seed in range(40):
        with seeded(seed):
            labels = augment(image, mask)[1]
        mixed.append(labels.float().mean().clamp(0, 1).sub(0.5).abs() < 0.26)
    assert abs(np.mean(mixed) - expected) < 0.4


def test_colours_change_and_labels_do_not():
    image, mask = (Image.fromarray(picture(1)[0]), torch.from_numpy(picture(1)[1]))
    results = []
    for distortion in (0.0, 1.0):
        with seeded(3):
            results.append(augmentation((24, 40), photometric_distortion=distortion, scale_jitter=[1, 1])(image, mask))
    assert not torch.equal(results[0][0], results[1][0])
    assert sorted(results[0][1].flatten().tolist()) == sorted(results[1][1].flatten().tolist())
