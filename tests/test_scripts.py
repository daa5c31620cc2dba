"""The example scripts as a user runs them, on a tiny model and random images."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import traceback
import unittest.mock
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, Features, Image
from transformers import AutoModelForImageClassification, pipeline

from hf_thinkingvit.commands.classify import find_images
from hf_thinkingvit.evaluation import stage_macs
from hf_thinkingvit.image_processing import evaluation_image_processor
from tests.training.tiny_runs import LABELS, encoded_image, write_images
from tests.utils import lively_model


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: index for index, label in enumerate(LABELS)}}
    lively_model(thinking_stages=[1, 4], num_hidden_layers=1, num_labels=3, **names).save_pretrained(folder / "model")
    evaluation_image_processor(32).save_pretrained(folder / "model")
    (folder / "images").mkdir()
    write_images(folder / "images", num_train=4, num_test=120)
    return folder


def run(script: str, folders: Path, *words: str, processes: int = 1) -> subprocess.CompletedProcess:
    command = [EXAMPLES / script, "--model", folders / "model"]
    command += [] if "--images" in words else ["--dataset", folders / "images"]
    command = [*map(str, command), *words]
    if processes == 1 and not torch.cuda.is_available():  # results are compared, so all must be computed on the CPU
        return run_here(command)
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        start += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        start += ["--main_process_port", "0"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*start, *command], capture_output=True, text=True, env=environment, check=False)


def run_here(command: list[str]) -> subprocess.CompletedProcess:
    """Run the script in this process, because imports take longer than the scripts themselves."""
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with (
        unittest.mock.patch.object(sys, "argv", command),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):  # the interpreter prints it, too
                print(stop.code, file=sys.stderr)
        except Exception:
            code = 1
            traceback.print_exc()
        finally:
            AcceleratorState._reset_state(True)
    return subprocess.CompletedProcess(command, code, output.getvalue(), errors.getvalue())


def test_sweep_thresholds(folders, tmp_path):
    words = ["--thresholds", "0", "0.5", "2", "--label-map", "index"]
    done = run("sweep_thresholds.py", folders, "--output-dir", str(tmp_path), *words)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["threshold"] for row in results["sweep"]] == [0.0, 0.5, 2.0]
    assert results["images"] == 120
    first = results["sweep"][0]
    assert f"{first['top1']:.2f}" in done.stdout
    for name in ("sweep", "exit_shares", "scores_stage_0"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")


def test_several_processes_sweep_what_one_does(folders, tmp_path):
    """117 images in batches of 8: images that are repeated to fill the last batches count once."""
    words = ["--thresholds", "0", "0.5", "1", "2", "--max-samples", "117", "--batch-size", "8"]
    for processes in (1, 2):
        done = run(
            "sweep_thresholds.py", folders, "--output-dir", str(tmp_path / str(processes)), *words, processes=processes
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("top-1 %") == 1  # only one process prints
    one, two = (json.loads((tmp_path / str(count) / "results.json").read_text()) for count in (1, 2))
    assert one["images"] == 117
    assert one == two


def test_sweep_keep_rates(folders, tmp_path):
    """Each rate is measured and counted at its own number of patches; the unpruned model stands beside."""
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: index for index, label in enumerate(LABELS)}}
    pruned = lively_model(thinking_stages=[1, 4], num_labels=3, pruning_layers=[1], pruning_keep_rate=0.5, **names)
    pruned.save_pretrained(tmp_path / "pruned")
    evaluation_image_processor(32).save_pretrained(tmp_path / "pruned")
    words = ["--unpruned", str(folders / "model"), "--model", str(tmp_path / "pruned"), "--keep-rates", "1", "0.5"]
    words += ["--thresholds", "0", "100", "--max-samples", "20", "--output-dir", str(tmp_path)]
    done = run("sweep_keep_rates.py", folders, *words)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "keep_rates.json").read_text())
    assert [(row["keep_rate"], row["threshold"]) for row in rows[2:]] == [(1, 0), (1, 100), (0.5, 0), (0.5, 100)]
    for row in rows[2:]:
        macs = stage_macs(
            pruned.config.__class__.from_dict(pruned.config.to_dict(), pruning_keep_rate=row["keep_rate"])
        )
        assert row["gmacs"] == pytest.approx(sum(macs[: 1 if row["threshold"] else 2]) / 1e9)
    assert rows[2]["gmacs"] > rows[4]["gmacs"] and rows[3]["gmacs"] == rows[5]["gmacs"]
    assert len((tmp_path / "keep_rates.csv").read_text().splitlines()) == 7


def test_calibrate_by_budget(folders, tmp_path):
    goal = 0.0002
    words = ["--gmacs", str(goal), "--label-map", str(tmp_path / "map.json")]
    (tmp_path / "map.json").write_text(json.dumps({LABELS[0]: LABELS[1]}))
    done = run("calibrate.py", folders, "--output-dir", str(tmp_path), *words)
    assert done.returncode != 0
    assert "2 labels of" in done.stderr  # those that the map leaves out
    (tmp_path / "map.json").write_text(json.dumps({label: index for index, label in enumerate(LABELS)}))
    done = run("calibrate.py", folders, "--output-dir", str(tmp_path), *words)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "calibration.json").read_text())
    assert facts["gmacs"] <= goal
    assert facts["check_images"]["images"] == facts["calibration_images"]["images"] == 60
    config = AutoModelForImageClassification.from_pretrained(tmp_path).config
    assert config.threshold == facts["threshold"]
    assert config.calibration["budget"] == goal


def test_calibrate_by_promise(folders, tmp_path):
    few = run("calibrate.py", folders, "--output-dir", str(tmp_path), "--max-drop", "0.01")
    assert few.returncode != 0
    assert "60 images are too few" in few.stderr
    done = run("calibrate.py", folders, "--output-dir", str(tmp_path), "--max-drop", "0.4", "--delta", "0.1")
    assert done.returncode == 0, done.stderr
    assert "With probability at least 90%" in done.stdout


def test_classify_folder(folders, tmp_path):
    """With an unreadable file, a run aborted in the middle of a line, more processes, and Parquet."""
    pictures = tmp_path / "pictures"
    (pictures / "deeper").mkdir(parents=True)
    for index in range(9):
        (pictures / ("deeper" if index % 2 else ".") / f"{index}.png").write_bytes(encoded_image(index))
    (pictures / "7broken.png").write_bytes(b"no image")
    (pictures / os.fsdecode(b"\xff.png")).write_bytes(b"no image")
    output = tmp_path / "out" / "found.jsonl"
    words = ["--images", str(pictures), "--output", str(output)]
    done = run("classify_folder.py", folders, *words)
    assert done.returncode == 0, done.stderr
    assert "7broken.png" in done.stderr and r"\xff.png" in done.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["name"] for line in lines if "error" in line] == ["7broken.png", r"\xff.png"]
    assert "2 could not be read" in done.stdout
    lines = [line for line in lines if "error" not in line]
    assert [line["name"] for line in lines] == ["0.png", "2.png", "4.png", "6.png", "8.png"] + [
        f"deeper/{index}.png" for index in (1, 3, 5, 7)
    ]
    classifier = pipeline("adaptive-image-classification", model=str(folders / "model"), top_k=1)
    for line in lines:
        (expected,) = classifier(str(pictures / line["name"]))
        assert (line["label"], line["exit_stage"]) == (expected["label"], expected["exit_stage"])
        assert line["score"] == pytest.approx(expected["score"], abs=1e-4)
    facts = json.loads((output.parent / "found.jsonl.run.json").read_text())
    expected = {"model": "model", "source": "pictures", "split": None, "images": 11, "threshold": 0.0}
    assert {name: facts[name] for name in expected} == expected

    output.unlink()
    earlier = {"place": 0, **lines[0], "label": "of the earlier run"}
    (output.parent / ".found.jsonl.0.part").write_text(json.dumps(earlier) + '\n{"place": 2, "na')
    done = run("classify_folder.py", folders, *words, processes=2)
    assert done.returncode == 0, done.stderr
    again = [line for line in map(json.loads, output.read_text().splitlines()) if "error" not in line]
    assert again[0] == {**lines[0], "label": "of the earlier run"}  # not computed again
    for line, other in zip(lines[1:], again[1:], strict=True):
        assert all(line[name] == other[name] for name in ("name", "label", "exit_stage"))

    output.unlink()
    (output.parent / ".found.jsonl.0.part").write_text(json.dumps(earlier) + "\n")
    picture = pictures / "2.png"
    content, changed = picture.read_bytes(), picture.stat().st_mtime_ns + 1_000_000
    picture.write_bytes(content[::-1])  # of the same size
    os.utime(picture, ns=(changed, changed))
    done = run("classify_folder.py", folders, *words)
    assert done.returncode == 2 and "is of other images" in done.stderr and not output.exists()

    table = tmp_path / "found.parquet"
    done = run("classify_folder.py", folders, "--images", str(folders / "images"), "--output", str(table))
    assert done.returncode == 0, done.stderr
    assert len(Dataset.from_parquet(str(table))) == 120


def test_a_dataset_of_other_images_is_told_from_the_earlier_one(tmp_path):
    """Whichever row differs."""
    contents = []
    for seed in (100, 200):
        images = [{"bytes": encoded_image(index if index != 37 else seed), "path": None} for index in range(40)]
        features = Features({"image": Image()})
        Dataset.from_dict({"image": images}, features=features).to_parquet(tmp_path / "rows.parquet")
        contents += [find_images(str(tmp_path / "rows.parquet"), "train", None).identities for _ in range(2)]
    assert contents[0] == contents[1] != contents[2] == contents[3]


def test_export_onnx(folders, tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "images").mkdir()
    for index in range(3):
        (tmp_path / "images" / f"{index}.png").write_bytes(encoded_image(index))
    (tmp_path / "images" / "broken.png").write_bytes(b"broken")
    words = ["--images", str(tmp_path / "images"), "--output-dir", str(tmp_path / "onnx"), "--threshold", "1.0"]
    wrong = run("export_onnx.py", folders, *words, "2.0")
    assert wrong.returncode == 2 and "one per exit" in wrong.stderr and not (tmp_path / "onnx").exists()
    done = run("export_onnx.py", folders, *words)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {"adaptive.onnx", "stage_0.onnx", "stage_1.onnx"}
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith(("0.png", "1.png", "2.png"))]
    assert len(rows) == 3 and "broken.png | cannot be read" in done.stdout
    for _, label, exit_stage, entropy, _, models_own in rows:
        assert models_own == f"{label}, {exit_stage}, {entropy}"
