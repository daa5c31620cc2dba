"""Answers image by image: they agree with the sweep, and with the model; tables by class, histograms and grids."""

import csv
import io
from importlib.util import find_spec

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from hf_thinkingvit import ElasticViTConfig, ElasticViTForImageClassification
from hf_thinkingvit.commands.__main__ import main
from hf_thinkingvit.evaluation import evaluate_segmentation_thresholds, evaluate_thresholds
from hf_thinkingvit.evaluation.answer_plots import plot_classes
from hf_thinkingvit.evaluation.classes import class_table, entropy_histogram, segmentation_class_table
from hf_thinkingvit.evaluation.image_answers import collect_image_answers
from hf_thinkingvit.image_processing import evaluation_image_processor, segmentation_image_processor
from tests.models.segmentation_models import lively_segmenter
from tests.models.test_modeling_avit import lively_avit
from tests.training.tiny_runs import encoded_image
from tests.utils import lively, lively_model


NAMES = ["ant", "bee", "cat", "dog"]
needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs the extra `examples`")


def labelled(model):
    model.config.id2label = dict(enumerate(NAMES))
    model.config.label2id = {name: index for index, name in enumerate(NAMES)}
    return model


def photographs(count: int = 24) -> datasets.Dataset:
    """Labels in turn, one image without a label."""
    images = [{"bytes": encoded_image(index), "path": None} for index in range(count)]
    labels = [index % len(NAMES) for index in range(count - 1)] + [-1]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def collect(model, **options):
    return collect_image_answers(
        labelled(model), photographs(), evaluation_image_processor(32), progress=False, batch_size=7, **options
    )


@pytest.fixture(scope="module")
def answers():
    return collect(lively_model(num_labels=4))


def test_they_are_those_of_the_sweep(answers):
    model, middle = labelled(lively_model(num_labels=4)), float(answers.entropies[:, 0].median())
    for threshold in (0.0, middle, [middle, 9.0], 9.0):
        sweep, (row,) = evaluate_thresholds(
            model, photographs(), evaluation_image_processor(32), [threshold], progress=False
        )
        torch.testing.assert_close(answers.stages.scores, sweep.scores)
        assert torch.equal(answers.right, sweep.top1)
        table = class_table(answers, threshold)
        assert sum(each["images"] for each in table) == len(answers) == 23
        assert sum(each["images"] * each["top1"] for each in table) / 23 == pytest.approx(row["top1"])
        assert sum(each["images"] * each["leaves_0"] for each in table) / 23 == pytest.approx(row["exit_shares"][0])


def test_gain_is_from_the_first_answer_to_the_last(answers):
    for row in class_table(answers, 0.5):
        mask = answers.labels == NAMES.index(row["class"])
        first, last = (100 * answers.right[mask, stage].double().mean().item() for stage in (0, -1))
        assert row["gain"] == pytest.approx(last - first)
        assert (row["top1_0"], row["top1_2"]) == pytest.approx((first, last))


def test_depth_of_an_avit_by_class():
    model = lively_avit(num_labels=4)
    answers, processor = collect(model), evaluation_image_processor(32)
    for row in class_table(answers):
        indices = (answers.labels == NAMES.index(row["class"])).nonzero()[:, 0].tolist()
        pixel_values = processor([answers.image(index) for index in indices], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            outputs = model(pixel_values)
        assert row["depth"] == pytest.approx(outputs.mean_depth.mean().item(), abs=1e-5)
        assert "gain" not in row and "top1_0" not in row


def test_against_another_model(answers):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
    torch.manual_seed(0)
    plain = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=16, num_labels=4))
    baseline = collect(plain)
    for row in class_table(answers, 0.0, baseline):
        assert row["gain"] == pytest.approx(row["top1"] - row["baseline_top1"])
    others = collect(plain, max_samples=5)
    with pytest.raises(ValueError, match="`baseline` must be of the same images"):
        class_table(answers, 0.0, others)


def test_sub_networks_of_an_elastic_model():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16}
    config = ElasticViTConfig.hydravit(num_attention_heads=4, num_labels=4, default_sub_network=1, **sizes)
    model = lively(ElasticViTForImageClassification, config)
    answers = collect(model)
    assert answers.num_answers == len(config.networks) and answers.kind == "sub-network"
    assert answers.accepted().unique().tolist() == [1]


