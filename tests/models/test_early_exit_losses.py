"""One training step of each method with exits by layer, against a plain reference: losses and gradients."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.staged_tests import assert_gradients
from tests.models.test_modeling_early_exit_vit import lively_exits, lively_method, reference, reference_scores
from tests.utils import random_images


class TestLosses:
    def test_equal_weights(self):
        assert_gradients(lively_exits(), reference)

    def test_pabee_weights_losses_by_layer(self):
        model, pixel_values, labels = lively_method("pabee").train(), random_images(), torch.arange(6)
        losses = [F.cross_entropy(logits, labels) for logits in reference(model, pixel_values)[0]]
        assert_loss_and_gradients(model, pixel_values, sum(layer * loss for layer, loss in enumerate(losses, 1)) / 10)

    def test_branchynet_weights_losses_by_exit(self):
        """Jointly, with the weights of its section on training (w_n of each exit)."""
        weights = [1.0, 0.3, 0.3]
        model, pixel_values = lively_method("branchynet", stage_loss_weights=weights).train(), random_images()
        losses = [F.cross_entropy(logits, torch.arange(6)) for logits in reference(model, pixel_values)[0]]
        expected = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
        assert_loss_and_gradients(model, pixel_values, expected)

    @pytest.mark.parametrize("frozen", [False, True])
    def test_vit_ee_trains_the_exit_alone_or_jointly(self, frozen):
        model, pixel_values = lively_method("vit_ee").train(), random_images()
        if frozen:
            model.freeze_backbone()
        early, last = (F.cross_entropy(logits, torch.arange(6)) for logits in reference(model, pixel_values)[0])
        assert_loss_and_gradients(model, pixel_values, (early + last) / 2)
        trained = {name.partition(".")[0] for name, each in model.named_parameters() if each.grad is not None}
        exits = {"exit_transformer_layers", "exit_classifiers", "exit_layernorms"}
        assert trained == (exits if frozen else exits | {"early_exit_vit", "classifier"})

    def test_act(self):
        model, pixel_values = lively_method("act", halting_loss_weight=0.3), random_images()
        scores, logits = reference_scores(model.train(), pixel_values), reference(model, pixel_values)[0]
        expected, stages = 0.0, set()
        for image in range(6):
            total, stage = 0.0, 0
            while stage < 3 and total + scores[image, stage].item() <= 0.99:
                total, stage = total + scores[image, stage], stage + 1
            stages.add(stage)
            task = F.cross_entropy(logits[stage][image], torch.tensor(image))
            expected = expected + (task + 0.3 * (stage + 1 + 1 - total)) / 6
        assert len(stages) > 1
        assert_loss_and_gradients(model, pixel_values, expected)

    def test_pondernet(self):
        model, pixel_values = lively_method("pondernet", halting_loss_weight=0.3, halting_prior=0.4), random_images()
        scores, logits = reference_scores(model.train(), pixel_values), reference(model, pixel_values)[0]
        prior = torch.tensor([0.4, 0.4 * 0.6, 0.4 * 0.6**2, 0.6**3])
        expected = 0.0
        for image in range(6):
            left, p = 1.0, []
            for score in scores[image, :3]:
                p.append(left * score)
                left = left * (1 - score)
            p = torch.stack([*p, left])
            losses = torch.stack([F.cross_entropy(each[image], torch.tensor(image)) for each in logits])
            expected = expected + ((p * losses).sum() + 0.3 * (p * (p / prior).log()).sum()) / 6
        assert_loss_and_gradients(model, pixel_values, expected)

    @pytest.mark.parametrize("exit_head", ["linear", "transformer_layer"])
    @pytest.mark.parametrize("frozen", [False, True])
    def test_self_distillation_trains_nothing_but_the_exits(self, frozen, exit_head):
        """Whether the backbone is frozen or not."""
        model, pixel_values = lively_method("fastbert", exit_head=exit_head).train(), random_images()
        unfrozen = [name for name, each in model.named_parameters() if each.requires_grad]
        model.freeze_backbone()
        probabilities = [logits.softmax(-1) for logits in reference(model, pixel_values)[0]]
        divergences = [(p * (p / probabilities[-1]).log()).sum(-1).mean() for p in probabilities[:-1]]
        expected = sum(divergences) / 3
        assert_loss_and_gradients(model, pixel_values, expected, trains=None if frozen else unfrozen)
        trained = {name.partition(".")[0] for name, each in model.named_parameters() if each.grad is not None}
        layers = {"exit_transformer_layers"} if exit_head == "transformer_layer" else set()
        assert trained == {"exit_classifiers", "exit_layernorms", *layers}

    @pytest.mark.parametrize("method", ["act", "pondernet", "fastbert"])
    def test_parts_of_a_batch_sum_to_the_whole(self, method):
        model, pixel_values = lively_method(method).train(), random_images()
        labels = torch.tensor([3, -100, 0, 5, 7, -100])
        whole = model(pixel_values, labels=labels).loss
        parts = [
            model(pixel_values[rows], labels=labels[rows], num_items_in_batch=4).loss
            for rows in (slice(0, 2), slice(2, 6))
        ]
        torch.testing.assert_close(sum(parts), whole)

    def test_evaluation_measures_the_accepted_answers(self):
        model, labels = lively_method("pondernet"), torch.arange(6)
        with torch.no_grad():
            outputs = model(random_images(), labels=labels)
        torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))


def assert_loss_and_gradients(model, pixel_values, expected, trains=None):
    """`trains`: parameters that require gradients in the model's step, though `expected` needs none of them."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(expected, list(trained.values()), allow_unused=True)
    for name in trains or ():
        model.get_parameter(name).requires_grad_(True)
    loss = model(pixel_values, labels=torch.arange(6)).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    for (name, parameter), gradient in zip(trained.items(), gradients):
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, gradient, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
