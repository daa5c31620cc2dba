"""The classifier that a run starts with: rows of the source, and a probe of frozen features."""

from functools import partial

import pytest
import torch
from torch import nn

from hf_thinkingvit.training.classifier_start import Features, collect_features, fit_probe, trained_classifiers
from hf_thinkingvit.training.labels import known_labels
from tests.models.test_modeling_avit import lively_avit
from tests.models.test_modeling_early_exit_vit import lively_method
from tests.models.test_modeling_elastic_vit import lively_elastic
from tests.utils import lively_model, lively_swin, random_images


HEADS = ["classifier", "distillation_classifier", "exit_classifiers"]


@pytest.mark.parametrize(
    "names, other, known",
    [
        (["dog", "bird", "cat"], ["cat", "dog", "owl", "fish"], {0: 1, 2: 0}),
        (["cat", "dog", "owl"], ["cat", "dog", "fish"], {0: 0, 1: 1}),
        (["Tench", "snow_owl"], ["snow owl", "cat", "tench, Tinca tinca"], {0: 2, 1: 0}),
        (["crane", "cat"], ["crane", "crane", "cat"], {1: 2}),  # which crane, cannot be told
        (["hound", "dog", "cat"], ["cat", "dog, hound"], {2: 0}),  # one class for two labels
        (["dog", "cat"], ["cat", "dog"], {0: 1, 1: 0}),
        (["dog", "cat"], ["LABEL_0", "LABEL_1", "LABEL_2"], {}),
    ],
)
def test_labels_that_another_model_knows(names, other, known):
    assert known_labels(names, other) == known


def draw(images: int, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of three classes, which a narrow stage (the first half of them) can tell less well."""
    generator = torch.Generator().manual_seed(images)
    labels = torch.arange(images) % 3
    centres = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    return centres[labels] + torch.randn(images, width, generator=generator), labels


def features(classifier: nn.Linear, images: int) -> Features:
    given, labels = draw(images)
    return Features([classifier], [(0, given[:, :4].contiguous()), (0, given)], labels)


def accuracies(classifier: nn.Linear) -> list[float]:
    given, labels = draw(900)
    answers = [given[:, :width] @ classifier.weight[:, :width].T + classifier.bias for width in (4, 8)]
    return [float((each.argmax(dim=1) == labels).float().mean()) for each in answers]


@pytest.fixture
def zeros() -> nn.Linear:
    classifier = nn.Linear(8, 3)
    for parameter in classifier.parameters():
        nn.init.zeros_(parameter)
    return classifier


def test_a_classifier_of_two_stages_is_fitted_to_both(zeros):
    strength = fit_probe(features(zeros, 150))
    first, last = accuracies(zeros)
    assert strength is not None and first > 0.6 and last > 0.75


def test_the_same_images_give_the_same_probe(zeros):
    other = nn.Linear(8, 3)
    other.load_state_dict(zeros.state_dict())
    assert fit_probe(features(zeros, 60)) == fit_probe(features(other, 60))
    assert torch.equal(zeros.weight, other.weight)


def test_a_good_classifier_is_not_left_for_a_probe_of_few_images(zeros):
    fit_probe(features(zeros, 1200))
    good = zeros.weight.clone()
    assert fit_probe(features(zeros, 20)) is None
    assert torch.equal(zeros.weight, good)


def test_a_wrong_classifier_is(zeros):
    with torch.no_grad():
        zeros.weight.copy_(torch.randn(3, 8, generator=torch.Generator().manual_seed(5)))
    assert fit_probe(features(zeros, 150)) is not None and accuracies(zeros)[1] > 0.75


@pytest.mark.parametrize(
    "build, heads, arguments, answers",
    [
        (lively_model, ["classifier"], {"output_stage_logits": True}, ["stage_logits"]),
        (lively_swin, ["classifier"], {"output_stage_logits": True}, ["stage_logits"]),
        (partial(lively_method, "branchynet"), HEADS, {"output_stage_logits": True}, ["stage_logits"]),
        (lively_elastic, ["classifier"], {"sub_network": [0, 1, 2, 3]}, ["sub_network_logits"]),
        (partial(lively_avit, distilled=True), HEADS, {}, ["cls_logits", "distillation_logits"]),
    ],
    ids=["thinkingvit", "thinking_swin", "early_exit_vit", "elastic_vit", "avit"],
)
def test_what_classifiers_are_given(build, heads, arguments, answers):
    """One call for each stage, sub-network or head, with which the classifier gives the model's answers."""
    model = build().train()
    classifiers = trained_classifiers(model, heads)
    images = random_images(4, model.config.image_size)
    batches = [{"pixel_values": part, "labels": torch.arange(len(part))} for part in images.split(3)]
    found = collect_features(model, classifiers, batches, images.device)
    assert model.training and found.labels.tolist() == [0, 1, 2, 0]
    with torch.no_grad():
        outputs = model.eval()(images, **arguments)
        logits = [classifiers[index](given) for index, given in found.calls]
    expected = [outputs[name] for name in answers] if len(answers) > 1 else outputs[answers[0]]
    assert len(logits) == len(expected) > 1
    for one, other in zip(logits, expected):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
