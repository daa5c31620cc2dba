"""Pushes and loads through the real `huggingface_hub` client against a Hub on loopback."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import pipeline

from hf_thinkingvit.hub import push
from hf_thinkingvit.image_processing import evaluation_image_processor
from tests.hub_results import results, staged
from tests.hub_server import TOKEN, running_hub
from tests.models.test_modeling_avit import lively_avit


EXAMPLE = Path(__file__).parents[1] / "examples" / "push_to_hub.py"
IMAGES = EXAMPLE.parent / "images"
CLIENT = Path(__file__).parent / "hub_client.py"


class TestBadPush:
    @pytest.mark.parametrize(
        "repo_id", ["name", "a/b/c", "org/my model", "org/name.git", "-org/name", "org/", "", None, Path("org/name")]
    )
    def test_id_that_is_none(self, repo_id):
        with pytest.raises(ValueError, match='`repo_id` must be of the form "organization/name", got'):
            push(staged(), evaluation_image_processor(32), repo_id)

    def test_model_of_another_kind(self, tmp_path):
        for model in (staged().base_model, torch.nn.Linear(1, 1)):
            with pytest.raises(
                ValueError, match="`model` must be one of ThinkingViTForImageClassification, .*ThinkingSwin"
            ):
                push(model, evaluation_image_processor(32), "org/name", dry_run=tmp_path / "push")
        assert not (tmp_path / "push").exists()

    def test_dry_run_into_a_folder_in_use(self, tmp_path):
        (tmp_path / "mine.txt").touch()
        with pytest.raises(ValueError, match="`dry_run` must be a folder that is empty or does not exist yet"):
            push(staged(), evaluation_image_processor(32), "org/name", dry_run=tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """A results file with a plot beside it."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "results.json").write_text(json.dumps(results(plot="sweep.png")))
    Image.new("RGB", (8, 8)).save(folder / "sweep.png")
    return folder / "results.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Models with their processors, one folder each."""
    folder = tmp_path_factory.mktemp("saved")
    retrained = staged()
    with torch.no_grad():
        retrained.classifier.weight.neg_()
    for name, model in {"thinkingvit": staged(), "avit": lively_avit(), "retrained": retrained}.items():
        model.save_pretrained(folder / name)
        evaluation_image_processor(32).save_pretrained(folder / name)
    return folder


