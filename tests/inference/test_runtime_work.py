"""What runtimes do and how often, counted; and errors of the programs themselves, which the engine hands on."""

import importlib
from contextlib import suppress

import pytest
import torch

from hf_thinkingvit.inference import AdaptiveEngine, EngineService, ServiceClosed
from hf_thinkingvit.torch_free.programs import memory_errors
from tests.inference.conftest import NETWORKS, iter_into, with_exits
from tests.utils import random_images


pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporters


@pytest.fixture
def compilations(runtime, monkeypatch) -> list:
    """An entry for each program that the runtime compiles."""
    package = importlib.import_module(runtime)
    owner, name = {
        "openvino": (getattr(package, "Core", None), "compile_model"),
        "onnxruntime": (package, "InferenceSession"),
    }[runtime]
    found, compile_program = [], getattr(owner, name)

    def counted(*arguments, **options):
        found.append(arguments)
        return compile_program(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)
    return found


@pytest.fixture
def broken(exported, runtime):
    """A model whose second stage's program fails when it is called for the second time."""
    loaded = exported.load("vit", runtime, threads=1)
    program, calls = loaded._programs[1], []

    class Failing:
        inputs = program.inputs

        def __call__(self, state):
            calls.append(len(state["pixel_values"]))
            if len(calls) == 2:
                raise RuntimeError("the program failed")
            return program(state)

    loaded._programs[1] = Failing()
    return loaded


class TestCountedWork:
    def test_programs_are_compiled_once_whatever_the_batches(self, exported, runtime, compilations):
        """One compilation for each stage, on loading; none for batches of sizes seen or not, streams or threads."""
        exported.path("vit", runtime)
        compilations.clear()
        loaded, model = exported.load("vit", runtime, threads=1), with_exits(NETWORKS["vit"]())
        assert len(compilations) == 3
        for batch_size in (1, 5, 16, 5, 1):
            images = random_images(batch_size, seed=batch_size)
            with torch.no_grad():
                expected = model(images, threshold=0.0).logits
            torch.testing.assert_close(loaded(images, threshold=0.0).logits, expected, atol=1e-4, rtol=0)
        list(AdaptiveEngine(loaded, batch_size=7)(random_images(20)))
        assert len(compilations) == 3

    def test_stages_run_once_for_each_batch(self, exported, runtime):
        """And only as far as images go."""
        loaded, images = exported.load("vit", runtime, threads=1), random_images(20)
        loaded(images, threshold=99.0)
        assert loaded.calls == [1, 0, 0]
        loaded(images, threshold=0.0, max_stages=2)
        assert loaded.calls == [2, 1, 0]
        loaded(images, threshold=99.0, output_stage_logits=True)
        assert loaded.calls == [3, 2, 1]
        engine = AdaptiveEngine(loaded, batch_size=8, threshold=0.0)
        list(engine(images))
        assert engine.stats.batches == [3, 3, 3]
        assert loaded.calls == [6, 5, 4]


class TestFaults:
    def test_an_error_of_a_program_ends_the_stream_and_not_the_engine(self, broken):
        images, found = random_images(60), []
        engine = AdaptiveEngine(broken, batch_size=8, threshold=0.0, in_order=False)
        with pytest.raises(RuntimeError, match="the program failed"):
            iter_into(engine(images), found)
        assert sorted(result.index for result in found) == list(range(8))
        again = list(AdaptiveEngine(broken, batch_size=8)(images))
        expected = broken(images)
        assert [
            result.exit_stage for result in sorted(again, key=lambda one: one.index)
        ] == expected.exit_stage.tolist()

    def test_an_error_of_a_program_answers_all_requests_of_a_service(self, broken):
        engine = AdaptiveEngine(broken, batch_size=4, threshold=0.0, max_wait=0.01, in_order=False, on_error="return")
        with EngineService(engine) as service:
            futures = []
            for image in random_images(40):
                with suppress(ServiceClosed):
                    futures.append(service.submit(image))
            errors = [future.exception(timeout=60) for future in futures]
        assert errors[0] is None
        refused = [error for error in errors if error is not None]
        assert refused and all(isinstance(error, ServiceClosed) for error in refused)
        assert all("the program failed" in str(error.__cause__) for error in refused)

    def test_a_stream_that_is_given_up_leaves_the_next_one_right(self, exported, runtime):
        loaded, images = exported.load("vit", runtime, threads=1), random_images(60)
        engine = AdaptiveEngine(loaded, batch_size=8)
        stream = engine(images)
        for _ in range(5):
            next(stream)
        stream.close()
        expected = loaded(images)
        results = list(engine(images))
        assert [result.exit_stage for result in results] == expected.exit_stage.tolist()
        torch.testing.assert_close(torch.stack([one.logits for one in results]), expected.logits, atol=1e-5, rtol=0)

    def test_images_that_cannot_be_read_beside_others(self, exported, runtime):
        loaded, images = exported.load("vit", runtime, threads=1), random_images(5)
        inputs = [images[0], OSError("lost"), images[1], "no file", images[2]]
        results = list(AdaptiveEngine(loaded, loaded.processor, batch_size=2, on_error="return")(inputs))
        assert [result.error is None for result in results] == [True, False, True, False, True]
        assert [result.exit_stage for result in results[::2]] == loaded(images[:3]).exit_stage.tolist()

    def test_what_runtimes_say_of_memory(self):
        for words in ("std::bad_alloc", "Failed to allocate memory for requested buffer of size 1"):
            with pytest.raises(torch.OutOfMemoryError), memory_errors(torch.OutOfMemoryError):
                raise RuntimeError(words)
        with pytest.raises(RuntimeError, match="shapes do not match"), memory_errors(torch.OutOfMemoryError):
            raise RuntimeError("shapes do not match")
