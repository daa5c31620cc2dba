import logging

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.pipelines.pt_utils import KeyDataset

from hf_thinkingvit import AdaptiveImageClassificationPipeline
from hf_thinkingvit.image_processing import evaluation_image_processor
from tests.models.test_modeling_avit import lively_avit
from tests.utils import lively_model, lively_swin


@pytest.fixture(scope="module", params=[lively_model, lively_swin], ids=["vit", "swin"])
def make(request):
    return request.param


@pytest.fixture(scope="module")
def folder(make, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make().save_pretrained(path)
    evaluation_image_processor(32).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(7)]


@pytest.fixture(scope="module")
def expected(make, folder, images):
    """Model outputs for the preprocessed images, at a τ that splits them."""
    model = make()
    pixel_values = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        threshold = model(pixel_values, max_stages=1).entropy.median().item() + 1e-3
        outputs = model(pixel_values, threshold=threshold)
    assert len(outputs.exit_stage.unique()) > 1
    return threshold, outputs


@pytest.mark.parametrize("batch_size", [1, 3])
def test_standard_pipeline(make, folder, images, batch_size, caplog):
    with caplog.at_level(logging.ERROR, logger="transformers"):
        classifier = pipeline("image-classification", model=folder)
    assert "not supported" not in caplog.text
    results = classifier(images, batch_size=batch_size, top_k=2)
    model = make()
    pixel_values = classifier.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        probabilities = model(pixel_values).logits.softmax(-1)
    assert len(results) == 7
    for result, row in zip(results, probabilities):
        assert [entry["label"] for entry in result] == [f"LABEL_{index}" for index in row.topk(2).indices]
        assert [entry["score"] for entry in result] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_adaptive_pipeline_steers_and_reports_exits(folder, images, expected, batch_size):
    threshold, outputs = expected
    classifier = pipeline("adaptive-image-classification", model=folder)
    assert isinstance(classifier, AdaptiveImageClassificationPipeline)
    results = classifier(images, batch_size=batch_size, threshold=threshold, top_k=3)
    for result, stage, entropy, logits in zip(results, outputs.exit_stage, outputs.entropy, outputs.logits):
        assert len(result) == 3
        assert result[0]["label"] == f"LABEL_{logits.argmax()}"
        for entry in result:
            assert entry["exit_stage"] == stage.item()
            assert entry["entropy"] == pytest.approx(entropy.item(), abs=1e-4)
    assert [result[0]["exit_stage"] for result in classifier(images, threshold=0.0)] == [2] * 7
    assert [result[0]["exit_stage"] for result in classifier(images, threshold=0.0, max_stages=2)] == [1] * 7
    assert classifier(images[0], threshold=[0.0, 10.0])[0]["exit_stage"] == 1


def test_empty_lists_and_path_objects(folder, images, tmp_path):
    classifier = pipeline("adaptive-image-classification", model=folder)
    assert classifier([]) == []
    images[0].save(tmp_path / "0.png")
    assert classifier(tmp_path / "0.png") == classifier(images[0])


def test_threshold_given_to_the_pipeline_holds_for_its_calls(folder, images):
    classifier = pipeline("adaptive-image-classification", model=folder, threshold=10.0)
    assert classifier(images[0])[0]["exit_stage"] == 0
    assert classifier(images[0], threshold=0.0)[0]["exit_stage"] == 2
    assert classifier(images[0])[0]["exit_stage"] == 0


@pytest.mark.parametrize("kind", ["no image", "truncated"])
def test_an_unreadable_image_in_a_batch_is_named(folder, images, kind, tmp_path):
    paths = []
    for index, image in enumerate(images[:3]):
        paths.append(str(tmp_path / f"{index}.png"))
        image.save(paths[-1])
    with open(paths[1], "rb") as file:
        content = file.read()
    with open(paths[1], "wb") as file:
        file.write(b"no image" if kind == "no image" else content[: len(content) // 2])
    classifier = pipeline("adaptive-image-classification", model=folder)
    with pytest.raises(ValueError, match=r"Cannot read the image .*1\.png.*Expected a path, a URL or a PIL image"):
        classifier(paths, batch_size=3)
    assert len(classifier([paths[0], paths[2]], batch_size=3)) == 2


def test_bad_arguments_of_a_call(folder, images):
    classifier = pipeline("adaptive-image-classification", model=folder)
    with pytest.raises(ValueError, match="`threshold`"):
        classifier(images[0], threshold=[0.1])
    with pytest.raises(ValueError, match="`max_stages`"):
        classifier(images[0], max_stages=9)


def test_refuses_a_model_without_stages():
    vit = ViTForImageClassification(
        ViTConfig(hidden_size=8, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1, image_size=32)
    )
    with pytest.raises(ValueError, match="ViTForImageClassification does not think in stages"):
        AdaptiveImageClassificationPipeline(model=vit, image_processor=evaluation_image_processor(32))


def test_avit_in_the_standard_pipeline(images, tmp_path):
    model = lively_avit()
    model.save_pretrained(tmp_path)
    evaluation_image_processor(32).save_pretrained(tmp_path)
    classifier = pipeline("image-classification", model=str(tmp_path))
    results = classifier(images, batch_size=3, top_k=1)
    pixel_values = classifier.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        labels = model(pixel_values).logits.argmax(-1)
    assert [result[0]["label"] for result in results] == [f"LABEL_{label}" for label in labels]


@pytest.mark.parametrize("kind", ["list", "generator", "dataset"])
def test_streams_keep_the_batches_of_every_stage_full(folder, images, expected, kind):
    threshold, outputs = expected
    classifier = pipeline("adaptive-image-classification", model=folder)
    batches, run_stage = [], classifier.model.run_stage

    def count(stage_index, state, *args, **kwargs):
        batches.append((stage_index, len(next(iter(state.values())))))
        return run_stage(stage_index, state, *args, **kwargs)

    classifier.model.run_stage = count
    many = images * 4
    streams = {
        "list": many,
        "generator": (image for image in many),
        "dataset": KeyDataset([{"x": i} for i in many], "x"),
    }
    results = list(classifier(streams[kind], threshold=threshold, batch_size=8, top_k=1))
    assert [result[0]["exit_stage"] for result in results] == outputs.exit_stage.tolist() * 4
    go_on = 4 * int((outputs.exit_stage > 0).sum())
    second = [rows for stage, rows in batches if stage == 1]
    assert second == [8] * (go_on // 8) + ([go_on % 8] if go_on % 8 else [])
