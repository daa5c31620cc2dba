"""
Starts a classifier from a probe of frozen features, before all weights are trained: gradients of a random classifier
would spoil the features that the source has learned (LP-FT, arXiv 2202.10054).

The probe is multinomial logistic regression on what the classifiers are given in evaluation mode, of all stages (exits,
sub-networks) at once, for stages can share one classifier. It is regularised towards the rows that the source has for
labels that it knows, and towards 0 for the others; how strongly, is chosen by cross-validation on the training images.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from accelerate.utils import broadcast
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..data import evaluation_batches, without_unreadable
from ..evaluation.answers import arguments_for_all
from .splits import stratified_ranking


if TYPE_CHECKING:
    from .setup import TrainingSetup


# Weights of the squared distance from the start, from the strongest on. They count beside a mean loss, and in units of
# the features' standard deviations.
STRENGTHS = tuple(10 ** (exponent / 2) for exponent in range(2, -11, -1))
FOLDS, CROSS_VALIDATED = 5, 1000  # with more images, one of the folds tells enough
ITERATIONS = 60


@dataclass(frozen=True)
class Features:
    """
    What the classifiers of a model are given for some images.

    Attributes:
        classifiers (`list[nn.Linear]`): the model's own.
        calls (`list[tuple[int, torch.Tensor]]`): of one forward pass, the index of the classifier and its input
            `(images, width)`, float32. A narrower stage uses the leading columns of the weight.
        labels (`torch.LongTensor` of shape `(images,)`): class indices.
    """

    classifiers: list[nn.Linear]
    calls: list[tuple[int, torch.Tensor]]
    labels: torch.Tensor

    def of(self, images: torch.Tensor) -> "Features":
        """Those of some images, by index."""
        return replace(self, calls=[(index, given[images]) for index, given in self.calls], labels=self.labels[images])

    def scales(self) -> list[torch.Tensor]:
        """Of each classifier, the standard deviation of each column's input, `(width,)`, over images and calls."""
        found = []
        for index, classifier in enumerate(self.classifiers):
            total, count = (torch.zeros(classifier.in_features, device=self.labels.device) for _ in range(2))
            for given in (given for called, given in self.calls if called == index):
                total[: given.shape[1]] += given.var(dim=0, correction=0)
                count[: given.shape[1]] += 1
            found.append((total / count.clamp(min=1)).sqrt().clamp(min=1e-3))
        return found


def start_classifier(setup: "TrainingSetup", known: Collection[int]) -> str | None:
    """
    Fit the classifiers of a run's model, in place, to the frozen features of at most `config.probe_images` training
    images, some of each label, without augmentation. Every process calls it, and gets the same classifier.

    Args:
        setup (`TrainingSetup`): of the run.
        known (collection of `int`): labels whose rows come from the source; those of the others are replaced.

    Returns:
        What the classifier starts from, in words; `None` if none of it is trained.

    Raises:
        ValueError: if the training images are a stream, or no image can be decoded.
    """
    accelerator, config, split = setup.accelerator, setup.config, setup.data.train
    model = accelerator.unwrap_model(setup.model, keep_torch_compile=False)
    classifiers = trained_classifiers(model, setup.task.heads)
    if not classifiers:
        return None
    if isinstance(split.rows, datasets.IterableDataset):
        raise ValueError("`probe_images` takes some images of each label, which a stream cannot: set it to 0.")
    labels = split.labels.strata(split.rows, split.label_column)
    drawn = np.sort(stratified_ranking(labels)[: config.probe_images])
    split, _ = without_unreadable(replace(split, rows=split.rows.select(drawn)))
    if not len(split.rows):
        raise ValueError(f"None of the training images of `{split.name}` can be decoded.")
    accelerator.print(f"fitting the classifier to frozen features of {len(split.rows)} images ...")
    batches = evaluation_batches(split, setup.processor, config.eval_batch_size, config.num_workers)
    with accelerator.autocast():
        features = collect_features(model, classifiers, batches, accelerator.device)
    parameters = [parameter for classifier in classifiers for parameter in classifier.parameters()]
    unknown = [index for index in range(model.config.num_labels) if index not in known]
    with torch.no_grad():
        for parameter in parameters:
            parameter[unknown] = 0.0
        strength = fit_probe(features)
        for parameter in parameters:  # the main process's in all of them, whatever rounding did in the others
            parameter.copy_(broadcast(parameter.detach()))
    if setup.ema is not None:
        setup.ema.set(model)
    return _in_words(strength, len(split.rows), len(known), model.config.num_labels)


def _in_words(strength: float | None, images: int, known: int, num_labels: int) -> str:
    rows = f"the source's rows of {known} of {num_labels} labels" if known else "zeros"
    if strength is None:
        return f"{rows}, as they are: in cross-validation on {images} images, no probe was clearly better"
    towards = f" from {rows}" if known else ""
    return f"a probe{towards}, fitted to the features of {images} images (λ = {strength:.2g})"


def trained_classifiers(model: nn.Module, heads: Sequence[str]) -> list[nn.Linear]:
    """The linear maps in the modules `heads` of a model, as far as it has them and their weights are trained."""
    there = [getattr(model, head) for head in heads if getattr(model, head, None) is not None]
    parts = [part for head in there for part in head.modules()]
    return [part for part in parts if isinstance(part, nn.Linear) and part.weight.requires_grad]


