"""A small model and its results, as cards show them."""

from hf_thinkingvit.evaluation import model_conditions
from tests.utils import lively_model


def staged(**overrides):
    return lively_model(**{"thinking_stages": [2, 4], "threshold": 0.5, **overrides})


def sweep(rows: int) -> list[dict]:
    """Rows of a sweep; τ = 0.5 has index 5."""
    return [
        {"threshold": index / 10, "top1": 80 - index, "top5": 95.0, "gmacs": 0.5, "exit_shares": [0.25, 0.75]}
        for index in range(rows)
    ]


def results(**overrides) -> dict:
    """Results of a model with two stages."""
    fields = {
        "dataset": "org/animals",
        "split": "test",
        "images": 4321,
        "criterion": "topk_entropy",
        "stages": [{"top1": 61.5, "top5": 90.25, "gmacs": 0.25}, {"top1": 72.125, "top5": 95, "gmacs": 1.5}],
        "sweep": sweep(8),
        "calibration": {
            "threshold": 0.5,
            "epsilon": 0.01,
            "delta": 0.05,
            "statement": "It keeps the promise.",
            "conditions": model_conditions(staged()),
        },
        "training": {"epochs": 7, "batch size": None},
    }
    return {**fields, **overrides}
