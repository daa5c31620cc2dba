"""Messages and exit codes of the commands, called in this process."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hf_thinkingvit.commands as commands
from hf_thinkingvit.commands.__main__ import main
from hf_thinkingvit.flags import LineParser, with_flags
from hf_thinkingvit.image_processing import evaluation_image_processor, segmentation_image_processor
from hf_thinkingvit.inference import from_exported
from tests.conversion.segmenter_files import write_official
from tests.inference.conftest import need_runtime
from tests.models.segmentation_models import lively_segmenter
from tests.training.tiny_runs import encoded_image
from tests.utils import FIXTURES, lively_model


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


def test_messages_name_flags():
    parser = LineParser(prog="command")
    parser.add_argument("--output-dir")
    parser.add_argument("--max_steps", "--max-steps")
    parser.add_argument("--allow-it", action="store_true")
    assert with_flags("pass `allow_it=True`", parser) == "pass `--allow-it`"
    message = with_flags("`output_dir` and `max_steps=3` and `model.size`, but `other`", parser)
    assert message == "`--output-dir` and `--max_steps=3` and `--model.size`, but `other`"


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