@torch.no_grad()
def collect_features(
    model: PreTrainedModel, classifiers: Sequence[nn.Linear], batches: Any, device: torch.device
) -> Features:
    """
    What `classifiers` are given for the images of `batches` (`pixel_values` and `labels`), in one pass in evaluation
    mode. The model's mode is restored.
    """
    found: list[list[tuple[int, torch.Tensor]]] = []
    labels = []
    training = model.training
    model.eval()
    try:
        for batch in batches:
            with _recorded_inputs(classifiers) as given:
                model(batch["pixel_values"].to(device), **arguments_for_all(model))
            found.append(given)
            labels.append(batch["labels"])
    finally:
        model.train(training)
    calls = [(index, torch.cat([given[call][1] for given in found])) for call, (index, _) in enumerate(found[0])]
    return Features(list(classifiers), calls, torch.cat(labels).to(device))


@contextmanager
def _recorded_inputs(classifiers: Sequence[nn.Linear]) -> Iterator[list[tuple[int, torch.Tensor]]]:
    """A list that gets index and input of each classifier that is called."""
    given: list[tuple[int, torch.Tensor]] = []

    def recording(index: int) -> Callable:
        return lambda module, inputs: given.append((index, inputs[0].detach().float().clone()))

    handles = [each.register_forward_pre_hook(recording(index)) for index, each in enumerate(classifiers)]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


class Probe:
    """
    Logistic regression as a difference from the present classifiers.

    Args:
        features (`Features`): to fit to.
        scales (`list[torch.Tensor]`): by which the columns of each classifier are divided.
    """

    def __init__(self, features: Features, scales: Sequence[torch.Tensor]):
        self.features, self.scales = features, scales
        self.weights = [torch.zeros_like(each.weight, requires_grad=True) for each in features.classifiers]
        self.biases = [torch.zeros_like(each.weight[:, 0], requires_grad=True) for each in features.classifiers]

    def differences(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What is to be added to weight and bias of each classifier."""
        return [(weight / scale, bias) for weight, scale, bias in zip(self.weights, self.scales, self.biases)]

    def losses(self, features: Features) -> torch.Tensor:
        """Cross-entropy of each image, `(images,)`, the mean over calls."""
        classifiers, losses = [], []
        for classifier, (weight, bias) in zip(features.classifiers, self.differences()):
            own = 0.0 if classifier.bias is None else classifier.bias.detach()
            classifiers.append((classifier.weight.detach() + weight, own if classifier.bias is None else own + bias))
        for index, given in features.calls:
            weight, bias = classifiers[index]
            logits = given @ weight[:, : given.shape[1]].T + bias
            losses.append(F.cross_entropy(logits, features.labels, reduction="none"))
        return torch.stack(losses).mean(dim=0)

    def fit(self, strength: float) -> None:
        """Go on from the present weights to those of another strength of regularisation."""
        parameters = [*self.weights, *self.biases]
        optimizer = torch.optim.LBFGS(
            parameters, max_iter=ITERATIONS, tolerance_grad=1e-5, tolerance_change=1e-7, line_search_fn="strong_wolfe"
        )

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            distance = sum(weight.square().sum() for weight in self.weights)
            loss = self.losses(self.features).mean() + strength / 2 * distance
            loss.backward()
            return loss

        optimizer.step(closure)


@torch.enable_grad()
def fit_probe(features: Features) -> float | None:
    """
    Fit the classifiers of `features`, in place, with the strength of regularisation that has the smallest loss in
    cross-validation.

    Returns:
        The strength; `None` if the classifiers as they are have a smaller loss than all others, and are kept.
    """
    if len(features.labels) < FOLDS:
        return None
    scales, folds = features.scales(), list(_folds(features.labels.cpu().numpy()))
    probes = [(Probe(features.of(train), scales), features.of(test)) for train, test in folds]
    start = best = _losses(probes)
    chosen, rises = None, 0
    for strength in STRENGTHS:
        for probe, _ in probes:
            probe.fit(strength)
        losses = _losses(probes)
        if losses.mean() < best.mean():
            best, chosen, rises = losses, strength, 0
        else:
            rises += 1
        if rises == 3 and chosen is not None:  # the loss has one minimum, but for noise
            break
    gains = start - best
    if chosen is None or gains.mean() <= gains.std() / len(gains) ** 0.5:
        return None
    probe = Probe(features, scales)
    for strength in STRENGTHS[: STRENGTHS.index(chosen) + 1]:
        probe.fit(strength)
    with torch.no_grad():
        for classifier, (weight, bias) in zip(features.classifiers, probe.differences()):
            classifier.weight += weight
            if classifier.bias is not None:
                classifier.bias += bias
    return chosen


@torch.no_grad()
def _losses(probes: Sequence[tuple[Probe, Features]]) -> torch.Tensor:
    """Of each image that a probe is not fitted to."""
    return torch.cat([probe.losses(test) for probe, test in probes])


def _folds(labels: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Indices of images to fit to and to measure on, with the same shares of labels."""
    # Neighbours in the ranking are of different labels: every fold gets a run of it.
    parts = torch.from_numpy(stratified_ranking(labels)).tensor_split(FOLDS)
    for index in range(FOLDS if len(labels) <= CROSS_VALIDATED else 1):
        yield torch.cat([part for other, part in enumerate(parts) if other != index]), parts[index]
