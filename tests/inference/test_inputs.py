"""Inputs that the engine accepts as a stream of images, and the cost of its bookkeeping."""

import pickle
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from hf_thinkingvit import inference
from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.inference import AdaptiveEngine
from hf_thinkingvit.models.staged_pipeline import StagedImageClassificationPipeline
from tests.utils import SizedStream, lively_model, middle_threshold, random_images


class Indexed(Dataset):
    """A map-style dataset as torch defines it: a length and indices, without an IndexError at the end."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index % len(self.images)]


@pytest.fixture(scope="module")
def engine():
    model = lively_model()
    model.config.threshold = middle_threshold(model, random_images())
    return AdaptiveEngine(model, evaluation_image_processor(32), batch_size=4)


@pytest.fixture(scope="module")
def picture():
    return Image.effect_noise((40, 50), 60).convert("RGB")


STREAMS = {
    "list": list,
    "tuple": tuple,
    "tensor": torch.stack,
    "generator": iter,
    "indexed": Indexed,
    "sized": SizedStream,
    "loader of batches": lambda images: DataLoader(images, batch_size=4),
    "loader of lists": lambda images: DataLoader(images, batch_size=4, collate_fn=list),
    "loader of images": lambda images: DataLoader(images, batch_size=None),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_streams(engine, kind):
    images = random_images()
    results = list(engine(STREAMS[kind](list(images))))
    with torch.no_grad():
        expected = engine.model(images)
    assert [result.index for result in results] == list(range(6))
    assert [result.exit_stage for result in results] == expected.exit_stage.tolist()


def test_a_single_image_is_a_stream_of_one(engine, picture, tmp_path):
    path = tmp_path / "a.png"
    picture.save(path)
    expected = engine.model(engine.processor(picture, return_tensors="pt")["pixel_values"]).logits
    tensor = engine.processor(picture, return_tensors="pt")["pixel_values"][0]
    for single in (path, str(path), picture, np.array(picture), tensor, lambda: picture):
        (result,) = engine(single)
        torch.testing.assert_close(result.logits[None], expected, atol=1e-5, rtol=0)


def test_what_is_no_stream_is_refused_at_once(engine, tmp_path):
    cases = [
        (tmp_path, "is a folder: give its files"),
        (str(tmp_path), "is a folder: give its files"),
        ({"image": None}, "It is a dict"),
        (b"", "got bytes"),
        (3, "got int"),
    ]
    for inputs, message in cases:
        with pytest.raises(ValueError, match=message):
            engine(inputs)


def test_several_images_in_place_of_one(engine, picture):
    for several in ([picture, picture], (picture, 3), np.zeros((2, 32, 32, 3), dtype=np.uint8), {"image": picture}):
        with pytest.raises(ValueError, match="Expected one image|is not an image"):
            list(engine([several]))


def both_ways(model, processor):
    """Functions that return the logits or scores of one image, by the engine and by the pipeline."""
    classifier = StagedImageClassificationPipeline(model=model, image_processor=processor)
    engine = AdaptiveEngine(model, processor)
    return {
        "engine": lambda image: next(iter(engine(image))).logits.tolist(),
        "function": lambda image: next(iter(engine(lambda: image))).logits.tolist(),
        "pipeline": lambda image: [result["score"] for result in classifier(image, top_k=12)],
    }


@pytest.mark.parametrize("way", ["engine", "function", "pipeline"])
def test_arrays_of_wide_integers(engine, picture, way):
    """16-bit values are scaled as in files. Values of an unknown range are refused instead of clipped or wrapped."""
    answer = both_ways(engine.model, engine.processor)[way]
    pixels = np.array(picture)
    expected = answer(pixels)
    wide = pixels.astype(np.uint16) * 257
    for same in (
        wide,
        np.minimum(wide, 65435) + 100,
        wide.astype(">u2"),
        pixels.astype(np.int32),
        pixels.astype(np.int64),
    ):
        assert answer(same) == expected
    unknown = [wide.astype(dtype) for dtype in (np.int32, np.int64, np.uint32, np.uint64)]
    for other in (*unknown, pixels.astype(np.int16) - 128):
        with pytest.raises(ValueError, match=rf"uint16.*got {other.dtype} from .* whose range is unknown"):
            answer(other)
    with pytest.raises(ValueError, match="none above 255: 8-bit values would come out black"):
        answer(np.maximum(pixels, 255).astype(np.uint16))
    if way == "function":  # other ways take tensors as preprocessed
        planes = torch.from_numpy(wide).permute(2, 0, 1)
        assert answer(planes) == expected
        with pytest.raises(ValueError, match=r"got torch\.int32 from"):
            answer(planes.to(torch.int32))


def test_pixels_that_are_not_finite_run_every_stage(engine):
    images = random_images(3)
    images[1] = torch.nan
    threshold = 100.0
    results = list(AdaptiveEngine(engine.model, threshold=threshold)(images))
    assert [result.exit_stage for result in results] == [0, 2, 0]
    assert results[1].entropy != results[1].entropy


def test_a_result_holds_no_more_than_its_own_logits(engine):
    results = list(AdaptiveEngine(engine.model, batch_size=64)(random_images(64)))
    assert len(pickle.dumps(results[0])) < 2000  # 12 classes; those of 64 images are 3584 bytes


def test_a_model_trained_since_the_engine_was_made():
    model, images = lively_model(hidden_dropout_prob=0.5), random_images()
    engine = AdaptiveEngine(model)
    with torch.no_grad():
        expected = model(images).logits
    model.train()
    logits = torch.stack([result.logits for result in engine(images)])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_two_engines_share_a_model_in_two_threads(engine):
    images, found = random_images(40), {}

    def classify(name, threshold):
        results = AdaptiveEngine(engine.model, batch_size=4, threshold=threshold)(images)
        found[name] = [result.exit_stage for result in results]

    threads = [threading.Thread(target=classify, args=case) for case in (("low", 0.0), ("high", 2.2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    with torch.no_grad():
        assert found["low"] == [2] * 40
        assert found["high"] == engine.model(images, threshold=2.2).exit_stage.tolist()


@pytest.mark.parametrize("in_order", [True, False])
def test_bookkeeping_per_image_does_not_grow_with_the_batch(engine, in_order):
    """Measured by the number of lines of the engine that Python runs."""
    folder, images, lines = str(Path(inference.__file__).parent), random_images(1024, 8), 0
    model = lively_model(image_size=8, num_hidden_layers=1)
    model.config.threshold = middle_threshold(model, images[:64])

    def trace(frame, event, argument):
        nonlocal lines
        if not frame.f_code.co_filename.startswith(folder):
            return None
        lines += event == "line"
        return trace

    counts = []
    before = sys.gettrace()
    for batch_size in (32, 512):
        lines, stream = 0, AdaptiveEngine(model, batch_size=batch_size, in_order=in_order)(images)
        sys.settrace(trace)
        try:
            results = list(stream)
        finally:
            sys.settrace(before)
        assert len({result.exit_stage for result in results}) > 1
        counts.append(lines / len(images))
    assert counts[1] < 1.2 * counts[0], counts
