import math

import pytest
import torch

from hf_thinkingvit import EXIT_CRITERIA, ExitCriterion, ExitRule
from hf_thinkingvit.models.exit_scores import (
    entropy,
    margin,
    max_probability,
    mean_binary_entropy,
    topk_entropy,
)
from hf_thinkingvit.models.staged_arguments import resolve_thresholds


# Criteria that judge a stage by its logits alone, of one answer for each image. `test_modeling_early_exit_vit.py` tests
# the criteria with memory, and the tests of segmentation those of maps.
CRITERIA = sorted(n for n, criterion in EXIT_CRITERIA.items() if criterion.score is not None and not criterion.is_dense)
LOGITS = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)) * 4


def test_entropy_is_the_definition():
    expected = [-sum(p * math.log(p) for p in row) for row in LOGITS.double().softmax(-1).tolist()]
    torch.testing.assert_close(entropy(LOGITS), torch.tensor(expected), atol=1e-5, rtol=0)


def test_topk_entropy_renormalises_the_largest_probabilities():
    expected = []
    for row in LOGITS.double().softmax(-1).tolist():
        largest = sorted(row, reverse=True)[:10]
        expected.append(-sum(p / sum(largest) * math.log(p / sum(largest)) for p in largest))
    torch.testing.assert_close(topk_entropy(LOGITS), torch.tensor(expected), atol=1e-5, rtol=0)


def test_topk_entropy_of_fewer_classes_is_the_full_entropy():
    torch.testing.assert_close(topk_entropy(LOGITS[:, :7]), entropy(LOGITS[:, :7]))


def test_bounds():
    assert topk_entropy(torch.zeros(1, 1000)).item() == pytest.approx(math.log(10))
    assert entropy(torch.zeros(1, 1000)).item() == pytest.approx(math.log(1000), rel=1e-5)
    certain = torch.tensor([[200.0, 0.0, -200.0]])
    assert entropy(certain).item() == topk_entropy(certain).item() == 0.0
    assert max_probability(torch.zeros(1, 4)).item() == 0.25
    assert margin(torch.zeros(1, 4)).item() == 0.0
    assert margin(torch.zeros(1, 1)).item() == 1.0


def test_margin_is_the_distance_of_the_two_largest():
    largest = LOGITS.softmax(-1).sort(-1, descending=True).values
    torch.testing.assert_close(margin(LOGITS), largest[:, 0] - largest[:, 1])


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_of_any_leading_dimensions(name):
    """For example the logits of all stages at once, `(images, stages, num_classes)`."""
    score = EXIT_CRITERIA[name].score
    torch.testing.assert_close(score(LOGITS.view(10, 5, 20), 10), score(LOGITS, 10).view(10, 5))
    torch.testing.assert_close(score(LOGITS[0], 10), score(LOGITS, 10)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CRITERIA)
def test_scores_are_float32_of_half_precision_logits(name, dtype):
    score = EXIT_CRITERIA[name].score(LOGITS.to(dtype), 10)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, EXIT_CRITERIA[name].score(LOGITS.to(dtype).float(), 10))


@pytest.mark.parametrize("name", ["topk_entropy", "entropy", "mean_binary_entropy"])
def test_zero_threshold_never_exits_however_certain(name):
    certain = torch.cat([LOGITS * scale for scale in (1, 5, 20, 100, 1e4)])
    exits = ExitRule(name, (0.0,), 10).judge(0, {"logits": certain}).exits
    assert not exits.any()


@pytest.mark.parametrize("name", CRITERIA)
def test_the_comparison_is_strict_on_the_certain_side(name):
    criterion = EXIT_CRITERIA[name]
    score = criterion.score(LOGITS, 10)
    threshold = score[7].item()
    exits = ExitRule(name, (threshold,), 10).judge(0, {"logits": LOGITS}).exits
    assert not exits[7]
    expected = score < threshold if criterion.exits_below else score > threshold
    assert torch.equal(exits, expected)
    assert exits.any() and not exits.all()


@pytest.mark.parametrize("name", CRITERIA)
def test_a_broken_answer_goes_on(name):
    logits = LOGITS.clone()
    logits[3] = torch.nan
    logits[4, 0] = torch.inf
    exits = (
        ExitRule(name, (math.inf if EXIT_CRITERIA[name].exits_below else 0.0,), 10).judge(0, {"logits": logits}).exits
    )
    assert not exits[3] and not exits[4]
    assert exits[[0, 1, 2, 5]].all()


def test_reports_the_entropy_of_an_entropy_criterion_and_the_topk_entropy_otherwise():
    entropies = {"entropy": entropy, "mean_binary_entropy": mean_binary_entropy}
    for name in CRITERIA:
        reported = ExitRule(name, (0.5,), 10).judge(0, {"logits": LOGITS}).entropy
        torch.testing.assert_close(reported, entropies.get(name, topk_entropy)(LOGITS))


def test_mean_binary_entropy_is_of_each_label_by_itself():
    probabilities = LOGITS.double().sigmoid()
    expected = (torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)).mean(-1)
    torch.testing.assert_close(mean_binary_entropy(LOGITS), expected.float())
    torch.testing.assert_close(mean_binary_entropy(-LOGITS), mean_binary_entropy(LOGITS))
    assert mean_binary_entropy(torch.zeros(1, 7)).item() == pytest.approx(math.log(2))
    # Small entropies are not lost beside large logits.
    certain = mean_binary_entropy(torch.tensor([[20.0], [-20.0], [1e4]]))
    assert certain.tolist() == pytest.approx([21 * math.exp(-20), 21 * math.exp(-20), 0.0], rel=1e-4)


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("num_labels", [2, 3, 50])
def test_the_maximum_is_the_greatest_score(name, num_labels):
    criterion = EXIT_CRITERIA[name]
    maximum = criterion.maximum(num_labels, 10)
    one_hot = torch.zeros(1, num_labels)
    one_hot[0, 0] = 1e4
    extremes = torch.cat([torch.zeros(1, num_labels), one_hot])
    assert criterion.score(extremes, 10).max().item() == pytest.approx(maximum)
    assert criterion.score(LOGITS[:, :num_labels], 10).max().item() <= maximum


def test_the_last_stage_always_answers():
    exits = ExitRule("topk_entropy", (0.0,), 10).judge(1, {"logits": LOGITS}).exits
    assert exits.all()


def test_thresholds_one_for_all_or_one_per_exit():
    assert resolve_thresholds(0.5, 3) == (0.5, 0.5, 0.5)
    assert resolve_thresholds([0.5, 0.1], 2) == (0.5, 0.1)
    assert resolve_thresholds(torch.tensor([0.5, 0.25]), 2) == (0.5, 0.25)
    assert resolve_thresholds(0.5, 0) == ()
    with pytest.raises(ValueError, match="list of 2, one per exit.*got 3"):
        resolve_thresholds([0.1, 0.2, 0.3], 2)


def test_a_multi_label_criterion_that_is_no_entropy_reports_the_entropy_of_each_label(monkeypatch):
    def score(logits, top_k):
        return logits.float().abs().amin(dim=1)

    least_certain = ExitCriterion(score, False, lambda num_labels, top_k: 1.0, "", multi_label=True)
    monkeypatch.setitem(EXIT_CRITERIA, "least_certain_label", least_certain)
    verdict = ExitRule("least_certain_label", (0.5,), 10).judge(0, {"logits": LOGITS})
    torch.testing.assert_close(verdict.entropy, mean_binary_entropy(LOGITS))
