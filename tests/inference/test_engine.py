import itertools
import math
import threading
import time

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from hf_thinkingvit.evaluation import stage_macs
from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.inference import AdaptiveEngine
from tests.inference.conftest import NETWORKS, give_little_memory, iter_into, with_exits
from tests.models.test_modeling_avit import lively_avit
from tests.utils import HostSynchronisations, lively_model, lively_swin, random_images


@pytest.fixture(params=[lively_model, lively_swin], ids=["vit", "swin"])
def model(request):
    """A model of three stages with τ at which some images exit and some go on."""
    return with_exits(request.param())


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "hf-thinkingvit-reader"]


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    deadline = time.monotonic() + 3
    while reader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not reader_threads()


def assert_equals_forward(results, model, images, **kwargs) -> None:
    with torch.no_grad():
        expected = model(images, **kwargs)
    assert [result.index for result in results] == list(range(len(images)))
    torch.testing.assert_close(torch.stack([r.logits for r in results]), expected.logits, atol=1e-5, rtol=0)
    if "exit_stage" in expected:
        assert [result.exit_stage for result in results] == expected.exit_stage.tolist()
        entropies = torch.tensor([result.entropy for result in results])
        torch.testing.assert_close(entropies, expected.entropy, atol=1e-5, rtol=0)


class TestResults:
    @pytest.mark.parametrize("batch_size", [1, 7, 16, 100])
    def test_equal_the_models_own(self, model, batch_size):
        images = random_images(60)
        assert_equals_forward(list(AdaptiveEngine(model, batch_size=batch_size)(images)), model, images)

    def test_arguments_of_a_call(self, model):
        images = random_images(20)
        engine = AdaptiveEngine(model, batch_size=8, threshold=0.0, max_stages=2)
        assert_equals_forward(list(engine(images)), model, images, threshold=0.0, max_stages=2)
        assert engine.stats.rows == [20, 20]

    def test_as_they_finish(self, model):
        images = random_images(60)
        results = list(AdaptiveEngine(model, batch_size=8, in_order=False)(images))
        assert [result.index for result in results] != list(range(60))
        assert_equals_forward(sorted(results, key=lambda result: result.index), model, images)

    def test_models_without_stages(self):
        network, images = lively_avit(), random_images(20)
        engine = AdaptiveEngine(network, batch_size=8)
        results = list(engine(images))
        assert_equals_forward(results, network, images)
        assert {result.exit_stage for result in results} == {0}
        assert engine.stats.batches == [3]
        with pytest.raises(ValueError, match="does not think in stages"):
            AdaptiveEngine(network, threshold=0.5)

    def test_files_and_images(self, model, tmp_path):
        processor = evaluation_image_processor(32)
        pictures = [Image.effect_noise((40, 50), seed).convert("RGB") for seed in (20, 60, 90)]
        files = []
        for index, picture in enumerate(pictures):
            picture.save(tmp_path / f"{index}.png")
            files.append(tmp_path / f"{index}.png")
        pixel_values = processor(pictures, return_tensors="pt")["pixel_values"]
        inputs = [files[0], str(files[1]), pictures[2]]
        assert_equals_forward(list(AdaptiveEngine(model, processor, batch_size=2)(inputs)), model, pixel_values)

    def test_images_of_different_sizes(self):
        """A model that takes any size gets batches of one size."""
        sizes = [32, 32, 48, 32, 48, 48, 32]
        images = [random_images(1, size, seed=index)[0] for index, size in enumerate(sizes)]
        for network in (lively_avit(), lively_model()):
            engine = AdaptiveEngine(network, batch_size=4, interpolate_pos_encoding=True)
            for image, result in zip(images, engine(images), strict=True):
                with torch.no_grad():
                    expected = network(image[None], interpolate_pos_encoding=True).logits[0]
                torch.testing.assert_close(result.logits, expected, atol=1e-5, rtol=0)
            with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
                list(AdaptiveEngine(network, batch_size=4)(images))

    def test_nothing(self, model):
        assert list(AdaptiveEngine(model)([])) == []


