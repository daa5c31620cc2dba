"""Reading and preprocessing in chunks: the same pixels, errors where they belong, and no more work than needed."""

import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.inference import AdaptiveEngine
from hf_thinkingvit.inference.preparation import Preparation
from hf_thinkingvit.inference.reader import CHUNK, Reader
from tests.inference.test_engine import iter_into, no_thread_stays  # noqa: F401  a fixture that runs by itself
from tests.utils import lively_model, random_images


class CountingProcessor:
    """Counts the calls and images of an image processor."""

    def __init__(self, size: int = 32):
        self.processor, self.calls = evaluation_image_processor(size), []

    def __call__(self, images, **kwargs):
        self.calls.append(len(images) if isinstance(images, list) else 1)
        return self.processor(images, **kwargs)


def pictures(count: int, sizes=((40, 50), (64, 64), (50, 40))) -> list[Image.Image]:
    return [Image.effect_noise(sizes[n % len(sizes)], 20 + n).convert("RGB") for n in range(count)]


def readings_of(reader: Reader) -> list:
    found = []
    while not reader.finished:
        reading = reader.get(None)
        if reading is not None:
            found.append(reading)
    reader.close()
    return found


class TestChunks:
    def test_give_the_pixels_of_single_images(self):
        processor, images = evaluation_image_processor(32), pictures(7)
        (reading,) = Preparation(processor)(list(enumerate(images)))
        assert reading.indices == list(range(7))
        expected = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images])
        torch.testing.assert_close(reading.pixel_values, expected, atol=1e-5, rtol=0)

    def test_are_as_large_as_what_has_arrived(self):
        processor = CountingProcessor()
        reader = Reader(pictures(100), processor, ahead=1000, tolerant=False)
        assert sum(len(reading.indices) for reading in readings_of(reader)) == 100
        assert sum(processor.calls) == 100
        assert max(processor.calls) <= CHUNK
        assert len(processor.calls) < 60  # image by image there would be 100

    def test_a_broken_image_leaves_the_others(self):
        """One by one after the chunk has failed, with the name of the image that did it."""
        images = pictures(5)
        images[2] = Image.new("RGB", (0, 0))
        readings = Preparation(evaluation_image_processor(32))(list(enumerate(images)))
        assert [reading.indices for reading in readings] == [[0, 1], [2], [3, 4]]
        assert "Cannot read the image at place 2" in str(readings[1].error)

    def test_arrays_of_different_layouts(self):
        """Each has its own; the layout of a chunk would be that of its first."""
        processor = evaluation_image_processor(32)
        first, last = (np.asarray(picture) for picture in pictures(2))
        arrays = [first, first.transpose(2, 0, 1), last]
        (reading,) = Preparation(processor)(list(enumerate(arrays)))
        torch.testing.assert_close(reading.pixel_values[0], reading.pixel_values[1])
        assert not torch.equal(reading.pixel_values[0], reading.pixel_values[2])

    def test_of_different_sizes_and_dtypes_are_parted(self):
        images = [*random_images(2), *random_images(2, 48), random_images(1)[0].half()]
        readings = Preparation(None)(list(enumerate(images)))
        assert [reading.indices for reading in readings] == [[0, 1], [2, 3], [4]]
        readings = Preparation(None)([(0, images[0]), (2, images[1])])  # no neighbours in the input
        assert [reading.indices for reading in readings] == [[0], [2]]


class TestLiveStreams:
    def test_nothing_waits_for_a_chunk(self):
        """An image that came alone is there before the next one is."""
        more = threading.Event()

        def slow():
            yield pictures(1)[0]
            more.wait(timeout=20)
            yield pictures(1)[0]

        reader = Reader(slow(), evaluation_image_processor(32), ahead=64, tolerant=False)
        assert reader.get(10).indices == [0]
        more.set()
        assert [reading.indices for reading in readings_of(reader)] == [[1]]

    def test_patience_ends(self):
        release = threading.Event()

        def blocked():
            release.wait(timeout=20)
            yield pictures(1)[0]

        reader = Reader(blocked(), evaluation_image_processor(32), ahead=64, tolerant=False)
        started = time.monotonic()
        assert reader.get(0.05) is None and not reader.finished
        assert time.monotonic() - started < 10
        release.set()
        assert len(readings_of(reader)) == 1

    def test_reads_no_further_than_it_may(self):
        read = []

        def endless():
            while True:
                read.append(True)
                yield torch.zeros(3, 4, 4)

        reader = Reader(endless(), None, ahead=10, tolerant=False)
        taken = 0
        for _ in range(20):
            taken += len(reader.get(10).indices)
            assert len(read) <= taken + 10
        reader.close()


class TestWorkers:
    def test_give_the_same_results_in_order(self, tmp_path):
        model, processor = lively_model(num_hidden_layers=1, threshold=1.5), evaluation_image_processor(32)
        paths = []
        for number, picture in enumerate(pictures(70)):
            paths.append(tmp_path / f"{number:02}.png")
            picture.save(paths[-1])
        paths[5].write_bytes(b"no image")
        inputs = [*paths, random_images(1)[0], OSError("lost"), pictures(1)[0], lambda: None]
        expected = list(AdaptiveEngine(model, processor, batch_size=16, on_error="return")(inputs[:-1]))
        engine = AdaptiveEngine(model, processor, batch_size=16, on_error="return", num_workers=2)
        results = list(engine(inputs))
        assert [result.index for result in results] == list(range(74))
        for result, other in zip(results, expected):
            assert (result.exit_stage, result.error is None) == (other.exit_stage, other.error is None)
            if other.error is None:
                torch.testing.assert_close(result.logits, other.logits, atol=1e-5, rtol=0)
        assert "05.png" in str(results[5].error) and str(results[71].error) == "lost"
        assert "cannot be pickled" in str(results[73].error)
        assert engine.stats.failures == 3
        assert engine.stats.seconds > 0

    def test_stop_with_the_source_or_the_consumer(self, tmp_path):
        picture = pictures(1)[0]

        def source():
            yield from [picture] * 40
            raise OSError("the disk is gone")

        model, found = lively_model(num_hidden_layers=1), []
        engine = AdaptiveEngine(model, evaluation_image_processor(32), batch_size=16, num_workers=1)
        with pytest.raises(OSError, match="the disk is gone"):
            iter_into(engine(source()), found)
        assert [result.index for result in found] == list(range(40))
        stream = engine(source())
        next(stream)
        stream.close()
