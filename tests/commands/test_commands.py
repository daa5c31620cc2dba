"""Messages and exit codes of the commands, called in this process."""

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file

import hf_thinkingvit.commands as commands
from hf_thinkingvit.commands.__main__ import main
from hf_thinkingvit.flags import LineParser, with_flags
from hf_thinkingvit.image_processing import evaluation_image_processor, segmentation_image_processor
from hf_thinkingvit.inference import from_exported
from hf_thinkingvit.models.image_files import read_image
from tests.conversion.segmenter_files import write_official
from tests.inference.conftest import need_runtime
from tests.models.segmentation_models import lively_segmenter
from tests.models.test_modeling_early_exit_vit import lively_method
from tests.training.tiny_runs import encoded_image
from tests.utils import FIXTURES, lively_model


def write_rows(path: Path, count: int) -> None:
    """Images with the labels that a model of three classes has by default."""
    images = [{"bytes": encoded_image(index), "path": None} for index in range(count)]
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"LABEL_{index}" for index in range(3)])}
    rows = {"image": images, "label": [index % 3 for index in range(count)]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(path)


EXAMPLES = Path(__file__).parents[2] / "examples"
TRAINS = pytest.mark.skipif(find_spec("timm") is None, reason="needs the extra `train`")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`model`; `pictures` with two images, a hidden file and a hidden folder; `empty`; and a run with `best`."""
    folder = tmp_path_factory.mktemp("commands")
    for name in ("model", "run/best"):
        model = lively_model(thinking_stages=[1, 4], num_hidden_layers=1, num_labels=3)
        model.save_pretrained(folder / name)
        evaluation_image_processor(32).save_pretrained(folder / name)
    for name in ("pictures/.cache", "empty"):
        (folder / name).mkdir(parents=True)
    for name in ("a.png", "b.png", ".hidden.png", ".cache/c.png"):
        (folder / "pictures" / name).write_bytes(encoded_image(0))
    return folder


def refused(capsys, *words) -> str:
    """The only line on stderr of a command that ends with exit code 2."""
    with pytest.raises(SystemExit, match="^2$"):
        main([str(word) for word in words])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "Traceback" not in lines[0] and ": error: " in lines[0]
    return lines[0]


def test_every_command_has_help(capsys):
    main([])
    usage = capsys.readouterr().out
    for name, text in commands.COMMANDS.items():
        assert text in usage
        if name in ("finetune", "train") and find_spec("timm") is None:
            continue
        with pytest.raises(SystemExit, match="^0$"):
            main([name, "--help"])
        help_text = capsys.readouterr().out
        assert f"hf-thinkingvit {name}" in help_text and "None" not in help_text.partition("fields of the model's")[0]


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """One stage, of which no exit rule would notice that the decoder is missing."""
    folder = tmp_path_factory.mktemp("segmenter")
    lively_segmenter(thinking_stages=[4]).save_pretrained(folder)
    segmentation_image_processor(32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["classify", "export"])
def test_a_model_for_another_task_is_refused(name, folder, segmenter, capsys):
    """Transformers would load it with a classifier of random weights."""
    message = refused(capsys, name, "--model", segmenter, "--dataset", folder / "pictures")
    assert "is a model for image-segmentation, and this command is for image-classification" in message
    message = refused(capsys, "segment", "--model", folder / "model", "--dataset", folder / "pictures")
    assert "is a model for image-classification, and this command is for image-segmentation" in message


def test_a_segmentation_model_is_pushed_as_it_is(segmenter, tmp_path, capsys):
    main(["push", "--model", str(segmenter), "--repo-id", "org/name", "--dry-run", str(tmp_path / "card")])
    saved, pushed = (load_file(path / "model.safetensors") for path in (segmenter, tmp_path / "card"))
    assert saved.keys() == pushed.keys() and all(torch.equal(saved[name], pushed[name]) for name in saved)
    assert "AutoModelForSemanticSegmentation" in (tmp_path / "card" / "README.md").read_text()


@pytest.mark.parametrize("golden, following", [("seg_linear", "segment"), ("thinkingvit_2stage", "classify")])
def test_convert_names_the_next_command(golden, following, tmp_path, capsys):
    source = write_official(golden, tmp_path / "official") if golden == "seg_linear" else FIXTURES / golden
    main(["convert", str(source), str(tmp_path / "converted")])
    assert f"hf-thinkingvit {following} --model" in capsys.readouterr().out


def test_unknown_commands_and_flags(capsys):
    assert "no command `finetun`. Did you mean `finetune`?" in refused(capsys, "finetun")
    assert "unrecognized arguments: --thresold" in refused(
        capsys, "sweep", "--model", "m", "--dataset", "d", "--thresold", "1"
    )
    assert "must be at least 1" in refused(capsys, "classify", "--model", "m", "--dataset", "d", "--batch-size", "0")


@TRAINS
def test_unknown_fields_of_a_run(capsys):
    assert "no flag `--epoch`. Did you mean `--epochs`?" in refused(
        capsys, "finetune", "photos", "--source", "m", "--epoch", "1"
    )


@pytest.mark.skipif(find_spec("timm") is not None, reason="the extra `train` is installed")
@pytest.mark.parametrize("name", ["finetune", "train"])
def test_what_an_extra_lacks_is_said(capsys, name):
    assert 'Training needs timm: pip install "hf-thinkingvit[train]"' in refused(capsys, name, "--help")


@pytest.mark.parametrize("name", ["sweep", "calibrate", "classify", "export", "segment", "push"])
def test_a_missing_model_is_said_to_be_missing(name, folder, capsys):
    words = {"calibrate": ["--max-drop", "0.1"], "push": ["--repo-id", "org/name"]}.get(name, [])
    words += [] if name == "push" else ["--dataset", folder / "pictures"]
    message = refused(capsys, name, "--model", folder / "absent", *words)
    assert f"There is no folder `{folder / 'absent'}` (--model)" in message
    message = refused(capsys, name, "--model", folder / "run", *words)
    assert f"has no model (there is no config.json in it). Did you mean `{folder / 'run' / 'best'}`?" in message
    message = refused(capsys, name, "--model", EXAMPLES / "train.py", *words)
    assert "is a file" in message


@pytest.mark.parametrize(
    "name", ["sweep", "calibrate", "classify", "export", "segment", pytest.param("finetune", marks=TRAINS)]
)
def test_missing_and_empty_images_are_said_to_be_so(name, folder, capsys):
    words = ["--max-drop", "0.1"] if name == "calibrate" else []
    words += ["--source" if name == "finetune" else "--model", folder / "model"]
    assert str(folder / "absent") in (message := refused(capsys, name, *words, "--dataset", folder / "absent"))
    assert "no folder" in message or "no such file or folder" in message
    message = refused(capsys, name, *words, "--dataset", folder / "empty")
    assert "no images in" in message


def test_debug_shows_where(folder):
    with pytest.raises(FileNotFoundError):
        main(["sweep", "--model", str(folder / "absent"), "--dataset", "x", "--debug"])


@TRAINS
@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_train_says_that_official_checkpoints_are_converted_first(name, capsys, tmp_path):
    """`finetune` converts them itself."""
    write_rows(tmp_path / "rows.parquet", 24)
    words = ["--from-pretrained", FIXTURES / "thinkingvit_2stage" / name, "--output-dir", tmp_path / "run"]
    with pytest.raises(SystemExit, match="^2$"):
        main(["train", "--dataset", str(tmp_path / "rows.parquet"), "--batch-size", "8", *map(str, words)])
    message = capsys.readouterr().err.splitlines()[-1]
    assert "is an official checkpoint" in message and "`hf-thinkingvit convert`" in message


@TRAINS
def test_finetune_asks_for_what_is_missing(capsys, folder):
    assert "Name the images" in refused(capsys, "finetune", "--source", folder / "model")
    assert "--source" in refused(capsys, "finetune", folder / "pictures")


@TRAINS
def test_train_names_the_file(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("epochs: 0\n")
    assert f"{tmp_path / 'run.yaml'}: `epochs` must be above 0" in refused(
        capsys, "train", "--config", tmp_path / "run.yaml"
    )
    assert "no such file or folder" in refused(capsys, "train", "--dataset", tmp_path / "absent")


def test_classify_skips_hidden_files_and_says_what_is_new(folder, tmp_path, capsys):
    words = ["classify", "--model", str(folder / "model"), "--dataset", str(folder / "pictures")]
    words += ["--output-dir", str(tmp_path)]
    main(words)
    assert "classified    2 images (2 in this run), 0 could not be read" in capsys.readouterr().out
    main(words)
    again = capsys.readouterr().out
    assert "nothing is new" in again and "2 images (0 in this run)" in again
    (folder / "pictures" / "c.png").write_bytes(b"broken")
    main(words)
    assert "2 images (0 in this run), 1 could not be read" in capsys.readouterr().out
    (folder / "pictures" / "c.png").write_bytes(encoded_image(1))
    main(words)
    assert "3 images (1 in this run), 0 could not be read" in capsys.readouterr().out
    (folder / "pictures" / "c.png").unlink()
    assert "other facts: threshold was" in refused(capsys, *words, "--threshold", "0.5")


@pytest.mark.parametrize("kind", ["multi-label", "not finite", "regression"])
def test_classify_scores_by_the_problem_type(kind, folder, tmp_path, capsys):
    fields = {"multi-label": "multi_label_classification", "regression": "regression"}
    model = lively_model(thinking_stages=[1, 4], num_hidden_layers=1, num_labels=3, problem_type=fields.get(kind))
    if kind == "not finite":
        torch.nn.init.constant_(next(model.parameters()), torch.nan)
    model.save_pretrained(tmp_path / "model")
    processor = evaluation_image_processor(32)
    processor.save_pretrained(tmp_path / "model")
    words = ["classify", "--model", str(tmp_path / "model"), "--dataset", str(folder / "pictures")]
    words += ["--output", str(tmp_path / "out.jsonl")]
    if kind == "regression":
        assert "predicts values, and has no classes" in refused(capsys, *words)
        return
    main(words)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    if kind == "not finite":
        assert "2 could not be read or have no answer" in capsys.readouterr().out
        assert all("not finite" in row["error"] and "label" not in row for row in rows)
        return
    with torch.no_grad():
        answer = model(**processor(read_image(str(folder / "pictures" / "a.png")), return_tensors="pt")).logits[0]
    assert rows[0]["label"] == model.config.id2label[answer.argmax().item()]
    assert rows[0]["score"] == pytest.approx(answer.sigmoid().max().item(), abs=1e-4)


def test_flags_may_be_spelled_with_underscores(folder, tmp_path, capsys):
    names = ["--batch_size", "1", "--image_column=pictures", "--output_dir", str(tmp_path)]
    main(["classify", "--model", str(folder / "model"), "--dataset", str(folder / "pictures"), *names])
    assert (tmp_path / "classified.jsonl").is_file()
    with pytest.raises(SystemExit, match="^0$"):
        main(["classify", "--help"])
    assert "_" not in "".join(word for word in capsys.readouterr().out.split() if word.startswith("--"))


@TRAINS
def test_fields_of_a_run_have_one_spelling_in_help_and_messages(capsys, tmp_path):
    for name in ("train", "finetune"):
        with pytest.raises(SystemExit, match="^0$"):
            main([name, "--help"])
        flags = [word for word in capsys.readouterr().out.split() if word.startswith("--")]
        assert "--mixed-precision" in flags and "--model.thinking-stages" in flags
        assert not [flag for flag in flags if "_" in flag]
    for spelling in ("--batch_size", "--batch-size"):
        assert "`--batch-size` must be above 0" in refused(capsys, "train", spelling, "0")
    for spelling in ("--model.patch_sise", "--model.patch-sise"):
        message = refused(capsys, "train", spelling, "4")
        assert "no field `--model.patch-sise`. Did you mean `--model.patch-size`?" in message


SIZES = [(300, "--max-drop 0.02"), (60, "--max-drop 0.1"), (20, "--gmacs ")]


@pytest.mark.parametrize("count, goal", SIZES)
def test_sweep_proposes_a_calibration_that_is_not_refused(count, goal, folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_rows(tmp_path / "rows.parquet", count)
    dataset = ["--dataset", str(tmp_path / "rows.parquet")]
    main(["sweep", "--model", str(folder / "model"), *dataset, "--output-dir", str(tmp_path / "sweep")])
    said = capsys.readouterr().out
    following = next(line for line in said.splitlines() if line.startswith("next "))
    assert goal in following and ("too few for a promise" in said) == (count == 20)
    main([*shlex.split(following)[2:], "--output-dir", str(tmp_path / "calibrated")])
    assert "τ = " in capsys.readouterr().out


def test_sweep_does_not_propose_to_calibrate_on_images_that_are_not_new(tmp_path, folder, capsys):
    pytest.importorskip("matplotlib")
    write_rows(tmp_path / "rows.parquet", 40)
    model = lively_model(thinking_stages=[1, 4], num_hidden_layers=1, num_labels=3)
    model.config.training_data = {"dataset": "rows.parquet", "split": "train", "selected_on": "validation"}
    model.save_pretrained(tmp_path / "model")
    evaluation_image_processor(32).save_pretrained(tmp_path / "model")
    words = ["--dataset", str(tmp_path / "rows.parquet"), "--output-dir", str(tmp_path / "sweep")]
    main(["sweep", "--model", str(tmp_path / "model"), *words])
    said = capsys.readouterr().out
    assert "--dataset NEW_IMAGES --max-drop 0.01\n" in said and "no part in making the model" in said


def test_tables_show_thresholds_apart(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_rows(tmp_path / "rows.parquet", 20)
    words = ["--dataset", str(tmp_path / "rows.parquet"), "--output-dir", str(tmp_path)]
    main(["sweep", "--model", str(folder / "model"), *words, "--thresholds", "0.1234567", "0.1234589", "1"])
    said = capsys.readouterr().out
    assert "0.123457 " in said and "0.123459 " in said


def test_classify_says_that_answers_are_random_and_repeats_them(folder, tmp_path, capsys):
    model = lively_method("pondernet", num_labels=3)
    model.save_pretrained(tmp_path / "model")
    evaluation_image_processor(32).save_pretrained(tmp_path / "model")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(12):
        (pictures / f"{index:02d}.png").write_bytes(encoded_image(index))
    lines = []
    for output in ("one", "two"):
        words = ["classify", "--model", str(tmp_path / "model"), "--dataset", str(pictures), "--output-dir"]
        main([*words, str(tmp_path / output)])
        assert "answers       random, by numbers drawn from the seed 0" in capsys.readouterr().out
        lines.append((tmp_path / output / "classified.jsonl").read_text())
    assert lines[0] == lines[1] and len(set(re.findall('"exit_stage": (.)', lines[0]))) > 1
    main(["classify", "--model", str(folder / "model"), "--dataset", str(pictures), "--output-dir", str(tmp_path)])
    assert "random" not in capsys.readouterr().out


def test_messages_name_flags():
    parser = LineParser(prog="command")
    parser.add_argument("--output-dir")
    parser.add_argument("--max_steps", "--max-steps")
    parser.add_argument("--allow-it", action="store_true")
    assert with_flags("pass `allow_it=True`", parser) == "pass `--allow-it`"
    assert with_flags("give a `max_steps` (--max-steps)", parser) == "give a `--max-steps`"
    message = with_flags("`output_dir` and `max_steps=3` and `model.size`, but `other`", parser)
    assert message == "`--output-dir` and `--max-steps=3` and `--model.size`, but `other`"


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out.strip()[0].isdigit()


def test_export_for_a_runtime(folder, capsys, tmp_path):
    need_runtime("openvino")
    words = ["export", "--model", str(folder / "model"), "--output-dir", str(tmp_path / "exported")]
    assert "calibrated on images" in refused(capsys, *words, "--runtime", "openvino", "--precision", "int8")
    assert "choose a `--runtime`" in refused(capsys, *words, "--precision", "fp32")
    assert not (tmp_path / "exported").exists()
    main([*words, "--dataset", str(folder / "pictures"), "--runtime", "openvino"])
    shown = capsys.readouterr().out
    assert "2 images; τ" in shown and "| 0 |  | 100.00 % |" in shown
    loaded = from_exported(tmp_path / "exported")
    assert loaded.processor is not None and loaded.config.num_labels == 3

    # `classify` takes the folder, and finds what it finds with the model; other commands need weights.
    lines = []
    for name in (folder / "model", tmp_path / "exported"):
        classify = ["classify", "--model", str(name), "--dataset", str(folder / "pictures"), "--output-dir"]
        main([*classify, str(tmp_path / f"of {name.name}")])
        rows = (tmp_path / f"of {name.name}" / "classified.jsonl").read_text().splitlines()
        lines.append([json.loads(row) for row in rows])
    assert "openvino, fp32" in capsys.readouterr().out
    for ours, theirs in zip(*lines, strict=True):
        assert [ours[key] for key in ("name", "label", "exit_stage")] == [
            theirs[key] for key in ("name", "label", "exit_stage")
        ]
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
    again = [*classify[:-1], "--output-dir", str(tmp_path / "of model")]
    assert "other facts: model was" in refused(capsys, *again)
    assert "--keep-rate" in refused(capsys, *classify, str(tmp_path / "x"), "--keep-rate", "0.5")
    precision = ["--precision", "bf16"]
    assert "exported folders" in refused(capsys, *classify[:2], str(folder / "model"), *classify[3:], "y", *precision)
    sweep = ["sweep", "--model", str(tmp_path / "exported"), "--dataset", str(folder / "pictures")]
    assert "is an exported folder, which has no weights" in refused(capsys, *sweep)
