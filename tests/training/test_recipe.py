import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from hf_thinkingvit import (
    AViTConfig,
    AViTForImageClassification,
    ThinkingSwinForImageClassification,
    ThinkingViTForImageClassification,
)
from hf_thinkingvit.training import TrainingConfig
from hf_thinkingvit.training.data import Place, load_data, train_batches
from hf_thinkingvit.training.recipe import (
    _augment_operations,
    build_ema,
    build_mixup,
    build_optimizer,
    build_schedule,
    posterize_to_any_depth,
    train_transform,
)
from tests.utils import tiny_config, tiny_swin_config


MODELS = {
    "thinkingvit": lambda: ThinkingViTForImageClassification(tiny_config(use_distillation_token=True)),
    "thinking_swin": lambda: ThinkingSwinForImageClassification(tiny_swin_config(use_absolute_embeddings=True)),
    "avit": lambda: AViTForImageClassification(AViTConfig(num_attention_heads=1, num_hidden_layers=1, distilled=True)),
}


@pytest.mark.parametrize("family", MODELS)
def test_only_matrices_decay(family):
    model = MODELS[family]()
    optimizer = build_optimizer(TrainingConfig(), model)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    tokens = ("cls_token", "distillation_token", "position_embeddings", "relative_position_bias_table")
    for name, parameter in model.named_parameters():
        expected = 0.0 if parameter.dim() <= 1 or name.endswith(tokens) else 0.05
        assert decays[id(parameter)] == expected, name


def test_the_published_schedule():
    """300 epochs and 10 of cooldown, 5 of linear warm-up from 1e-6, cosine to 1e-5, at a batch of 1024."""
    config = TrainingConfig()
    optimizer = build_optimizer(config, torch.nn.Linear(2, 2))
    schedule = build_schedule(config, optimizer, steps_per_epoch=10)

    def learning_rate(epoch: float) -> float:
        schedule.step_update(round(epoch * 10))
        return optimizer.param_groups[0]["lr"]

    assert learning_rate(0) == pytest.approx(1e-6)
    assert learning_rate(2.5) == pytest.approx((1e-6 + 1e-3) / 2)
    assert learning_rate(150) == pytest.approx((1e-5 + 1e-3) / 2)
    assert learning_rate(300) == learning_rate(309.9) == pytest.approx(1e-5)


def test_the_moving_average_is_optional():
    model = torch.nn.Linear(2, 2)
    assert build_ema(TrainingConfig(ema_decay=0.0), model) is None
    assert build_ema(TrainingConfig(ema_decay=0.25), model).decay == 0.25


def test_the_published_augmentation():
    steps = str(train_transform(TrainingConfig(), 224))
    for part in ("scale=(0.08, 1.0)", "bicubic", "RandomHorizontalFlip(p=0.5)", "RandAugment", "RandomErasing"):
        assert part in steps, part
    mixup = build_mixup(TrainingConfig(), num_labels=1000)
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.switch_prob, mixup.label_smoothing) == (0.8, 1.0, 0.5, 0.1)
    assert build_mixup(TrainingConfig(mixup=0.0, cutmix=0.0), num_labels=1000) is None


class TestPublishedAugmentation:
    def test_runs_with_every_operation(self, images):
        """1440 images, enough for every operation of RandAugment to occur, and posterize also with 0 bits."""
        config = TrainingConfig(dataset=str(images), eval_split="test", num_workers=0, cpu=True)
        transform, met, bits = train_transform(config, 16), set(), set()
        operations = list(_augment_operations(transform.transforms))
        for operation in operations:

            def spy(image, *arguments, _original=operation.aug_fn, _name=operation.name, **kwargs):
                met.add(_name)
                if _name == "PosterizeIncreasing":
                    bits.add(arguments[0])
                return _original(image, *arguments, **kwargs)

            operation.aug_fn = spy
        data = load_data(config).train
        for epoch in range(60):
            place = Place(batch_size=24, rank=0, world_size=1, seed=0, epoch=epoch, start=0, stop=1)
            (batch,) = train_batches(config, data, transform, place)
            assert batch["pixel_values"].isfinite().all()
            assert batch["skipped"] == []
        assert met == {operation.name for operation in operations}
        assert len(met) == 15
        assert 0 in bits

    def test_posterize_to_no_bits_is_black(self):
        pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        assert not np.asarray(posterize_to_any_depth(image, 0)).any()
        assert np.array_equal(np.asarray(posterize_to_any_depth(image, 2)), pixels & 0b11000000)
        assert posterize_to_any_depth(image, 8) is image

    @pytest.mark.parametrize("policy", ["rand-m10-inc1", "original-mstd0.5", "v0", "augmix-m10-w3"])
    def test_every_kind_of_policy_may_posterize_to_no_bits(self, policy):
        transform = train_transform(TrainingConfig(auto_augment=policy), 16)
        transform = pickle.loads(pickle.dumps(copy.deepcopy(transform)))  # as sent to data workers
        functions = {op.name: op.aug_fn for op in _augment_operations(transform.transforms)}
        posterizes = [function for name, function in functions.items() if name.startswith("Posterize")]
        assert posterizes and all(function is posterize_to_any_depth for function in posterizes)