class TestCountedWork:
    def test_every_stage_runs_full_batches(self, model):
        images = random_images(200)
        engine = AdaptiveEngine(model, batch_size=16)
        exits = torch.tensor([result.exit_stage for result in engine(images)])
        rows = [int((exits >= stage).sum()) for stage in range(3)]
        assert engine.stats.rows == rows
        assert engine.stats.batches == [math.ceil(count / 16) for count in rows]
        assert engine.stats.exits == [int((exits == stage).sum()) for stage in range(3)]

    def test_multiply_accumulates(self, model):
        """They equal those of the configuration, for the images that run each stage."""
        model.set_attn_implementation("eager")  # the counter sees its products on every device
        engine = AdaptiveEngine(model, batch_size=16)
        with FlopCounterMode(display=False) as counter:
            list(engine(random_images(60)))
        macs = sum(rows * cost for rows, cost in zip(engine.stats.rows, stage_macs(model.config)))
        assert counter.get_total_flops() == 2 * macs

    def test_waits_for_the_device_once_a_batch(self, model, monkeypatch):
        """One copy to the host per step, for exits and answers together; the rest works on that copy."""
        copies, copy = [], torch.Tensor.cpu
        engine, counter = AdaptiveEngine(model, batch_size=16), HostSynchronisations()

        def counted(tensor):
            copies.append(list(counter.counts))
            return copy(tensor)

        monkeypatch.setattr(torch.Tensor, "cpu", counted)
        with counter:
            exits, _, state = engine.step(0, {"pixel_values": random_images(16)})
            before = list(counter.counts)
            engine.step(1, state)
        assert 0 < exits.sum() < 16
        assert copies == [[], before]  # no synchronisation before the copy
        assert len(before) == 1  # `nonzero` of the exits on the host

    def test_reads_no_further_than_it_must(self, model):
        read = 0

        def endless():
            nonlocal read
            for image in itertools.cycle(random_images(10)):
                read += 1
                yield image

        stream = AdaptiveEngine(model, batch_size=4, max_pending=8)(endless())
        for taken in range(1, 101):
            next(stream)
            # In input order: two batches per stage, two read ahead, one that runs, and `max_pending` results.
            assert read <= taken + 2 * 4 * 3 + 2 * 4 + 4 + 8 + 4
        stream.close()

    def test_few_wait_for_one(self, model):
        """The first image needs the last stage and all others exit at once: its stage runs on a partial batch."""
        images = random_images(60)
        scores = torch.tensor([result.entropy for result in AdaptiveEngine(model, max_stages=1)(images)])
        first = int(scores.argmax())
        order = [first, *(index for index in scores.argsort().tolist()[:50])]
        threshold = float(scores[first]) - 1e-3
        engine = AdaptiveEngine(model, batch_size=4, threshold=[threshold, 0.0], max_pending=4)
        stream = engine(images[index] for index in order)
        assert next(stream).exit_stage == 2
        assert engine.stats.rows[0] <= 4 + 4 + 4
        assert len(list(stream)) == 50

    def test_nobody_waits_longer_than_asked(self, model):
        asked = threading.Event()

        def slow():
            yield from random_images(3)
            asked.wait(timeout=20)  # until the first three results are there
            yield random_images(1)[0]

        stream = AdaptiveEngine(model, batch_size=64, max_wait=0.05)(slow())
        first = [next(stream) for _ in range(3)]
        asked.set()
        assert [result.index for result in [*first, *stream]] == [0, 1, 2, 3]


