"""Model cards, and pushes and loads through the real `huggingface_hub` client against a Hub on loopback."""

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

from hf_thinkingvit.evaluation import model_conditions, stage_macs
from hf_thinkingvit.hub import accuracy_results, model_card, push
from hf_thinkingvit.image_processing import evaluation_image_processor
from tests.hub_server import TOKEN, running_hub
from tests.models.test_modeling_avit import lively_avit
from tests.utils import lively_model, lively_swin


EXAMPLE = Path(__file__).parents[1] / "examples" / "push_to_hub.py"
CLIENT = Path(__file__).parent / "hub_client.py"


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


def metrics(card: ModelCard) -> dict[str, float]:
    return {result.metric_name: result.metric_value for result in card.data.eval_results or []}


class TestCard:
    def test_shows_what_was_measured(self):
        text = str(model_card(staged(), results(plot=None), name="animals", source="org/animals-vit"))
        assert "On 4321 images of `org/animals`, split `test`." in text
        assert "| stage 0 | 61.50 | 90.25 | 0.25 |" in text and "| stage 1 | 72.12 | 95.00 | 1.5 |" in text
        assert "| 0.3 | 77.00 | 95.00 | 0.5 | 25.0 % | 75.0 % |" in text
        assert "It keeps the promise." in text and "* ε, the greatest risk asked for: 0.01" in text
        assert "* epochs: 7" in text and "batch size" not in text

    def test_metadata_for_the_hub(self):
        card = model_card(staged(), results(), name="animals", license="mit", datasets="org/animals")
        card = ModelCard(str(card))  # as the Hub reads it
        data = card.data.to_dict()
        assert (data["pipeline_tag"], data["library_name"]) == ("image-classification", "transformers")
        assert (data["license"], data["datasets"]) == ("mit", ["org/animals"])
        assert {result.dataset_split for result in card.data.eval_results} == {"test"}
        assert metrics(card) == {
            "top-1 accuracy, every image through all stages": 72.12,
            "top-5 accuracy, every image through all stages": 95,
            "top-1 accuracy at τ = 0.5": 75,
            "top-5 accuracy at τ = 0.5": 95.0,
        }

    def test_stage_schedule_is_that_of_the_configuration(self):
        model = staged(thinking_stages=[1, 2, 4], threshold=[0.5, 0.25])
        first, second, third = stage_macs(model.config)
        text = str(model_card(model, name="animals"))
        assert f"| stage 1 | 2 | 16 | {(first + second) / 1e9:.4g} |" in text
        assert f"| stage 2 | 4 | 32 | {(first + second + third) / 1e9:.4g} |" in text
        assert "The configuration has τ = 0.5, 0.25." in text

    def test_stage_schedule_of_a_hierarchy(self):
        model = lively_swin(head_rounds=[[1, 2], [2, 4]])
        first, second = stage_macs(model.config)
        text = str(model_card(model, name="animals"))
        assert f"| stage 0 | 1, 2 | 8 | {first / 1e9:.4g} |" in text
        assert f"| stage 1 | 2, 4 | 16 | {(first + second) / 1e9:.4g} |" in text
        assert "on a Swin Transformer" in text and "32 × 32 pixels" in text and "patches of 4 × 4 pixels" in text
        assert "2 layers of 2 and 1 blocks" in text

    def test_usage_runs(self, tmp_path):
        for model in (staged(), lively_swin(), lively_avit()):
            folder = tmp_path / model.config.model_type
            model.save_pretrained(folder)
            evaluation_image_processor(32).save_pretrained(folder)
            text = str(model_card(model, name="animals", source=str(folder)))
            code = re.search("```python\n(.*?)```", text, re.DOTALL)[1]
            assert "from_pretrained" in code and "pipeline(" in code
            image = tmp_path / "image.jpg"
            Image.new("RGB", (40, 40)).save(image)
            names = {}
            exec(code.replace('"image.jpg"', repr(str(image))), names)
            assert type(names["model"]) is type(model)

    @pytest.mark.parametrize("make", [staged, lively_swin, lively_avit])
    def test_leaves_out_what_was_not_measured(self, make):
        model = make()
        card = model_card(model, name="animals")
        headings = re.findall("^## (.*)", str(card), re.MULTILINE)
        assert headings == ["Use", *([] if make is lively_avit else ["Stages"]), "Limits", "Citation"]
        assert not {"model-index", "license", "datasets", "model_name"} & card.data.to_dict().keys()
        for empty in ("None", "N/A", "nan", "Undefined", "![", "\n\n\n"):
            assert empty not in str(card)

    def test_leaves_out_a_column_that_not_every_row_has(self):
        rows = sweep(3)
        del rows[1]["gmacs"], rows[2]["exit_shares"]
        text = str(model_card(staged(), results(sweep=rows, stages=None), name="animals"))
        assert "| τ | top-1 (%) | top-5 (%) |\n" in text

    def test_says_nothing_of_tau_where_there_is_none(self):
        text = str(model_card(staged(thinking_stages=[4]), name="animals"))
        assert "| stage 0 | 4 | 32 |" in text and "τ = " not in text and "from_pretrained(" not in text

    def test_shows_a_long_sweep_at_even_distances_and_at_the_models_threshold(self):
        text = str(model_card(staged(threshold=9.9), results(sweep=sweep(201)[:80]), name="animals"))
        assert "12 of 80 thresholds" in text
        rows = re.findall(r"^\| ([\d.]+) \| \d+\.00 \|", text, re.MULTILINE)
        assert (len(rows), rows[0], rows[-1]) == (12, "0", "7.9")
        text = str(model_card(staged(threshold=[0.5]), results(sweep=sweep(80)), name="animals"))
        assert "13 of 80 thresholds" in text and "| 0.5 | 75.00 |" in text

    def test_of_what_training_evaluates(self):
        model = staged()
        measured = {"top1": [50.0, 60.0], "top5": [100.0, 100.0], "images": 10}
        card = model_card(model, accuracy_results(model, measured, "digits", split=None), name="digits")
        first, second = stage_macs(model.config)
        assert f"| stage 1 | 60.00 | 100.00 | {(first + second) / 1e9:.4g} |" in str(card)
        model = lively_avit()
        measured = {"top1": [50.0], "top5": [70.0], "images": 10, "mean_depth": 3.25, "macs": 2.5e8}
        card = model_card(model, accuracy_results(model, measured, "digits", training={"seed": 0}), name="digits")
        assert "| 50.00 | 70.00 | 3.25 | 0.25 |" in str(card) and "* seed: 0" in str(card)
        assert metrics(card) == {"top-1 accuracy": 50.0, "top-5 accuracy": 70.0}

    def test_card_of_the_official_model_claims_no_figure(self):
        card = ModelCard((Path(__file__).parents[1] / "MODEL_CARD.md").read_text(encoding="utf-8"))
        data = card.data.to_dict()
        assert (data["pipeline_tag"], data["library_name"]) == ("image-classification", "transformers")
        assert "model-index" not in data
        assert "the authors' own" in card.text


