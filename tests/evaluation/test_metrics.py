import pytest

from hf_thinkingvit.evaluation.metrics import AdaptiveAccuracy, TopKAccuracy


LOGITS = [[3.0, 1.0, 2.0], [0.0, 1.0, 2.0], [5.0, 4.0, 3.0], [0.0, 9.0, 1.0]]
LABELS = [0, 1, 2, 1]


def test_accuracy_with_exits_and_cost():
    results = AdaptiveAccuracy().compute(
        predictions=LOGITS, references=LABELS, exit_stages=[0, 1, 0, 1], stage_macs=[10**9, 3 * 10**9, 10**9], top_k=2
    )
    assert results == {
        "top1": 0.5,
        "top2": 0.75,
        "exit_shares": [0.5, 0.5, 0.0],
        "exit_top1": [0.5, 0.5, None],
        "gmacs": 2.5,
    }


def test_collects_batches():
    metric = TopKAccuracy()
    for logits, label in zip(LOGITS, LABELS):
        metric.add(prediction=logits, reference=label)
    assert metric.compute() == {"top1": 0.5, "top5": 1.0}
    adaptive = AdaptiveAccuracy()
    for part in (slice(0, 3), slice(3, 4)):
        adaptive.add_batch(predictions=LOGITS[part], references=LABELS[part], exit_stages=[0, 1, 0, 1][part])
    assert adaptive.compute()["exit_shares"] == [0.5, 0.5]


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"exit_stages": [0, 1, 2, 0], "stage_macs": [1, 2]}, "between 0 and 1"),
        ({"exit_stages": [0, 0, 0, 0], "top_k": 0}, "`top_k` must be at least 1"),
    ],
)
def test_refuses(inputs, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveAccuracy().compute(predictions=LOGITS, references=LABELS, **inputs)