def test_segmentation_by_class():
    model = lively_segmenter()
    rng = np.random.default_rng(0)
    masks = [Image.fromarray(rng.integers(0, 3, (32, 32), dtype=np.uint8)) for _ in range(4)]
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(4)]
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    data = datasets.Dataset.from_dict({"image": images, "mask": masks}, features=features)
    confusions, (row,) = evaluate_segmentation_thresholds(
        model, data, segmentation_image_processor(32), [1.5], label_column="mask", progress=False
    )
    names = [f"class {index}" for index in range(model.config.num_labels)]
    table = segmentation_class_table(confusions, names, 1.5)
    assert [each["class"] for each in table] == names[:3]  # of the others there is no pixel
    assert sum(each["pixels"] for each in table) == 4 * 32 * 32
    assert [each["iou"] for each in table] == pytest.approx([100 * iou for iou in row["per_category_iou"][:3]])
    assert table[0]["gain"] == pytest.approx(table[0]["iou_2"] - table[0]["iou_0"])


@pytest.mark.parametrize("dataset", ["photographs", "photographs-of-animals-in-their-surroundings-at-night"])
def test_all_words_of_a_picture_of_classes_are_in_it(dataset):
    matplotlib = pytest.importorskip("matplotlib")
    names = [f"n0153443{index} long-billed house finch of the woods, bird" for index in range(3)]
    rows = [{"class": name, "gain": gain} for name, gain in zip(names, (-100.0, 0.0, 0.0))]
    figure = plot_classes(rows, f"{dataset}, split validation, 1000 images, τ = 0 by class: last stage over first")
    figure.draw_without_rendering()
    words = [text for text in figure.findobj(matplotlib.text.Text) if text.get_visible() and text.get_text()]
    assert any("last stage" in text.get_text() for text in words)
    for text in words:
        extent = text.get_window_extent()
        assert figure.bbox.x0 <= extent.x0 and extent.x1 <= figure.bbox.x1, text


def test_histograms_count_every_answer_once(answers):
    entropies = torch.tensor([[0.0, 2.0], [1.0, 0.99], [float("nan"), 1.5]])
    right = torch.tensor([[True, False], [False, True], [True, True]])
    rows = entropy_histogram(entropies, right, bins=2)
    assert [(row["answer"], row["low"], row["high"]) for row in rows] == [
        *((0, 0.0, 1.0), (0, 1.0, 2.0), (1, 0.0, 1.0), (1, 1.0, 2.0))
    ]
    assert [(row["right"], row["wrong"]) for row in rows] == [(1, 0), (0, 1), (1, 0), (1, 1)]
    rows = entropy_histogram(answers.entropies, answers.right)
    for stage in range(3):
        counts = [(row["right"], row["wrong"]) for row in rows if row["answer"] == stage]
        assert tuple(map(sum, zip(*counts))) == (
            int(answers.right[:, stage].sum()),
            int((~answers.right[:, stage]).sum()),
        )
    assert "count" in entropy_histogram(answers.entropies)[0]


@needs_matplotlib
def test_the_grid_shows_the_extremes_of_every_class(answers):
    from hf_thinkingvit.evaluation.answer_plots import extremes, hardness, plot_examples

    order = hardness(answers).argsort().tolist()
    labels = answers.labels.tolist()
    easiest = extremes(order, labels, 6)
    assert easiest[0] == order[0] and len(set(easiest)) == 6
    assert max(sum(labels[index] == label for index in easiest) for label in range(4)) == 2
    figure = plot_examples(answers, 6, "title", 1.0)
    titles = [axis.get_title() for part in figure.subfigs for axis in part.axes if axis.get_title()]
    assert len(titles) == 12
    stop = int(answers.accepted(1.0)[easiest[0]])
    assert titles[0].startswith(f"label: {NAMES[labels[easiest[0]]]}\n0: ") and titles[0].count("\n") == 1 + stop


@needs_matplotlib
@pytest.mark.parametrize("kind", ["thinkingvit", "avit"])
def test_the_command_writes_tables_and_pictures(kind, tmp_path, capsys):
    model = labelled(lively_model(num_labels=4, threshold=1.0) if kind == "thinkingvit" else lively_avit(num_labels=4))
    model.save_pretrained(tmp_path / "model")
    evaluation_image_processor(32).save_pretrained(tmp_path / "model")
    photographs().to_parquet(tmp_path / "images.parquet")
    words = ["analyze", "--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "images.parquet")]
    main([*words, "--output-dir", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("classes.csv", "classes.png", "histograms.csv", "histograms.png", "examples.png")
    }
    table = list(csv.DictReader(io.StringIO((tmp_path / "out" / "classes.csv").read_text())))
    key = "gain" if kind == "thinkingvit" else "depth"
    assert {row["class"] for row in table} == set(NAMES)
    values = [float(row[key]) for row in table]
    assert values == sorted(values, reverse=True)
    for path in (tmp_path / "out").glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 200
    main([*words, "--output-dir", str(tmp_path / "one"), "--histograms"])
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"histograms.csv", "histograms.png"}
    if kind == "avit":
        with pytest.raises(SystemExit):
            main([*words, "--threshold", "0.5"])
        assert "does not think in stages" in capsys.readouterr().err
