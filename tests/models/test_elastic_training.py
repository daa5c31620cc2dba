"""What a training step of an elastic ViT computes and learns; DynaBERT's is in `test_sub_network_distillation.py`."""

import pytest
import torch
import torch.nn.functional as F

from hf_thinkingvit import ElasticViTConfig
from hf_thinkingvit.training import TrainingConfig
from hf_thinkingvit.training.losses import TrainingLoss
from tests.models.test_modeling_elastic_vit import SIZES, lively_elastic, reference
from tests.utils import random_images


class TestLossWeights:
    def test_of_those_that_run_keep_their_sum(self):
        model = lively_elastic(sub_network_loss_weights=[1.0, 2.0, 0.0, 3.0])
        images, labels = random_images(), torch.arange(6)
        small, large = (F.cross_entropy(model(images, sub_network=number).logits, labels) for number in (1, 3))
        torch.testing.assert_close(model(images, labels, sub_network=[1, 3]).loss, (small + large) / 2)
        model.train()
        torch.testing.assert_close(model(images, labels, sub_network=[1, 3]).loss, 6 * (2 * small + 3 * large) / 5)
        torch.testing.assert_close(model(images, labels).loss, 6 * large)
        with pytest.raises(ValueError, match=r"`sub_network_loss_weights` .* has weight 0 for all of \[2, 2\]"):
            model(images, labels, sub_network=[2, 2])

    def test_are_those_of_a_weighted_draw(self):
        """HydraViT draws a sub-network for each step, uniformly or by weights."""
        drawn = {}
        for weights in (None, [0.0, 1.0, 0.0, 3.0]):
            config = ElasticViTConfig.hydravit(**SIZES, sub_network_loss_weights=weights)
            loss = TrainingLoss(TrainingConfig(stage_sampling="one"), config)
            numbers = [loss.model_arguments(step, 0)["sub_network"] for step in range(400)]
            drawn[weights is None] = torch.bincount(torch.tensor(numbers).flatten(), minlength=4) / 400
        torch.testing.assert_close(drawn[True], torch.full((4,), 0.25), atol=0.07, rtol=0)
        torch.testing.assert_close(drawn[False], torch.tensor([0, 0.25, 0, 0.75]), atol=0.07, rtol=0)
        assert drawn[False][0] == drawn[False][2] == 0


@pytest.mark.parametrize("sampling, count", [("all", 4), ("one", 1), ("sandwich", 3), ("accumulate", 1)])
def test_a_training_step_computes_the_drawn_ones_only(sampling, count):
    model, labels = lively_elastic().train(), torch.arange(4)
    loss = TrainingLoss(TrainingConfig(stage_sampling=sampling, label_smoothing=0.0), model.config)
    arguments = loss.model_arguments(3, 1)
    outputs = model(random_images(4), labels, **arguments)
    assert len(arguments["sub_network"]) == len(outputs.sub_network_logits) == count
    total, parts = loss(outputs, None, labels, 3, 1)
    torch.testing.assert_close(total, outputs.loss)  # equal weights with the sum 1
    assert list(parts) == [f"sub_network_{number}_loss" for number in arguments["sub_network"]]


@pytest.mark.parametrize("method, sampling", [("hydravit", "one"), ("matformer", "all"), ("sortednet", "accumulate")])
def test_a_training_step_of_each_method_against_a_plain_reference(method, sampling):
    """Loss and gradients of two steps of two micro-batches."""
    model, images, labels = lively_elastic(method).train(), random_images(8), torch.arange(8)
    loss = TrainingLoss(TrainingConfig(stage_sampling=sampling, label_smoothing=0.1), model.config)
    halves, drawn = [slice(0, 4), slice(4, 8)], {}
    for step in (0, 3):
        expected, found = 0.0, 0.0
        for micro_batch, rows in enumerate(halves):
            arguments = loss.model_arguments(step, micro_batch)
            drawn[step, micro_batch] = numbers = arguments["sub_network"]
            outputs = model(images[rows], **arguments)
            found = found + loss(outputs, images[rows], labels[rows], step, micro_batch)[0] / 2
            for number in numbers:
                logits = reference(model, images[rows], model.config.networks[number])
                one = F.cross_entropy(logits, labels[rows], label_smoothing=0.1)
                expected = expected + one / len(numbers) / 2
        torch.testing.assert_close(found, expected)
        parameters = list(model.parameters())
        pairs = zip(*(torch.autograd.grad(each, parameters, allow_unused=True) for each in (found, expected)))
        for gradient, expected_gradient in pairs:
            torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-4)
    if sampling == "all":
        assert set(map(tuple, drawn.values())) == {(0, 1, 2, 3)}
    else:  # of a step, or of a micro-batch
        assert all(len(numbers) == 1 for numbers in drawn.values()) and drawn[0, 0] != drawn[3, 0]
        assert all(drawn[step, 0] == drawn[step, 1] for step in (0, 3)) is (sampling == "one")