class TestBadResults:
    @pytest.mark.parametrize(
        "overrides, message",
        [
            ({"dataset": None}, "`dataset` must name what the results were measured on"),
            ({"images": 0}, "`images` must be an integer of at least 1"),
            ({"stages": [{"top1": 50}] * 3}, "The results are of 3 stages, but the model has 2"),
            ({"stages": "60"}, "`stages` of the results must be a sequence"),
            ({"stages": [{"top1": 50}, {"top5": 50}]}, r"`stages\[1\]` of the results must be a mapping with `top1`"),
            (
                {"stages": [{"top1": 50}, {"top1": float("nan")}]},
                r"`stages\[1\].top1` must be a number between 0 and 100",
            ),
            ({"sweep": [{"top1": 50}]}, r"`sweep\[0\]` of the results: `threshold` must be a number"),
            ({"sweep": [{"threshold": [1, 2], "top1": 50}]}, r"`sweep\[0\]` .* a list of 1, one per exit"),
            ({"sweep": [{"threshold": 1, "top1": 5, "exit_shares": [1]}]}, "must have 2 entries, one per stage"),
            ({"sweep": [{"threshold": 1, "top1": 5, "exit_shares": [0.5, 0.4]}]}, "must sum to 1"),
            ({"calibration": {"threshold": "0.5"}}, "`calibration` of the results: `threshold` must be a number"),
            ({"criterion": "margin"}, "measured with the criterion 'margin', but the model's `exit_criterion` is"),
            ({"plot": "missing.png"}, "`plot` must name a picture"),
            ({"plot": "config.json"}, "`plot` must name a picture"),
        ],
    )
    def test_one_clear_error(self, overrides, message):
        with pytest.raises(ValueError, match=message):
            model_card(staged(), results(**overrides), name="animals")

    def test_stages_of_a_model_without(self):
        with pytest.raises(ValueError, match="thinks in stages, which `avit` does not"):
            model_card(lively_avit(), results(), name="animals")

    @pytest.mark.parametrize("content", [None, b"{", b"[1]", b"\xff\xfe"])
    def test_unreadable_file(self, content, tmp_path):
        path = tmp_path / "results.json"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=r"results file .*results\.json"):
            model_card(staged(), path, name="animals")


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
                ValueError, match="`model` must be one of ThinkingViTForImageClassification, ThinkingSwin"
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
    assert config["auto_map"].keys() == {"AutoConfig", "AutoModel", "AutoModelForImageClassification"}
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
    """`client("avit", "org/name", results=...)` pushes that model from another process and returns the result."""
    environment = online(server, tmp_path_factory.mktemp("client"))
    command = [sys.executable, str(CLIENT)]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:

        def push_from_there(name: str, repo_id: str, logged_in_with: str | None = TOKEN, **arguments) -> dict:
            job = {"folder": str(saved / name), "repo_id": repo_id, "logged_in_with": logged_in_with, **arguments}
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
