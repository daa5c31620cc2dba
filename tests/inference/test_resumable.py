"""Every image is in the output exactly once, whatever happened to earlier runs."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.inference.resumable import ResumableOutput, fingerprint, model_fingerprint
from tests.utils import lively_model


FACTS = {"model": "org/model", "threshold": [0.5, 0.25], "source": "pictures", "max_stages": None}
NAMES = ["a.png", "b\nc.png", "d\u2028e.png", "f\x85g.png", "猫.png", *(f"{index}.png" for index in range(8))]


def processes(path, count: int, facts=FACTS, names=NAMES, identities=None) -> list[ResumableOutput]:
    """The outputs of `count` processes, which run one after another; barriers do not wait."""
    states = [
        SimpleNamespace(
            process_index=index, num_processes=count, is_main_process=index == 0, wait_for_everyone=lambda: None
        )
        for index in reversed(range(count))
    ]
    return [ResumableOutput(path, facts, names, state, identities) for state in states][::-1]


class Killed(Exception):
    """Simulates the kill of a process, or the error of the processes that wait for it."""


def process(path, index: int, count: int, facts=FACTS, killed_at: int | None = None):
    """
    The output of one of several processes (`None` if it is killed at barrier `killed_at`), and for each barrier that it
    reached the τ in the header and the number of parts.
    """
    found = []

    def wait_for_everyone():
        header = path.with_name(f"{path.name}.run.json")
        threshold = json.loads(header.read_text(encoding="utf-8"))["threshold"] if header.exists() else None
        found.append((threshold, len(list(path.parent.glob(".*.part")))))
        if len(found) == killed_at:
            raise Killed

    state = SimpleNamespace(
        process_index=index, num_processes=count, is_main_process=index == 0, wait_for_everyone=wait_for_everyone
    )
    try:
        return ResumableOutput(path, facts, NAMES, state), found
    except Killed:
        return None, found


def answer(output: ResumableOutput, count: int | None = None) -> list[int]:
    for place in output.places[:count]:
        output.write(place, label=f"label {place}", score=0.5)
    return output.places[:count]


def finish(outputs: list[ResumableOutput]):
    return [output.finish() for output in outputs[1:] + outputs[:1]][-1]


def assert_complete(path) -> None:
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert [line["name"] for line in lines] == NAMES
    assert [line["label"] for line in lines] == [f"label {place}" for place in range(len(NAMES))]
    assert {other.name for other in path.parent.iterdir()} == {path.name, f"{path.name}.run.json"}


@pytest.mark.parametrize("counts", [(1, 3), (3, 1), (2, 3), (4, 2, 3)])
def test_resumed_with_another_number_of_processes(tmp_path, counts):
    path, answered = tmp_path / "out.jsonl", []
    for count in counts[:-1]:
        for output in processes(path, count):
            answered += answer(output, 2)  # killed afterwards
    last = processes(path, counts[-1])
    assert last[0].done == len(answered) > 0
    assert sorted(answered + [place for output in last for place in output.places]) == list(range(len(NAMES)))
    for output in last:
        answer(output)
    assert finish(last) == (len(NAMES), 0)
    assert_complete(path)
    facts = json.loads((tmp_path / "out.jsonl.run.json").read_text(encoding="utf-8"))
    assert facts == {**FACTS, "images": len(NAMES), "names": fingerprint(NAMES)}


@pytest.mark.parametrize(
    "tail", [b'{"place": 5, "na', b"\0\0\0\n", b'{"place": 99, "name": "x"}\n[1]\n', b'{"place": 5}\n']
)
def test_lines_that_were_cut_short_or_damaged(tmp_path, tail):
    path = tmp_path / "out.jsonl"
    for output in processes(path, 2):
        answer(output, 3)
    for index in range(2):
        with (tmp_path / f".out.jsonl.{index}.part").open("ab") as file:
            file.write(tail)
    (output,) = processes(path, 1)
    assert output.done == 6
    answer(output)
    assert finish([output]) == (len(NAMES), 0)
    assert_complete(path)


@pytest.mark.parametrize(
    "change",
    [{"model": "org/other"}, {"threshold": 0.5}, {"source": "others"}, {"max_stages": 1}, {"names": ["x", *NAMES[1:]]}],
)
def test_a_run_of_something_else_is_refused(tmp_path, change):
    path, facts, names = tmp_path / "out.jsonl", {**FACTS, **change}, change.get("names", NAMES)
    facts.pop("names", None)
    (output,) = processes(path, 1)
    answer(output, 3)
    with pytest.raises(FileExistsError, match=rf"has other facts: {next(iter(change))} was .* start anew by remov"):
        processes(path, 1, facts, names)
    (output,) = processes(path, 2)[:1]
    assert output.done == 3
    for part in tmp_path.glob(".*.part"):
        part.unlink()
    assert processes(path, 1, facts, names)[0].done == 0  # nothing is continued


@pytest.mark.parametrize("value", [float("nan"), [0.5, float("nan")]])
def test_facts_that_are_not_finite(tmp_path, value):
    path, facts = tmp_path / "out.jsonl", {**FACTS, "temperature": value}
    answer(processes(path, 1, facts)[0], 3)
    assert processes(path, 1, facts)[0].done == 3
    with pytest.raises(FileExistsError, match="temperature was .* and is 1.0"):
        processes(path, 1, {**FACTS, "temperature": 1.0})


def test_equal_facts_of_other_types(tmp_path):
    path = tmp_path / "out.jsonl"
    answer(processes(path, 1, {**FACTS, "threshold": 1})[0], 3)
    assert processes(path, 1, {**FACTS, "threshold": 1.0})[0].done == 3


@pytest.mark.parametrize("header", [None, b'{"model', b"[1]", b"\xff"])
def test_parts_without_a_header_are_refused(tmp_path, header):
    path, header_path = tmp_path / "out.jsonl", tmp_path / "out.jsonl.run.json"
    (output,) = processes(path, 1)
    answer(output, 3)
    header_path.unlink() if header is None else header_path.write_bytes(header)
    with pytest.raises(
        FileExistsError, match=r"run\.json.* is missing or damaged.*by removing .*\.out\.jsonl\.0\.part"
    ):
        processes(path, 1)
    (tmp_path / ".out.jsonl.0.part").unlink()  # as the message says
    assert processes(path, 1)[0].done == 0


def test_nobody_opens_a_part_before_everybody_has_read_and_the_header_is_there(tmp_path):
    """A finished run whose output was removed leaves a header; the next run has other facts."""
    path, other = tmp_path / "out.jsonl", {**FACTS, "threshold": 1.0}
    (output,) = processes(path, 1)
    answer(output)
    finish([output])
    path.unlink()
    second, found = process(path, 1, 2, other)
    assert found == [([0.5, 0.25], 0), ([0.5, 0.25], 0)]  # no part before either barrier
    first, found = process(path, 0, 2, other)
    assert found == [([0.5, 0.25], 1), (1.0, 1)]  # header written between the barriers
    for output in (first, second):
        answer(output, 2)
    assert processes(path, 1, other)[0].done == 4


@pytest.mark.parametrize("leftover", [False, True])
@pytest.mark.parametrize("killed_at", [1, 2])
def test_killed_before_the_header_is_there_for_all(tmp_path, killed_at, leftover):
    """Answers of a second run with another τ are never taken for those of the first."""
    path, other = tmp_path / "out.jsonl", {**FACTS, "threshold": 1.0}
    if leftover:
        (output,) = processes(path, 1)
        answer(output)
        finish([output])
        path.unlink()
    process(path, 0, 2, other, killed_at)
    survivor, _ = process(path, 1, 2, other, killed_at=2)  # waits at the second barrier for the killed process
    if survivor is not None:
        answer(survivor, 2)
    (output,) = processes(path, 1)
    assert output.done == 0
    answer(output)
    assert finish([output]) == (len(NAMES), 0)
    assert_complete(path)


def test_images_that_could_not_be_read_are_tried_again(tmp_path):
    path = tmp_path / "out.jsonl"
    first, second = processes(path, 2)
    first.write(0, error="the disk was away")
    second.write(1, error="the disk was away")
    second.write(3, label="label 3", score=0.5)
    for _ in range(2):  # the first run is killed after the image has failed again
        (output,) = processes(path, 1)
        assert output.done == 1 and output.places == [place for place in range(len(NAMES)) if place != 3]
        output.write(1, error="damaged")
    for place in output.places:
        if place != 1:
            output.write(place, label=f"label {place}", score=0.5)
    assert finish([output]) == (len(NAMES) - 1, 1)
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert [line["name"] for line in lines] == NAMES  # once each
    assert lines[1].keys() == {"name", "error"} and not any("error" in line for line in (lines[0], *lines[2:]))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_names_that_are_not_unicode(tmp_path, suffix):
    path, names = tmp_path / f"out{suffix}", ["\udcff.png", "\ud800.png", "ü.png"]
    facts = {**FACTS, "source": "folder \udcff"}
    processes(path, 1, facts, names)[0].write(0, error="cannot read \udcff.png")
    (output,) = processes(path, 1, facts, names)
    for place in output.places:
        output.write(place, label="cat")
    assert finish([output]) == (3, 0)
    if suffix == ".jsonl":
        found = [json.loads(line)["name"] for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        found = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))["name"][:]
    assert found == [r"\xff.png", r"\ud800.png", "ü.png"]


def test_a_process_that_died_leaves_no_incomplete_output(tmp_path):
    path = tmp_path / "out.jsonl"
    first, second = processes(path, 2)
    answer(first)
    answer(second, 1)
    with pytest.raises(RuntimeError, match="5 of 13 images have no answer yet: start again"):
        finish([first, second])
    assert not path.exists()
    (again,) = processes(path, 1)
    answer(again)
    finish([again])
    assert_complete(path)


def test_killed_after_the_output_was_written(tmp_path):
    path = tmp_path / "out.jsonl"
    (output,) = processes(path, 1)
    answer(output)
    output._remove_parts = lambda: None
    finish([output])
    with pytest.raises(FileExistsError, match="complete"):
        processes(path, 1)
    assert_complete(path)


def test_parquet_beside_jsonl_and_unreadable_images(tmp_path):
    """Outputs of different formats have separate parts."""
    (jsonl,), (parquet,) = processes(tmp_path / "out.jsonl", 1), processes(tmp_path / "out.parquet", 1)
    answer(jsonl, 2)
    assert parquet.done == 0
    parquet.write(0, error="no image")
    for place in parquet.places[1:]:
        parquet.write(place, label="cat", score=0.5)
    assert finish([parquet]) == (len(NAMES) - 1, 1)
    table = Dataset.from_parquet(str(tmp_path / "out.parquet"), cache_dir=str(tmp_path / "cache"))
    assert table["name"][:] == NAMES
    assert table["error"][:2] == ["no image", None] and table["label"][:2] == [None, "cat"]
    with pytest.raises(ValueError, match=r"\.jsonl or \.parquet"):
        processes(tmp_path / "out.csv", 1)


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


def test_fingerprints():
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])
    model, processor = lively_model(), evaluation_image_processor(32)
    found = model_fingerprint(model, processor)
    assert found == model_fingerprint(lively_model(), evaluation_image_processor(32))
    assert found != model_fingerprint(model, evaluation_image_processor(32, crop_pct=0.5))
    assert found != model_fingerprint(lively_model(exit_criterion="entropy"), processor)
    assert found != model_fingerprint(lively_model().to(torch.bfloat16), processor)
    with torch.no_grad():
        model.classifier.bias[0] += 1e-3
    assert found != model_fingerprint(model, processor)
