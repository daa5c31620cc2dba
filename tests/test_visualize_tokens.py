"""examples/visualize_tokens.py on a tiny model: the pictures that it writes, and its errors."""

import importlib.util
import re
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_thinkingvit import AViTConfig, AViTForImageClassification
from hf_thinkingvit.commands.loading import load_model
from hf_thinkingvit.evaluation.token_pictures import depth_scale, side_by_side
from hf_thinkingvit.image_processing import evaluation_image_processor

from .utils import lively_model


SCRIPT = Path(__file__).parent.parent / "examples" / "visualize_tokens.py"
DATASET_PICTURES = {"tokens.png", "mean_depth.png", "halting_scores.png"}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("visualize_tokens", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = AViTConfig(
        num_attention_heads=2,
        hidden_size=16,
        num_hidden_layers=3,
        image_size=32,
        patch_size=8,
        num_labels=3,
        gate_scale=4.0,
        gate_center=1.0,
    )
    torch.manual_seed(0)
    model = AViTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    evaluation_image_processor(32).save_pretrained(folder)
    return folder


@pytest.fixture
def refused(call, capsys):
    """A function that asserts that the script refuses its arguments, with a message of one line and exit code 2."""

    def run(match, *arguments):
        with pytest.raises(SystemExit, match="^2$"):
            call(*arguments)
        assert re.search(match, capsys.readouterr().err.splitlines()[-1])

    return run


@pytest.fixture
def call(script, monkeypatch, tmp_path, capsys):
    """A function that runs the script, and returns the names of its pictures, stdout and stderr."""

    def run(*arguments):
        output = tmp_path / "output"
        model, dataset, *options = map(str, arguments)
        command = [str(SCRIPT), "--model", model, "--dataset", dataset, *options, "--output-dir", str(output)]
        monkeypatch.setattr(sys, "argv", command)
        script.main()
        pictures = {}
        for file in output.iterdir():
            with Image.open(file) as picture:
                pictures[file.name] = np.asarray(picture.convert("RGB"))
        return pictures, *capsys.readouterr()

    return run


def random_image(seed: int, size: tuple[int, int] = (40, 48)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture
def image_folder(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    random_image(0).save(folder / "first.png")
    random_image(1).convert("L").save(folder / "sub" / "grey $x^2$.png")
    random_image(2, (20, 20)).save(folder / "small.jpg")
    (folder / "broken.png").write_bytes((folder / "first.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("no image")
    return folder


def assert_pictures(pictures: dict[str, np.ndarray], names: set[str]) -> None:
    assert set(pictures) == names
    for name, pixels in pictures.items():
        assert 150 < pixels.shape[0] < 3000 and 400 < pixels.shape[1] < 3000, (name, pixels.shape)
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10, f"{name} shows nothing"


def test_folder_of_images(call, model_folder, image_folder):
    pictures, stdout, stderr = call(model_folder, image_folder, "--batch-size", 2)
    own = {"tokens_000_first.png", "tokens_001_small.png", "tokens_002_grey-x-2-.png"}
    assert_pictures(pictures, own | DATASET_PICTURES)
    assert [line for line in stderr.splitlines() if "broken.png" in line and "unreadable" in line]
    assert "3 images, 1 unreadable" in stdout and "of 3 layers" in stdout and str(image_folder.parent) in stdout


@pytest.mark.parametrize("whole_folder", [False, True])
def test_parquet(call, refused, model_folder, tmp_path, whole_folder):
    features = datasets.Features({"label": datasets.Value("int64"), "picture": datasets.Image()})
    rows = {"label": [0] * 5, "picture": [None, *(random_image(seed) for seed in range(4))]}
    file = tmp_path / "data" / "test-00000-of-00001.parquet"
    file.parent.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    source = file.parent if whole_folder else file
    pictures, stdout, stderr = call(model_folder, source, "--limit", 3, "--pictures", 1)
    assert_pictures(pictures, {"tokens_000_row-1.png"} | DATASET_PICTURES)
    assert "row 0" in stderr and "3 images, 1 unreadable" in stdout
    refused("no split 'validation', but", model_folder, source, "--split", "validation")


def test_depths_and_scores(script, model_folder):
    """The pictures show the model's values: patches only, and scores of active tokens only."""
    model, processor = load_model(str(model_folder))
    images = [random_image(seed) for seed in range(5)]
    named = [(str(index), image) for index, image in enumerate(images)]
    results, scores = script.analyse(model, processor, named, batch_size=2, pictures=2)
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values, output_token_depth=True)
    depth = expected.token_depth
    assert len(depth.unique()) > 1
    np.testing.assert_array_equal(np.stack([tokens.depth for tokens in results]).reshape(5, -1), depth[:, 1:])
    assert [len(layer) for layer in scores] == [int((depth >= layer).sum()) for layer in (1, 2, 3)]
    assert [tokens.label for tokens in results] == [f"LABEL_{label}" for label in expected.logits.argmax(1)]

    assert [tokens.pixels is None for tokens in results] == [False, False, True, True, True]
    resized = images[0].resize((42, 35), Image.Resampling.BICUBIC)  # the shorter side to 32 / 0.9
    cropped = np.asarray(resized)[1:33, 5:37].astype(int)
    assert np.abs(results[0].pixels - cropped).mean() < 3

    left, right = np.split(side_by_side(results[0], model.config), [608], axis=1)  # 32 pixels enlarged by 19
    assert (left[::19, ::19] == results[0].pixels).all()
    colors, norm = depth_scale(3, discrete=True)
    assert (right[76::152, -608 + 76 :: 152] == colors(norm(results[0].depth), bytes=True)[..., :3]).all()


def test_halting_epsilon(call, refused, model_folder, image_folder):
    means = []
    for epsilon in (0.0, 0.9):
        _, stdout, _ = call(model_folder, image_folder, "--pictures", 1, "--halting-epsilon", epsilon)
        means.append(float(re.search(r"patches: ([\d.]+) of 3 layers", stdout)[1]))
    assert means[0] > means[1] >= 1
    refused("--halting-epsilon", model_folder, image_folder, "--halting-epsilon", 1)


@pytest.fixture(scope="module")
def pruned_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    lively_model(pruning_layers=[1, 2], pruning_keep_rate=0.5, threshold=100.0).save_pretrained(folder)
    evaluation_image_processor(32).save_pretrained(folder)
    return folder


def test_pictures_of_pruning(call, pruned_folder, image_folder):
    """All images run the last stage, although τ would let all of them leave before it."""
    pictures, stdout, _ = call(pruned_folder, image_folder, "--pictures", 1)
    assert_pictures(pictures, {"tokens_000_first.png", "tokens.png", "mean_depth.png"})
    # Of 16 patches 8 leave after 1 layer, 4 after 2, and 4 run all 3.
    assert "patches: 1.75 of 3 layers" in stdout and "halting_scores" not in stdout
    _, stdout, _ = call(pruned_folder, image_folder, "--pictures", 1, "--keep-rate", 1)
    assert "patches: 3.00 of 3 layers" in stdout
    _, stdout, _ = call(pruned_folder, image_folder, "--pictures", 1, "--keep-rate", 0.25, 0.125)
    assert "patches: 1.38 of 3 layers" in stdout  # 12 leave after 1 layer, 2 after 2


def test_arguments_of_the_other_kind_of_model(refused, model_folder, pruned_folder, image_folder):
    refused("`--keep-rate` is of models that prune", model_folder, image_folder, "--keep-rate", 0.5)
    refused("`--halting-epsilon` is of an A-ViT", pruned_folder, image_folder, "--halting-epsilon", 0.5)
    refused("--keep-rate", pruned_folder, image_folder, "--keep-rate", 1.5)


def test_models_and_images_that_do_not_fit(refused, model_folder, image_folder, tmp_path):
    other = tmp_path / "other"
    lively_model().save_pretrained(other)
    refused("has no image processor", other, image_folder)
    evaluation_image_processor(32).save_pretrained(other)
    refused("No patch leaves this model: .* of type 'thinkingvit'", other, image_folder)
    refused("neither images nor Parquet files", model_folder, other)
    refused(r"no readable images in .*broken.png \(1 unreadable\)", model_folder, image_folder / "broken.png")
    table = tmp_path / "table.parquet"
    datasets.Dataset.from_dict({"number": [1]}).to_parquet(table)
    refused("no column of images, but number", model_folder, table)
