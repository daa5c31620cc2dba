import json
import os

import pytest
import torch
from accelerate import Accelerator

from hf_thinkingvit.training.checkpoints import Checkpoints, find_damage, list_checkpoints


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
    assert checkpoints.load(path) == {"step": 1}
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
