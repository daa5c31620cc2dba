"""Scores of token pruning in half precision, at ties and under `torch.compile`; and the modes of a model's parts."""

import copy

import pytest
import torch
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from hf_thinkingvit.models.configuration_pruning import kept_counts, resolve_keep_rates
from hf_thinkingvit.models.token_pruning import ScorePredictor
from tests.utils import lively_model, random_images


PRUNING = {"pruning_layers": [1, 2], "pruning_keep_rate": 0.5}


def margins(predictor: ScorePredictor, patches: torch.Tensor, **kwargs) -> torch.Tensor:
    """What patches are ordered by: `(batch, patches)`."""
    keeping, removing = predictor(patches, **kwargs).unbind(dim=-1)
    return keeping - removing


@pytest.fixture
def predictor():
    """As it is initialised, so that its scores are close to each other."""
    return copy.deepcopy(lively_model(thinking_stages=[4], hidden_size=64, **PRUNING).thinkingvit.score_predictors[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
@torch.no_grad()
def test_in_half_precision_patches_have_scores_of_their_own(predictor, dtype, autocast):
    """Sums of products in bfloat16 give all patches a handful of scores, and chance would choose among them."""
    patches = torch.randn(2, 196, 64, generator=torch.Generator().manual_seed(0))
    for parameter in predictor.fc3.parameters():  # as close to each other as at the start of training
        parameter.mul_(0.02)
    expected = margins(predictor, patches)
    if autocast:
        with torch.autocast("cpu", dtype):
            found = margins(predictor, patches, kept=torch.ones(2, 196))
    else:
        found = margins(predictor.to(dtype), patches.to(dtype))
    assert found.dtype == torch.float32
    for ours, exact in zip(found, expected):
        assert len(ours.unique()) > 190
        common = set(ours.topk(98).indices.tolist()) & set(exact.topk(98).indices.tolist())
        assert len(common) >= 93


@pytest.mark.parametrize("bias", [[30.0, -30.0], [-30.0, 30.0]], ids=["all kept", "all removed"])
@torch.no_grad()
def test_near_certainty_does_not_tie(bias):
    """The same number added to every patch's margin changes no order, though all probabilities round to 1 (or 0)."""
    images, model = random_images(), lively_model(**PRUNING)
    expected = model(images, output_kept_tokens=True).kept_tokens
    for predictor in model.thinkingvit.score_predictors:
        predictor.fc3.bias.add_(torch.tensor(bias))
    for kept, rows in zip(model(images, output_kept_tokens=True).kept_tokens, expected):
        assert torch.equal(kept.sort().values, rows.sort().values)


def test_predictors_in_evaluation_mode_train_nevertheless():
    """The model's mode counts: a part that is set to evaluation mode, to freeze it, does not end the sampling."""
    model = lively_model(**PRUNING).train()
    model.thinkingvit.score_predictors.eval()
    outputs = model(random_images(), torch.arange(6))
    assert outputs.ratio_loss is not None and len(outputs.keep_decisions) == 2


def test_a_backbone_in_evaluation_mode_removes_patches():
    """As when only the classifier is trained. What was kept is put out."""
    model = lively_model(**PRUNING).train()
    model.thinkingvit.eval()
    outputs = model(random_images(), torch.arange(6), output_kept_tokens=True)
    assert outputs.ratio_loss is None and [rows.shape for rows in outputs.kept_tokens] == [(6, 8), (6, 4)]
    outputs.loss.backward()
    assert model.classifier.weight.grad.any()


def test_an_empty_batch_trains_nothing():
    model = lively_model(**PRUNING).train()
    outputs = model(torch.zeros(0, 3, 32, 32), torch.zeros(0, dtype=torch.long))
    assert outputs.loss == 0 and outputs.ratio_loss == 0


@pytest.mark.parametrize("stages", [[4], [1, 4]])
def test_warns_of_a_loss_that_leaves_out_the_ratio(stages):
    """As `Trainer` with label smoothing computes it; of one stage as well."""
    model, images = lively_model(thinking_stages=stages, **PRUNING), random_images(2)
    logging.warning_once.cache_clear()
    with CaptureLogger(logging.get_logger("hf_thinkingvit.models.module_arguments")) as captured:
        model(images)
        model.train()
        model(images, output_stage_logits=True)
        model(images, torch.arange(2))
        if len(stages) > 1:
            model(images, max_stages=1)  # the pruned stage does not run
        assert captured.io.getvalue() == ""
        model(images)
    assert "leaves out the ratio loss" in captured.out and "label_smoothing" in captured.out


def test_rates_can_be_traced():
    """With a number that `torch.compile` takes for a variable, as from the second rate on."""

    @torch.compile(backend="eager", fullgraph=True)
    def kept(patches: torch.Tensor, rate: float) -> torch.Tensor:
        return patches[: kept_counts(resolve_keep_rates(rate, 2), 16)[1]]

    for rate, count in ((0.5, 4), (0.75, 9), (0.25, 1)):
        assert len(kept(torch.zeros(16), rate)) == count
