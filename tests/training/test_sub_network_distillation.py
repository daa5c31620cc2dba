"""DynaBERT's two phases: what a training step learns from the teacher, against a plain reference, and whole runs."""

import pytest
import torch

from hf_thinkingvit.training import TrainingConfig
from hf_thinkingvit.training.distillation import Teacher
from hf_thinkingvit.training.losses import TrainingLoss
from tests.models.test_modeling_elastic_vit import lively_elastic
from tests.utils import lively_model, random_images


PHASES = {"whole": {"depths": [1.0]}, "same_width": {}}


def states_of(model, pixel_values, number):
    """The embeddings' output and that of each layer that runs, and the logits, one sub-network at a time."""
    outputs = model(pixel_values, sub_network=number, output_hidden_states=True)
    return outputs.hidden_states, outputs.logits


def training_loss(model, teacher, **fields):
    config = TrainingConfig(distillation="hidden_states", **fields)
    return TrainingLoss(config, model.config, teacher)


@pytest.mark.parametrize("source", PHASES)
def test_loss_and_gradients_of_a_step(source):
    torch.manual_seed(0)
    teacher, model = lively_elastic("dynabert"), lively_elastic("dynabert", **PHASES[source]).train()
    images, targets = random_images(4), torch.rand(4, 12)  # labels, which mixup may have mixed, do not count
    fields = {"distillation_weight": 0.7, "hidden_states_weight": 0.1, "distillation_temperature": 2.0}
    loss = training_loss(model, teacher, teacher_sub_network=source, **fields)

    expected, networks = 0.0, model.config.networks
    for number, network in enumerate(networks):
        same = [each for each, other in enumerate(teacher.config.networks) if other.same_sizes(network)][-1]
        with torch.no_grad():
            wanted, answer = states_of(teacher, images, 11 if source == "whole" else same)
        states, logits = states_of(model, images, number)
        layers = [-1, *network.layers]
        assert len(states) == len(layers)
        distance = sum((states[place] - wanted[layer + 1]).square().mean() for place, layer in enumerate(layers))
        entropy = -((answer / 2).softmax(-1) * (logits / 2).log_softmax(-1)).sum(-1).mean() * 4
        expected = expected + (0.7 * entropy + 0.1 * distance) / len(networks)
    gradients = torch.autograd.grad(expected, list(model.parameters()))

    outputs = model(images, **loss.model_arguments(0, 0))
    total, parts = loss(outputs, images, targets, 0)
    torch.testing.assert_close(total, expected)
    assert len(parts) == len(networks) == (4 if source == "whole" else 12)
    total.backward()
    for (name, parameter), gradient in zip(model.named_parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4, msg=name)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_without_settings_hidden_states_have_the_weight_of_the_first_phase():
    """0.1, and they are learned from the whole teacher."""
    teacher, model, images = lively_elastic("dynabert"), lively_elastic("dynabert", depths=[1.0]), random_images(2)
    losses = []
    for fields in ({}, {"hidden_states_weight": 0.1, "teacher_sub_network": "whole"}, {"hidden_states_weight": 0.0}):
        loss = training_loss(model, teacher, **fields)
        losses.append(loss(model(images, **loss.model_arguments(0, 0)), images, None, 0)[0])
    torch.testing.assert_close(losses[0], losses[1])
    with torch.no_grad():
        wanted, _ = states_of(teacher, images, 11)
        distances = [
            sum((one - other).square().mean() for one, other in zip(states_of(model, images, number)[0], wanted))
            for number in range(4)
        ]
    torch.testing.assert_close(losses[0] - losses[2], 0.1 * sum(distances) / 4, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sampling, count", [("one", 1), ("sandwich", 3)])
def test_only_the_drawn_ones_and_their_sources_are_computed(sampling, count):
    teacher, model, images = lively_elastic("dynabert"), lively_elastic("dynabert").train(), random_images(2)
    loss = training_loss(model, teacher, stage_sampling=sampling, teacher_sub_network="same_width")
    calls = []
    for each in (teacher, model):
        each.elastic_vit.embeddings.register_forward_hook(lambda *_, of=each: calls.append(of))
    arguments = loss.model_arguments(5, 0)
    _, parts = loss(model(images, **arguments), images, None, 5)
    assert len(parts) == len(arguments["sub_network"]) == calls.count(model) == count
    widths = {model.config.networks[number].num_attention_heads for number in arguments["sub_network"]}
    assert calls.count(teacher) == len(widths)


def test_the_teachers_labels_in_another_order():
    teacher, images = lively_elastic("dynabert"), random_images(2)
    names = {index: f"LABEL_{(index + 1) % 12}" for index in range(12)}
    student = {index: f"LABEL_{index}" for index in range(12)}
    teacher.config.id2label, teacher.config.label2id = names, {name: index for index, name in names.items()}
    (answer, states), *_ = Teacher(teacher, id2label=student).answer_and_hidden_states(images, [11])
    with torch.no_grad():
        torch.testing.assert_close(answer, teacher(images).logits.roll(1, dims=1))
    assert len(states) == 5


def test_a_trained_model_that_is_its_own_teacher_has_nothing_to_learn():
    """But from its widths: those of the whole are the teacher's own, whatever the weight of the hidden states."""
    model, images = lively_elastic("dynabert", depths=[1.0]).train(), random_images(2)
    loss = training_loss(model, lively_elastic("dynabert"), hidden_states_weight=1e3, distillation_weight=0.0)
    _, parts = loss(model(images, **loss.model_arguments(0, 0)), images, None, 0)
    assert parts["sub_network_3_loss"] == 0 < parts["sub_network_0_loss"]


def test_what_does_not_fit():
    model = lively_elastic("dynabert")
    for teacher, message in (
        (None, "needs a `teacher`"),
        (lively_model(), "teacher's `model_type` is thinkingvit"),
        (lively_elastic("dynabert", num_hidden_layers=3), "teacher's `num_hidden_layers` is 3"),
        (lively_elastic("dynabert", depths=[0.5]), "None of `sub_networks` is the whole model"),
    ):
        with pytest.raises(ValueError, match=message):
            training_loss(model, teacher)
    with pytest.raises(ValueError, match=r"as `sub_networks\[0\]`, with all layers: add it"):
        training_loss(model, lively_elastic("dynabert", depths=[0.5, 0.75]), teacher_sub_network="same_width")
    with pytest.raises(ValueError, match=r"`sub_networks\[0\]` has 8 channels of 32"):
        training_loss(lively_elastic("hydravit"), lively_elastic("hydravit"))
    with pytest.raises(ValueError, match="is of an elastic ViT"):
        training_loss(lively_model(), None)
