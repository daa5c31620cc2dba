"""What the benchmarks share."""

import torch

from benchmarks.measure import measure, median_and_quartiles


def test_rivals_take_turns_as_often_as_asked():
    """After two rounds that warm up and are not counted."""
    calls = []
    rivals = {name: lambda name=name: calls.append(name) for name in ("one", "other")}
    seconds = measure(rivals, 3, torch.device("cpu"))
    assert calls == ["one", "other"] * 5
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_one_repeat_has_no_quartiles():
    assert median_and_quartiles([0.5]) == "0.500"
    assert median_and_quartiles([1.0, 2.0, 3.0]) == "2.000 (1.000 to 3.000)"
