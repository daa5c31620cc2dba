"""Complete and interrupted outputs when images come, go or change."""

import json

import pytest
from datasets import Dataset

from tests.inference.test_resumable import FACTS, answer, finish, processes


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_complete_output_is_updated(tmp_path, suffix):
    """New and changed images are answered, unreadable ones tried again, lines of images that are gone are dropped."""
    path, names = tmp_path / f"out{suffix}", ["a", "b", "c", "d"]
    (output,) = processes(path, 1, FACTS, names, ["1", "1", "1", "1"])
    output.write(0, label="a of the first run", score=0.5)
    output.write(1, error="broken")
    output.write(2, label="c of the first run", score=0.5)
    output.write(3, label="d of the first run", score=0.5)
    assert finish([output]) == (3, 1)

    (same,) = processes(path, 1, FACTS, names, ["1", "1", "1", "1"])
    assert same.is_update and same.places == [1] and same.done == 3
    same.write(1, error="still broken")
    assert finish([same]) == (3, 1)

    now = (["0", "a", "b", "c"], ["1", "1", "2", "2"])
    (killed,) = processes(path, 1, FACTS, *now)
    assert killed.places == [0, 2, 3] and killed.done == 1
    killed.write(0, label="new", score=0.5)
    (output,) = processes(path, 1, FACTS, *now)  # goes on where the update was killed
    assert output.places == [2, 3]
    output.write(2, label="mended", score=0.5)
    output.write(3, label="changed", score=0.5)
    assert finish([output]) == (4, 0)
    if suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        rows = list(Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache")))
    assert [row["label"] for row in rows] == ["new", "a of the first run", "mended", "changed"]
    assert not any(row.get("error") for row in rows)


def test_a_complete_output_of_something_else_is_not_updated(tmp_path):
    path, names = tmp_path / "out.jsonl", ["a", "b"]
    (output,) = processes(path, 1, FACTS, names, ["1", "1"])
    answer(output)
    finish([output])
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="complete output .* threshold was"):
        processes(path, 1, {**FACTS, "threshold": 1.0}, names, ["1", "1"])
    with pytest.raises(FileExistsError, match="of other images than these"):  # another folder of the same name
        processes(path, 1, FACTS, names, ["2", "2"])
    assert path.read_bytes() == before


def test_images_that_come_go_and_change_after_an_interruption(tmp_path):
    """Of a first run, and of the update of its complete output."""
    path, names = tmp_path / "out.jsonl", ["b", "c", "d"]
    (killed,) = processes(path, 1, FACTS, names, ["1", "1", "1"])
    killed.write(0, label="b of the first run", score=0.5)
    killed.write(1, label="c of the first run", score=0.5)
    (output,) = processes(path, 1, FACTS, ["a", "b", "c"], ["1", "1", "2"])  # a has come, c has changed, d is gone
    assert output.places == [0, 2] and not output.is_update
    output.write(0, label="a of the second run", score=0.5)
    output.write(2, label="c of the second run", score=0.5)
    assert finish([output]) == (3, 0)
    (killed,) = processes(path, 1, FACTS, ["a", "aa", "b", "c"], ["1", "1", "1", "2"])
    killed.write(1, label="aa of the third run", score=0.5)
    (output,) = processes(path, 1, FACTS, ["a", "aa", "ab", "b", "c"], ["1", "1", "1", "1", "2"])
    assert output.places == [2] and output.is_update
    output.write(2, label="ab of the last run", score=0.5)
    assert finish([output]) == (5, 0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    runs = ["a of the second", "aa of the third", "ab of the last", "b of the first", "c of the second"]
    assert rows == [{"name": run.split()[0], "label": f"{run} run", "score": 0.5} for run in runs]


def test_an_unfinished_run_of_other_images_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    (killed,) = processes(path, 1, FACTS, ["a"], ["1"])
    killed.write(0, label="x", score=0.5)
    with pytest.raises(FileExistsError, match="unfinished run .* is of other images .* removing .*part"):
        processes(path, 1, FACTS, ["z"], ["1"])
    with pytest.raises(FileExistsError, match="has other facts: threshold was"):
        processes(path, 1, {**FACTS, "threshold": 1.0}, ["a", "b"], ["1", "1"])
    part = tmp_path / ".out.jsonl.0.part"
    part.write_bytes(part.read_bytes()[:-5])  # killed within its first line
    assert processes(path, 1, FACTS, ["z"], ["1"])[0].places == [0]