def test_example_writes_everything_to_a_folder(saved, measured, tmp_path, monkeypatch, capsys):
    words = ["--model", saved / "thinkingvit", "--repo-id", "org/animals", "--results", measured, "--license", "mit"]
    words += ["--datasets", "org/animals", "--dry-run", tmp_path / "push"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, words)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert f"written to {tmp_path / 'push'}" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "push").iterdir()}
    assert names >= {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert names >= {"results.json", "sweep.png"}
    card = ModelCard.load(tmp_path / "push" / "README.md")
    assert (card.data.license, card.data.datasets) == ("mit", ["org/animals"])
    assert "![Measured accuracy and cost](sweep.png)" in card.text and 'model="org/animals"' in card.text
    published = json.loads(measured.read_text())
    del published["calibration"]["statement"]  # the card builds it from the facts
    assert json.loads((tmp_path / "push" / "results.json").read_text()) == published
    # All the code that the configuration names, and all that this code imports.
    config = json.loads((tmp_path / "push" / "config.json").read_text())
    assert config["auto_map"].keys() == {
        "AutoBackbone",
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageClassification",
    }
    assert {f"{reference.split('.')[0]}.py" for reference in config["auto_map"].values()} <= names
    for path in (tmp_path / "push").glob("*.py"):
        assert {f"{module}.py" for module in re.findall(r"^from \.(\w+) import", path.read_text(), re.M)} <= names
    classifier = pipeline("image-classification", model=str(tmp_path / "push"))
    assert len(classifier(Image.new("RGB", (40, 40)), top_k=3)) == 3


def online(server, home: Path) -> dict[str, str]:
    """Environment variables for a client that is online with this Hub and has an empty cache."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return environment | {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",  # large files through LFS
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


@pytest.fixture(scope="module")
def server():
    with running_hub() as server:
        yield server
        assert not server.unknown


@pytest.fixture(scope="module")
def client(server, saved, tmp_path_factory):
    """
    `client("avit", "org/name", results=...)` pushes that model (a Space for `None`) from another process and returns
    the result.
    """
    environment = online(server, tmp_path_factory.mktemp("client"))
    command = [sys.executable, str(CLIENT)]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:

        def push_from_there(name: str | None, repo_id: str, logged_in_with: str | None = TOKEN, **arguments) -> dict:
            folder = None if name is None else str(saved / name)
            job = {"folder": folder, "repo_id": repo_id, "logged_in_with": logged_in_with, **arguments}
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield push_from_there
        process.stdin.close()


@pytest.fixture(autouse=True)
def healthy(request):
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").fail_at = None


class TestPush:
    def test_one_commit_with_everything(self, client, server, measured):
        outcome = client("thinkingvit", "org/animals", results=str(measured), commit_message="First")
        assert "commit" in outcome, outcome
        (_, before), (sha, files) = server.repositories["org/animals"].commits
        assert sha == outcome["commit"] and before.keys() == {".gitattributes"}
        assert files.keys() >= {"config.json", "model.safetensors", "modeling_thinkingvit.py", "nested_vit.py"}
        assert files.keys() >= {"preprocessor_config.json", "README.md", "results.json", "sweep.png"}
        assert files["sweep.png"] == measured.with_name("sweep.png").read_bytes()
        assert not server.repositories["org/animals"].private

    def test_again_changes_nothing(self, client, server, measured):
        for _ in range(2):
            assert "commit" in client("thinkingvit", "org/again", results=str(measured))
        assert len(server.repositories["org/again"].commits) == 2

    @pytest.mark.parametrize("fail_at", ["upload", "commit"])
    def test_interrupted_leaves_the_repository_as_it_was(self, client, server, measured, fail_at):
        name = f"org/interrupted-{fail_at}"
        assert "commit" in client("thinkingvit", name, results=str(measured))
        before = list(server.repositories[name].commits)
        server.fail_at = fail_at
        server.blobs.clear()  # so that there is something to upload
        seen = len(server.requests)
        assert "error" in client("retrained", name)
        assert any(("/commit/" if fail_at == "commit" else "PUT /lfs/") in line for line in server.requests[seen:])
        assert server.repositories[name].commits == before
        server.fail_at = None
        assert "commit" in client("retrained", name)
        assert server.repositories[name].files["model.safetensors"] != before[-1][1]["model.safetensors"]

    def test_new_weights_do_not_keep_old_results(self, client, server, measured):
        client("thinkingvit", "org/stale", results=str(measured))
        client("retrained", "org/stale")
        (_, before), (_, after) = server.repositories["org/stale"].commits[1:]
        assert "results.json" in before and "results.json" not in after
        assert "4321" in before["README.md"].decode() and "4321" not in after["README.md"].decode()

    def test_private(self, client, server):
        client("avit", "org/hidden", private=True)
        assert server.repositories["org/hidden"].private
        client("avit", "org/open")
        outcome = client("retrained", "org/open", private=True)
        assert outcome["error"] == "ValueError" and "org/open exists and is public" in outcome["message"]
        assert len(server.repositories["org/open"].commits) == 2

    def test_without_a_token_says_how_to_log_in_and_asks_nothing_of_the_hub(self, client, server):
        seen = len(server.requests)
        outcome = client("avit", "org/nobody", logged_in_with=None)
        assert outcome["error"] == "PermissionError" and "hf auth login" in outcome["message"]
        assert len(server.requests) == seen
        assert "commit" in client("avit", "org/somebody", logged_in_with=None, token=TOKEN)

    @pytest.mark.parametrize("repo_id, token", [("org/refused", "hf_wrong"), ("strangers/model", TOKEN)])
    def test_token_that_may_not_write(self, client, server, repo_id, token):
        outcome = client("avit", repo_id, token=token)
        assert outcome["error"] == "PermissionError"
        assert f"does not let this token write to {repo_id}" in outcome["message"]
        assert repo_id not in server.repositories

    def test_bad_results_ask_nothing_of_the_hub(self, client, server):
        seen = len(server.requests)
        outcome = client("avit", "org/wrong", results=results())
        assert outcome["error"] == "ValueError" and len(server.requests) == seen


class TestPushSpace:
    def test_one_commit_with_the_page_and_the_package(self, client, server):
        outcome = client(None, "org/animals-demo", models=["org/animals"], samples=[str(IMAGES / "cat.png")])
        assert "commit" in outcome, outcome
        (_, before), (sha, files) = server.repositories["spaces/org/animals-demo"].commits
        assert sha == outcome["commit"] and before.keys() == {".gitattributes"}
        assert files.keys() >= {"app.py", "README.md", "requirements.txt", "hf_thinkingvit/demo/app.py"}
        assert files["images/cat.png"] == (IMAGES / "cat.png").read_bytes()
        assert b"- org/animals" in files["README.md"] and b"sdk: gradio" in files["README.md"]
        assert "org/animals-demo" not in server.repositories

    def test_modules_of_an_earlier_version_go(self, client, server):
        client(None, "org/moving", models=["org/animals"])
        repository = server.repositories["spaces/org/moving"]
        repository.commit({**repository.files, "hf_thinkingvit/old.py": b"", "notes.md": b"mine"})
        assert "commit" in client(None, "org/moving", models=["org/animals"])
        assert "hf_thinkingvit/old.py" not in repository.files and repository.files["notes.md"] == b"mine"

    def test_without_a_token(self, client, server):
        seen = len(server.requests)
        outcome = client(None, "org/nobody", logged_in_with=None, models=["org/animals"])
        assert outcome["error"] == "PermissionError" and len(server.requests) == seen


LOAD = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_thinkingvit":
            raise ModuleNotFoundError(name)

how, image, *repo_ids = sys.argv[1:]
if how == "package":
    import hf_thinkingvit
else:
    sys.meta_path.insert(0, Blocked())
from transformers import pipeline

for repo_id in repo_ids:
    arguments = {} if how == "package" else {"trust_remote_code": True}
    classifier = pipeline("image-classification", model=repo_id, **arguments)
    print(json.dumps([type(classifier.model).__module__, classifier(image, top_k=3)]))
"""


@pytest.mark.parametrize("how", ["package", "remote code"])
def test_pipeline_from_an_empty_cache(how, client, server, saved, tmp_path):
    families = {"thinkingvit": "org/loaded-thinkingvit", "avit": "org/loaded-avit"}
    for family, repo_id in families.items():
        assert "commit" in client(family, repo_id)
    image = tmp_path / "image.png"
    pixels = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    environment = online(server, tmp_path / "home")
    if how == "package":
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    isolated = ["-I"] if how == "remote code" else []  # no PYTHONPATH, no working directory on the path
    command = [sys.executable, *isolated, "-c", LOAD, how, str(image), *families.values()]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    answers = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("[")]
    for (family, repo_id), (module, found) in zip(families.items(), answers, strict=True):
        assert module.startswith("hf_thinkingvit." if how == "package" else "transformers_modules.")
        assert f"GET /{repo_id}/resolve" in " ".join(server.requests)
        expected = pipeline("image-classification", model=str(saved / family))(str(image), top_k=3)
        assert [answer["label"] for answer in found] == [answer["label"] for answer in expected]
        scores = [answer["score"] for answer in expected]
        assert [answer["score"] for answer in found] == pytest.approx(scores, abs=1e-5)
