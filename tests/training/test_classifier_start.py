"""The classifier that a run starts with: rows of the source, and a probe of frozen features."""

import pytest
import torch
from torch import nn

from hf_thinkingvit.training.classifier_start import Features, collect_features, fit_probe
from hf_thinkingvit.training.labels import known_labels
from tests.models.test_modeling_avit import lively_avit
from tests.utils import lively_model, lively_swin, random_images


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
    "build, widths",
    [
        (lambda: lively_model(num_labels=3), [8, 16, 32]),
        (lambda: lively_swin(num_labels=3), None),
        (lambda: lively_avit(num_labels=3, distilled=True), None),
    ],
)
def test_what_classifiers_are_given(build, widths):
    """One call for each stage or head, with which the classifier gives the model's answers."""
    model = build().train()
    classifiers = [part for part in (model.classifier, getattr(model, "distillation_classifier", None)) if part]
    images = random_images(4)
    batches = [{"pixel_values": part, "labels": torch.arange(len(part))} for part in images.split(3)]
    found = collect_features(model, classifiers, batches, images.device)
    assert model.training and found.labels.tolist() == [0, 1, 2, 0]
    assert widths is None or [given.shape[1] for _, given in found.calls] == widths
    with torch.no_grad():
        logits = [classifiers[index](given) for index, given in found.calls]
        arguments = {"output_stage_logits": True} if len(classifiers) == 1 else {}
        outputs = model.eval()(images, **arguments)
    expected = outputs.stage_logits if arguments else (outputs.cls_logits, outputs.distillation_logits)
    assert len(logits) == len(expected)
    for one, other in zip(logits, expected):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
