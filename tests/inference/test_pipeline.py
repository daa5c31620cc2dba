import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoConfig, ViTConfig, ViTForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.pipelines.pt_utils import KeyDataset

from hf_thinkingvit import AdaptiveImageClassificationPipeline
from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.models.staged_pipeline import StagedImageClassificationPipeline
from tests.models.test_modeling_avit import lively_avit
from tests.utils import SizedStream, lively_model, lively_swin


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
    """Model outputs for the preprocessed images, at a τ at which some exit early."""
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


MORE_STREAMS = {
    "tuple": tuple,
    "sized": SizedStream,
    "iterator": iter,
    "loader": lambda images: DataLoader(images, batch_size=3, collate_fn=list),
    "array": lambda images: np.stack([np.array(image) for image in images]),
}


@pytest.mark.parametrize("kind", MORE_STREAMS)
def test_more_kinds_of_streams(folder, images, expected, kind):
    threshold, outputs = expected
    classifier = pipeline("adaptive-image-classification", model=folder)
    results = list(classifier(MORE_STREAMS[kind](images), threshold=threshold, batch_size=2))
    assert [result[0]["exit_stage"] for result in results] == outputs.exit_stage.tolist()


def test_what_is_no_image_is_refused(folder, images, tmp_path):
    classifier = pipeline("adaptive-image-classification", model=folder)
    for inputs, message in (
        ({"image": images[0]}, "It is a dict"),
        ([{"image": images[0]}], "It is a dict"),
        ([np.zeros((2, 32, 32, 3))], "got a batch of shape"),
        (str(tmp_path), "is a folder: give its files"),
    ):
        with pytest.raises(ValueError, match=message):
            classifier(inputs)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_keeps_its_place(folder, images, expected, num_workers, tmp_path):
    threshold, outputs = expected
    (tmp_path / "bad.png").write_bytes(b"no image")
    bad = str(tmp_path / "bad.png")
    classifier = pipeline("adaptive-image-classification", model=folder, on_error="return", threshold=threshold)
    many = [bad, *images[:3], bad, *images[3:], bad]
    for inputs in (many, iter(many)):
        results = list(classifier(inputs, batch_size=2, num_workers=num_workers))
        assert [place for place, result in enumerate(results) if "error" in result[0]] == [0, 4, 9]
        for place in (0, 4, 9):
            assert list(results[place][0]) == ["error"]
            assert "bad.png" in results[place][0]["error"]
        stages = [result[0]["exit_stage"] for result in results if "error" not in result[0]]
        assert stages == outputs.exit_stage.tolist()
    assert "bad.png" in classifier(bad)[0]["error"]
    with pytest.raises(ValueError, match=r"bad\.png"):
        classifier(many, on_error="raise", num_workers=num_workers)
    with pytest.raises(ValueError, match="`on_error`"):
        classifier(many, on_error="skip")


def test_images_of_another_size(make, images):
    model, processor = make(), evaluation_image_processor(48)
    classifier = AdaptiveImageClassificationPipeline(model=model, image_processor=processor, device="cpu")
    results = classifier(images, interpolate_pos_encoding=True, batch_size=4, top_k=1)
    with torch.no_grad():
        pixel_values = processor(images, return_tensors="pt")["pixel_values"]
        logits = model(pixel_values, interpolate_pos_encoding=True).logits
    assert [result[0]["label"] for result in results] == [f"LABEL_{label}" for label in logits.argmax(-1)]
    (alone,) = classifier(images[0], interpolate_pos_encoding=True, top_k=1)
    assert alone == {
        **results[0][0],
        **{name: pytest.approx(results[0][0][name], abs=1e-4) for name in ("score", "entropy")},
    }


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_class_that_travels_with_the_models(make, images, batch_size):
    """It runs without the engine, in batches of one image size; each result equals that of the image alone."""
    processor = evaluation_image_processor(32)
    processor.do_resize = processor.do_center_crop = False
    sizes = [(32, 32), (32, 32), (32, 48), (32, 48), (32, 48), (48, 48), (32, 32)]
    inputs = [image.resize(size) for image, size in zip(images, sizes, strict=True)]
    inputs.insert(4, "nowhere.png")
    classifier = StagedImageClassificationPipeline(model=make(), image_processor=processor, device="cpu")
    forwards = []
    classifier.model.register_forward_hook(lambda module, args, outputs: forwards.append(len(outputs.logits)))
    settings = {"threshold": 2.2, "interpolate_pos_encoding": True, "on_error": "return", "top_k": 2}
    results = classifier(inputs, batch_size=batch_size, **settings)
    assert forwards == {1: [1] * 7, 2: [2, 2, 1, 1, 1], 8: [2, 3, 1, 1]}[batch_size]
    assert len({result[0].get("entropy") for result in results}) == 8
    for image, result in zip(inputs, results, strict=True):
        alone = classifier(image, **settings)
        assert [entry.keys() for entry in result] == [entry.keys() for entry in alone]
        for entry, other in zip(result, alone):
            assert entry == pytest.approx(other, abs=1e-5)


def test_threshold_of_the_standard_pipeline(folder, images, expected):
    """The standard pipeline accepts no τ in a call, so it is set on loading."""
    threshold, outputs = expected
    standard = pipeline("image-classification", model=folder, model_kwargs={"threshold": threshold})
    labels = [result[0]["label"] for result in standard(images, batch_size=3)]
    assert labels == [f"LABEL_{label}" for label in outputs.logits.argmax(-1)]


def test_the_folder_names_its_pipeline(make, folder, images, tmp_path, caplog):
    """With the package imported, its own class is used, with or without `trust_remote_code`."""
    saved = json.loads((tmp_path.parent / folder / "config.json").read_text())["custom_pipelines"]
    assert saved == {
        "adaptive-image-classification": {
            "impl": "staged_pipeline.StagedImageClassificationPipeline",
            "pt": ["AutoModelForImageClassification"],
            "type": "image",
        }
    }
    for trust_remote_code in (None, True):
        classifier = pipeline("adaptive-image-classification", model=folder, trust_remote_code=trust_remote_code)
        assert type(classifier) is AdaptiveImageClassificationPipeline
        classifier.save_pretrained(tmp_path / str(trust_remote_code))
        written = json.loads((tmp_path / str(trust_remote_code) / "config.json").read_text())
        assert written["custom_pipelines"] == saved
        again = pipeline("adaptive-image-classification", model=str(tmp_path / str(trust_remote_code)))
        assert again(images[0]) == classifier(images[0])
    assert not caplog.records
    # Pipelines of other tasks stay in the configuration.
    config = AutoConfig.from_pretrained(folder)
    config.custom_pipelines = {"other": {"impl": "other.Pipeline", "pt": []}}
    assert list(config.custom_pipelines) == ["other"]
    assert type(config)(**config.to_dict()).to_dict() == config.to_dict()
    assert set(config.to_dict()["custom_pipelines"]) == {"other", "adaptive-image-classification"}
    assert "custom_pipelines" not in lively_avit().config.to_dict()