class TestFaults:
    """Whatever runs the stages."""

    @pytest.fixture(
        params=[
            "vit",
            "swin",
            "vit, compiled",
            pytest.param("vit, openvino", marks=pytest.mark.slow),
            pytest.param("vit, onnxruntime", marks=pytest.mark.slow),
        ]
    )
    def model(self, request):
        network, _, runtime = request.param.partition(", ")
        if runtime == "compiled":
            model = request.getfixturevalue("compiled")
        elif runtime:
            model = request.getfixturevalue("exported").load(network, runtime, threads=1)
        else:
            model = with_exits(NETWORKS[network]())
        yield model
        vars(model).pop("run_stage", None)  # what a test put in its place

    @pytest.mark.parametrize("in_order", [True, False])
    @pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit, GeneratorExit])
    def test_an_exception_of_the_source_comes_after_the_results_before_it(self, model, in_order, error):
        def source():
            yield from random_images(21)
            raise error("the disk is gone")

        found = []
        with pytest.raises(error, match="the disk is gone"):
            iter_into(AdaptiveEngine(model, batch_size=8, in_order=in_order)(source()), found)
        assert sorted(result.index for result in found) == list(range(21))

    def test_an_unreadable_image_stops_or_is_returned(self, model, tmp_path):
        broken = tmp_path / "broken.png"
        broken.write_bytes(b"no image")
        image = Image.effect_noise((32, 32), 50).convert("RGB")
        inputs, processor = [image, broken, image, image], evaluation_image_processor(32)
        found = []
        with pytest.raises(ValueError, match=r"Cannot read the image .*broken\.png"):
            iter_into(AdaptiveEngine(model, processor, batch_size=2)(inputs), found)
        assert [result.index for result in found] == [0]
        engine = AdaptiveEngine(model, processor, batch_size=2, on_error="return")
        results = list(engine(inputs))
        assert [result.index for result in results] == [0, 1, 2, 3]
        assert "broken.png" in str(results[1].error)
        assert results[1].logits is None
        assert engine.stats.failures == 1

    def test_images_of_another_size_stop_or_are_returned(self, model):
        """They are no part of the others' batches."""
        images, other = list(random_images(5)), torch.zeros(3, 20, 24)
        with pytest.raises(ValueError, match="20"):
            list(AdaptiveEngine(model, batch_size=4)([*images, other]))
        engine = AdaptiveEngine(model, batch_size=4, on_error="return")
        results = list(engine([*images[:2], other, *images[2:]]))
        assert [result.index for result in results] == list(range(6)) and engine.stats.failures == 1
        assert [result.error is None for result in results] == [True, True, False, True, True, True]
        assert "20" in str(results[2].error)

    def test_inputs_that_cannot_be(self, model):
        cases = [
            ([torch.zeros(2, 3, 32, 32)], "must be a tensor"),
            (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "of floats, preprocessed, got .* of torch.uint8"),
            (["a.png"], "needs a `processor`"),
            ([{"pixel_values": torch.zeros(3, 32, 32)}], "Input 0 is not an image. It is a dict"),
        ]
        for inputs, message in cases:
            with pytest.raises(ValueError, match=message):
                list(AdaptiveEngine(model)(inputs))

    def test_a_consumer_that_stops_early(self, model):
        stream = AdaptiveEngine(model, batch_size=4)(itertools.cycle(random_images(5)))
        next(stream)
        assert reader_threads()
        stream.close()
        assert not reader_threads()

    def test_control_c(self, model):
        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        model.run_stage = interrupt
        with pytest.raises(KeyboardInterrupt):
            list(AdaptiveEngine(model, batch_size=4)(itertools.cycle(random_images(5))))
        assert not reader_threads()

    @pytest.mark.parametrize("device", ["accelerator", "cpu"])
    def test_out_of_memory_halves_the_batch_until_it_fits(self, model, caplog, device):
        images, biggest = random_images(60), []
        out_of_memory = torch.OutOfMemoryError if device == "accelerator" else RuntimeError
        expected = list(AdaptiveEngine(model, batch_size=16)(images))
        give_little_memory(model, 2, device, biggest)
        results = list(AdaptiveEngine(model, batch_size=16)(images))
        assert [result.exit_stage for result in results] == [result.exit_stage for result in expected]
        assert [result.index for result in results] == list(range(60))
        assert max(biggest) == 2
        messages = [record.getMessage() for record in caplog.records if record.name.startswith("hf_thinkingvit")]
        batches = [message.rsplit("batches of ")[1] for message in messages]
        assert batches == ["8 images", "4 images", "2 images"]
        give_little_memory(model, 0, device, biggest)
        with pytest.raises(out_of_memory, match="memory"):
            list(AdaptiveEngine(model, batch_size=16)(images))

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_out_of_memory_empties_the_cache_of_the_device(self):
        model = with_exits(NETWORKS["vit"]()).cuda()
        reserved = []

        def run_stage(stage_index, state, *args, run=model.run_stage, **kwargs):
            reserved.append(torch.cuda.memory_reserved())
            if len(next(iter(state.values()))) > 8:
                kept = torch.empty(2**28, device="cuda")  # a tensor that a stage computed before it failed
                raise torch.OutOfMemoryError(f"CUDA out of memory with {kept.shape}")
            return run(stage_index, state, *args, **kwargs)

        model.run_stage = run_stage
        assert len(list(AdaptiveEngine(model, batch_size=16)(random_images(20)))) == 20
        assert reserved[1] < 2**28

    @pytest.mark.parametrize("in_order", [True, False])
    @pytest.mark.parametrize("most", [1, 2])
    def test_out_of_memory_with_images_of_different_sizes(self, in_order, most):
        network = lively_swin()
        sizes = [32, 32, 32, 48, 48, 32, 48, 32, 32, 32, 32, 48, 48, 48, 48, 48, 48, 32]
        images = [random_images(1, size, seed=index)[0] for index, size in enumerate(sizes)]
        with torch.no_grad():
            first = network(images[0][None], max_stages=1)
            network.config.threshold = [first.entropy.item(), 0.0]
            expected = [network(image[None]) for image in images]
        assert len({outputs.exit_stage.item() for outputs in expected}) > 1
        give_little_memory(network, most, "accelerator", [])
        engine = AdaptiveEngine(network, batch_size=4, in_order=in_order, max_pending=1)
        results = sorted(engine(images), key=lambda result: result.index)
        assert engine.stats.rows == [sum(outputs.exit_stage >= stage for outputs in expected) for stage in range(3)]
        for result, outputs in zip(results, expected, strict=True):
            assert result.exit_stage == outputs.exit_stage
            torch.testing.assert_close(result.logits, outputs.logits[0], atol=1e-5, rtol=0)

    def test_out_of_memory_leaves_the_oldest_first(self, model):
        """Images of a batch that ran out of memory run before later images."""
        give_little_memory(model, 1, "accelerator", [])
        engine = AdaptiveEngine(model, batch_size=4, in_order=False, threshold=100.0)  # all exit at the first stage
        assert [result.index for result in engine(random_images(10))] == list(range(10))

    def test_out_of_memory_of_less_than_a_batch(self, model):
        images = random_images(5)
        give_little_memory(model, 3, "accelerator", [])
        assert len(list(AdaptiveEngine(model, batch_size=64)(images))) == 5

    def test_another_error_of_a_stage_is_raised(self, model, caplog):
        def broken(*args, **kwargs):
            raise RuntimeError("shapes do not match")

        model.run_stage = broken
        with pytest.raises(RuntimeError, match="shapes do not match"):
            list(AdaptiveEngine(model, batch_size=16)(random_images(60)))
        assert not reader_threads()
        assert "memory" not in caplog.text

    @pytest.mark.parametrize(
        "arguments",
        [
            {"batch_size": 0},
            {"max_wait": -1.0},
            {"max_pending": 0},
            {"on_error": "skip"},
            {"threshold": -1.0},
            {"num_workers": -1},
            {"num_workers": 2, "max_wait": 0.1},
        ],
    )
    def test_refuses(self, model, arguments):
        with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
            AdaptiveEngine(model, **arguments)
