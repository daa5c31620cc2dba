"""Official checkpoints by `from_pretrained` from a Hub on this machine."""

import io
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from hf_thinkingvit import ThinkingViTForImageClassification
from tests.conversion.test_loading import FOLDER
from tests.hub_server import TOKEN, Repository, running_hub
from tests.test_hub import online


LOAD = """
import json, sys
import torch
from safetensors.torch import load_file
from hf_thinkingvit import ThinkingViTForImageClassification
from hf_thinkingvit.commands.loading import load_model

expected, *jobs = sys.argv[1:]
expected = load_file(expected)
for job in jobs:
    repo_id, arguments = json.loads(job)
    by_command = arguments.pop("by_command", False)
    load = load_model if by_command else ThinkingViTForImageClassification.from_pretrained_with_processor
    try:
        model, processor = load(repo_id, **arguments)
    except Exception as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)[:300]}))
        continue
    with torch.no_grad():
        logits = model(expected["pixel_values"], threshold=0.0).logits
    difference = (logits - expected["stage2.logits"]).abs().max().item()
    size = processor.size["shortest_edge"]
    print(json.dumps({"difference": difference, "threshold": model.config.threshold, "size": size}))
"""


def load_from_there(server, home: Path, *jobs: tuple[str, dict]) -> list[dict]:
    """Loads in another process, whose client asks this Hub and caches in `home`."""
    environment = {**online(server, home), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", LOAD, str(FOLDER / "expected.safetensors"), *map(json.dumps, jobs)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def server():
    """A Hub with an official checkpoint, whose newest commit has other weights, and a private copy of it."""
    config = (FOLDER / "config.json").read_bytes()
    weights = load_file(FOLDER / "model.safetensors")
    with running_hub() as server:
        for repo_id, private in (("authors/thinkingvit", False), ("org/private", True)):
            repository = server.repositories[repo_id] = Repository(private)
            for factor in (1, 2):
                changed = {**weights, "head.weight": factor * weights["head.weight"]}
                files = {"config.json": config, "model.safetensors": save(changed), "README.md": b"#"}
                repository.commit({**files, "pytorch_model.bin": b"not wanted", "other.pth": b"not wanted"})
        bare = server.repositories["authors/bare"] = Repository(private=False)
        content = io.BytesIO()
        torch.save({"state_dict": weights}, content)
        bare.commit({"thinkingvit.pth.tar": content.getvalue(), "README.md": b"#"})
        yield server


@pytest.mark.slow
def test_from_a_hub(server, tmp_path):
    public, (pinned, old) = "authors/thinkingvit", (each[1][0] for each in _commits(server))
    if find_spec("peft") is not None:
        _add_adapters(server, tmp_path, public, pinned)
        adapters = [("authors/adapters", {}), ("authors/adapters", {"local_files_only": True})]
    else:
        adapters = []
    found = load_from_there(
        server,
        tmp_path,
        (public, {"threshold": 0.9}),
        (public, {"threshold": 0.9, "revision": pinned}),
        (public, {"local_files_only": True}),
        (public, {"local_files_only": True, "revision": pinned}),
        (public, {}),
        (public, {"cache_dir": str(tmp_path / "elsewhere"), "revision": pinned}),
        ("org/private", {"revision": old, "token": TOKEN}),
        ("org/private", {}),
        ("org/missing", {}),
        (public, {"config": str(tmp_path)}),  # with which Transformers would draw every weight
        ("authors/bare", {"config": str(tmp_path)}),
        ("authors/bare", {"thinking_stages": [1, 2, 4], "image_size": 32}),
        ("authors/bare", {"thinking_stages": [1, 2, 4], "image_size": 32, "local_files_only": True}),
        (public, {"by_command": True, "revision": pinned}),
        *adapters,
    )
    assert len(found) == 14 + len(adapters)
    newest, *others = found[:7]
    assert newest["difference"] > 0.1 and newest["threshold"] == 0.9 and newest["size"] == 35
    assert [each["difference"] < 1e-4 for each in others] == [True, False, True, False, True, True]
    assert (tmp_path / "elsewhere").is_dir()
    assert [each["error"] for each in found[7:11]] == ["OSError", "OSError", "ValueError", "ValueError"]
    assert "org/private" in found[7]["message"] and all("`config`" in each["message"] for each in found[9:11])
    assert all(each["difference"] < 1e-4 for each in found[11:])
    assert not [line for line in server.requests if line.startswith("GET") and line.endswith((".bin", "/other.pth"))]
    # Once for each commit and cache: other loads are from the cache.
    assert _downloads(server, public) == 3


def _commits(server) -> list[list[tuple]]:
    return [server.repositories[repo_id].commits for repo_id in ("authors/thinkingvit", "org/private")]


def _add_adapters(server, tmp_path: Path, base: str, revision: str) -> None:
    """A repository of new adapters, which change no answer."""
    import peft

    model = ThinkingViTForImageClassification.from_pretrained(FOLDER)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapters")
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": base, "revision": revision}
    weights = (tmp_path / "adapters" / "adapter_model.safetensors").read_bytes()
    repository = server.repositories["authors/adapters"] = Repository(private=False)
    repository.commit({"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": weights})


def _downloads(server, repo_id: str) -> int:
    return sum(
        line.startswith(f"GET /{repo_id}/resolve/") and line.endswith("/model.safetensors") for line in server.requests
    )
