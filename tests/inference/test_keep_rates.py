"""The keep rate of a call: engine, pipelines and the `classify` command give what the model gives at that rate."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_thinkingvit.commands.__main__ import main
from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.inference import AdaptiveEngine
from hf_thinkingvit.models.staged_pipeline import StagedImageClassificationPipeline
from tests.models.test_modeling_avit import lively_avit
from tests.utils import lively_model, lively_swin, middle_threshold, random_images


PRUNING = {"thinking_stages": [1, 4], "num_hidden_layers": 2, "pruning_layers": [0, 1], "pruning_keep_rate": 0.5}
RATE = [0.75, 0.25]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pruned")
    lively_model(**PRUNING).save_pretrained(path)
    evaluation_image_processor(32).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    path, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index in range(5):
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path / f"{index}.png")
    return path


@torch.no_grad()
def expected_scores(folder, pictures, **call) -> list[float]:
    """The greatest probability of each picture."""
    model, processor = lively_model(**PRUNING), AutoImageProcessor.from_pretrained(folder)
    images = [Image.open(path) for path in sorted(pictures.iterdir())]
    logits = model(processor(images, return_tensors="pt")["pixel_values"], **call).logits
    return logits.softmax(-1).amax(-1).tolist()


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_engine(compiled):
    """One model at two rates, by turns; stages that are compiled have a program for each."""
    model, images = lively_model(**PRUNING), random_images(20)
    threshold = middle_threshold(model, images)
    expected = {rate: model(images, threshold=threshold, keep_rate=rate) for rate in (None, 0.25)}
    if compiled:
        model.compile_stages([8], backend="eager")
    engines = {rate: AdaptiveEngine(model, batch_size=8, threshold=threshold, keep_rate=rate) for rate in expected}
    for rate, engine in engines.items():
        results = list(engine(images))
        assert [result.exit_stage for result in results] == expected[rate].exit_stage.tolist()
        logits = torch.stack([result.logits for result in results])
        torch.testing.assert_close(logits, expected[rate].logits, atol=1e-5, rtol=0)
    assert (expected[None].logits - expected[0.25].logits).abs().max() > 0.1


@pytest.mark.parametrize("make", [lively_model, lively_swin, lively_avit])
def test_engine_of_a_model_without_pruning(make):
    with pytest.raises(ValueError, match="`keep_rate` is of models with `pruning_layers`"):
        AdaptiveEngine(make(), keep_rate=0.5)


def test_engine_refuses_a_rate_at_once():
    for rate in (0.0, [0.5], float("nan")):
        with pytest.raises(ValueError, match="`keep_rate`"):
            AdaptiveEngine(lively_model(**PRUNING), keep_rate=rate)


@pytest.mark.parametrize("adaptive", [True, False], ids=["engine", "remote code"])
def test_pipelines(folder, pictures, adaptive):
    """Given to the pipeline or to a call, for one image and for several."""
    options = {} if adaptive else {"pipeline_class": StagedImageClassificationPipeline}
    classifier = pipeline("adaptive-image-classification", model=str(folder), **options)
    paths = sorted(map(str, pictures.iterdir()))
    expected = expected_scores(folder, pictures, keep_rate=RATE)
    assert expected != pytest.approx(expected_scores(folder, pictures), abs=1e-3)
    results = classifier(paths, batch_size=2, keep_rate=RATE, top_k=1)
    assert [result[0]["score"] for result in results] == pytest.approx(expected, abs=1e-4)
    assert classifier(paths[0], keep_rate=RATE, top_k=1)[0]["score"] == pytest.approx(expected[0], abs=1e-4)
    with pytest.raises(ValueError, match="`keep_rate`"):
        classifier(paths, keep_rate=2.0)
    fixed = pipeline("adaptive-image-classification", model=str(folder), keep_rate=RATE, **options)
    assert fixed(paths[0], top_k=1)[0]["score"] == pytest.approx(expected[0], abs=1e-4)


def test_classify(folder, pictures, tmp_path, capsys):
    """The record of the run has the rate, so that lines of two rates are never mixed."""
    words = ["classify", "--model", str(folder), "--dataset", str(pictures), "--output-dir", str(tmp_path)]
    main([*words, "--keep-rate", *map(str, RATE)])
    lines = [json.loads(line) for line in (tmp_path / "classified.jsonl").read_text().splitlines()]
    expected = expected_scores(folder, pictures, keep_rate=RATE)
    assert [line["score"] for line in lines] == pytest.approx(expected, abs=1e-4)
    assert json.loads((tmp_path / "classified.jsonl.run.json").read_text())["keep_rate"] == RATE
    with pytest.raises(SystemExit, match="^2$"):
        main(words)
    assert "other facts: keep_rate was [0.75, 0.25] and is 0.5" in capsys.readouterr().err


def test_classify_with_a_model_without_pruning(pictures, tmp_path, capsys):
    lively_model().save_pretrained(tmp_path / "model")
    evaluation_image_processor(32).save_pretrained(tmp_path / "model")
    words = ["classify", "--model", str(tmp_path / "model"), "--dataset", str(pictures)]
    with pytest.raises(SystemExit, match="^2$"):
        main([*words, "--output-dir", str(tmp_path), "--keep-rate", "0.5"])
    assert "`--keep-rate` is of models with" in capsys.readouterr().err
