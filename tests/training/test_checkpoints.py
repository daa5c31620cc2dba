import json
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from hf_thinkingvit.training.checkpoints import (
    Checkpoints,
    find_damage,
    list_checkpoints,
    recover_folder,
    replacing_folder,
)


@pytest.fixture
def checkpoints(tmp_path):
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    made = Checkpoints(tmp_path, accelerator, torch.nn.Linear(3, 2), keep=2)
    made.model, made.optimizer = model, optimizer
    return made


def train_a_step(checkpoints) -> None:
    checkpoints.model(torch.ones(1, 3)).sum().backward()
    checkpoints.optimizer.step()


def state(checkpoints) -> list[torch.Tensor]:
    moments = [value for entry in checkpoints.optimizer.state.values() for value in entry.values()]
    return [
        tensor.detach().clone() for tensor in (*checkpoints.model.parameters(), *checkpoints.ema.parameters(), *moments)
    ]


def test_restores_everything(checkpoints):
    train_a_step(checkpoints)
    expected = state(checkpoints)
    path = checkpoints.save(1, {"step": 1})
    train_a_step(checkpoints)
    with torch.no_grad():
        checkpoints.ema.weight.zero_()
    checkpoints.load(path)
    assert checkpoints.read(path) == {"step": 1}
    assert all(torch.equal(one, other) for one, other in zip(expected, state(checkpoints), strict=True))


def test_keeps_the_newest(checkpoints, tmp_path):
    for step in (1, 2, 30):
        checkpoints.save(step, {})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000030", "step-00000002"]
    assert checkpoints.find("auto").name == "step-00000030"


def damage_by_cutting(path):
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def damage_by_a_bit(path):
    file = path / "optimizer.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage_by_loss(path):
    (path / "ema.safetensors").unlink()


def damage_of_the_manifest(path):
    (path / "manifest.json").write_text("{")


@pytest.mark.parametrize("damage", [damage_by_cutting, damage_by_a_bit, damage_by_loss, damage_of_the_manifest])
def test_a_damaged_checkpoint_is_passed_over(checkpoints, damage, caplog):
    checkpoints.save(1, {})
    newest = checkpoints.save(2, {})
    damage(newest)
    assert find_damage(newest)
    assert checkpoints.find("auto").name == "step-00000001"
    assert "step-00000002 is damaged" in caplog.text
    with pytest.raises(ValueError, match="damaged"):
        checkpoints.find(str(newest))


def test_never_begins_anew_over_damaged_ones(checkpoints):
    damage_by_cutting(checkpoints.save(1, {}))
    with pytest.raises(ValueError, match="All checkpoints to resume from are damaged"):
        checkpoints.find("auto")


def test_one_cut_short_while_it_was_written_is_none(checkpoints, tmp_path):
    partial = tmp_path / ".step-00000009.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert checkpoints.find("auto") is None
    assert checkpoints.save(9, {}) == tmp_path / "step-00000009"
    assert not partial.exists()


def test_the_manifest_lists_every_file(checkpoints):
    path = checkpoints.save(1, {})
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {"manifest.json"}
    assert set(json.loads((path / "manifest.json").read_text())) == files


@contextmanager
def full_disk(room: int):
    """Limit files to `room` bytes: writing more raises an error, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("room", [0, 150, 500])  # too small for any file; for the weights; for the optimizer
def test_a_full_disk_leaves_what_there_was(checkpoints, tmp_path, room):
    before = checkpoints.save(1, {})
    with pytest.raises(OSError, match="step-00000002 could not be written .* It is as it was"), full_disk(room):
        checkpoints.save(2, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoints.last_good == before
    assert find_damage(before) is None


def test_later_checkpoints_of_another_continuation_do_not_count(checkpoints, tmp_path):
    for step in (30, 1, 2, 3):
        checkpoints.save(step, {})
    assert {path.name for path in list_checkpoints(tmp_path)} == {"step-00000030", "step-00000003", "step-00000002"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("survives", [0, 1, 2])
def test_a_kill_in_a_replacement_leaves_a_whole_folder(tmp_path, monkeypatch, survives):
    """`survives` renames succeed before the kill."""
    with replacing_folder(tmp_path / "best") as folder:
        (folder / "weights").write_text("old")
    rename, done = Path.rename, []

    def rename_or_die(path, target):
        if len(done) == survives:
            raise Killed
        done.append(target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_or_die)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # a killed process does not clean up
    try:
        with replacing_folder(tmp_path / "best") as folder:
            (folder / "weights").write_text("new")
    except Killed:
        pass
    monkeypatch.undo()
    recover_folder(tmp_path / "best")
    assert (tmp_path / "best" / "weights").read_text() == ("new" if survives == 2 else "old")
    with replacing_folder(tmp_path / "best") as folder:
        (folder / "weights").write_text("newest")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert (tmp_path / "best" / "weights").read_text() == "newest"


class TestResume:
    def test_what_does_not_exist_is_told_with_what_does(self, checkpoints, tmp_path):
        with pytest.raises(ValueError, match=r"there is no checkpoint .*nosuch, nor any in "):
            checkpoints.find(str(tmp_path / "nosuch"))
        path = checkpoints.save(1, {})
        for wrong in (tmp_path / "nosuch", tmp_path / "step-00000002", tmp_path.parent / "elsewhere" / "x"):
            with pytest.raises(ValueError, match=f"there is no checkpoint {wrong}; there are {path}"):
                checkpoints.find(str(wrong))

    def test_a_folder_of_checkpoints_means_its_newest_undamaged(self, checkpoints, tmp_path):
        checkpoints.save(1, {})
        damage_by_a_bit(checkpoints.save(2, {}))
        assert checkpoints.find(str(tmp_path)).name == "step-00000001"

    def test_a_run_means_its_newest(self, checkpoints, tmp_path):
        checkpoints.folder = tmp_path / "run" / "checkpoints"
        path = checkpoints.save(1, {})
        assert checkpoints.find(str(tmp_path / "run")) == path

    def test_says_what_is_damaged(self, checkpoints):
        path = checkpoints.save(1, {})
        damage_by_loss(path)
        with pytest.raises(ValueError, match=f"damaged: {path}: ema.safetensors is missing"):
            checkpoints.find(str(path))
