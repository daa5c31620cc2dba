"""Requests that come one by one: each with its own τ, none lost, and no more waiting than may wait."""

import threading
import time

import pytest
import torch

from hf_thinkingvit.inference import AdaptiveEngine, EngineService, ServiceClosed, ServiceFull, WithThreshold
from tests.inference.conftest import NETWORKS, with_exits
from tests.inference.test_engine import no_thread_stays  # noqa: F401  a fixture that runs by itself
from tests.models.test_modeling_avit import lively_avit
from tests.utils import random_images


def service_engine(model, **options) -> AdaptiveEngine:
    return AdaptiveEngine(model, **{"in_order": False, "on_error": "return", "max_wait": 0.005, **options})


class TestThresholdsOfImages:
    def test_in_one_batch(self):
        """Images with their own τ beside others; each has the exit that a call with its τ gives it."""
        model, images = with_exits(NETWORKS["vit"]()), random_images(24)
        own = [None, 0.0, 100.0, [0.0, 100.0]]
        inputs = [image if own[n % 4] is None else WithThreshold(image, own[n % 4]) for n, image in enumerate(images)]
        engine = AdaptiveEngine(model, batch_size=8)
        results = list(engine(inputs))
        assert engine.stats.batches[0] == 3
        for n, result in enumerate(results):
            with torch.no_grad():
                expected = model(images[n][None], threshold=own[n % 4])
            assert result.exit_stage == expected.exit_stage.item()
            torch.testing.assert_close(result.logits, expected.logits[0], atol=1e-5, rtol=0)
        assert {result.exit_stage for result in results[3::4]} == {1}

    def test_that_cannot_be(self):
        model, image = with_exits(NETWORKS["vit"]()), random_images(1)[0]
        engine = AdaptiveEngine(model, on_error="return")
        for threshold in (-1.0, float("nan"), [0.1], "low"):
            (result,) = engine([WithThreshold(image, threshold)])
            assert "threshold" in str(result.error)
        (result,) = AdaptiveEngine(lively_avit(), on_error="return")([WithThreshold(image, 0.5)])
        assert "does not think in stages" in str(result.error)


class TestService:
    def test_goes_on_after_an_image_of_another_size(self):
        model, image = with_exits(NETWORKS["vit"]()), random_images(1)[0]
        with EngineService(service_engine(model)) as service:
            assert "12" in str(service.submit(torch.zeros(3, 12, 12)).result(timeout=60).error)
            assert service.submit(image).result(timeout=60).error is None

    def test_answers_every_request_with_its_own_result(self):
        """From many threads at once, with good and bad images; what the service answers is what the model does."""
        model, images = with_exits(NETWORKS["vit"]()), random_images(40)
        with torch.no_grad():
            expected = model(images)
        found, refused = {}, []
        with EngineService(service_engine(model, batch_size=8), max_requests=1000) as service:

            def client(start: int) -> None:
                for n in range(start, 40, 4):
                    found[n] = service.submit(images[n]).result(timeout=60)
                    refused.append(service.submit(lambda: None).result(timeout=60).error)

            clients = [threading.Thread(target=client, args=(start,)) for start in range(4)]
            for thread in clients:
                thread.start()
            for thread in clients:
                thread.join()
        assert sorted(found) == list(range(40))
        for n, result in found.items():
            assert result.exit_stage == expected.exit_stage[n]
            torch.testing.assert_close(result.logits, expected.logits[n], atol=1e-5, rtol=0)
        assert len(refused) == 40 and all(isinstance(error, ValueError) for error in refused)

    def test_refuses_more_than_may_wait(self):
        release = threading.Event()
        image = random_images(1)[0]

        def slow():
            release.wait(timeout=60)
            return image

        service = EngineService(service_engine(with_exits(NETWORKS["vit"]())), max_requests=2)
        futures = [service.submit(slow) for _ in range(2)]  # without a processor: an error, once it is called
        with pytest.raises(ServiceFull, match="2 requests wait"):
            service.submit(image)
        assert service.waiting == 2
        release.set()
        for future in futures:
            assert future.result(timeout=60).index in (0, 1)
        assert service.submit(image).result(timeout=60).exit_stage is not None
        service.close()

    def test_closes_after_the_last_answer(self):
        service = EngineService(service_engine(with_exits(NETWORKS["vit"]()), max_wait=30.0, batch_size=64))
        futures = [service.submit(image) for image in random_images(5)]
        service.close()  # which does not wait for the batch to fill up
        assert all(future.done() and future.result().logits is not None for future in futures)
        with pytest.raises(ServiceClosed):
            service.submit(random_images(1)[0])
        service.close()

    def test_a_failure_reaches_those_who_wait(self):
        model = with_exits(NETWORKS["vit"]())

        def broken(*args, **kwargs):
            raise RuntimeError("the weights are gone")

        model.run_stage = broken
        service = EngineService(service_engine(model))
        future = service.submit(random_images(1)[0])
        with pytest.raises(ServiceClosed) as caught:
            future.result(timeout=60)
        assert "the weights are gone" in str(caught.value.__cause__)
        deadline = time.monotonic() + 10
        while service.failure is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(ServiceClosed):
            service.submit(random_images(1)[0])

    def test_what_it_asks_of_its_engine(self):
        model = NETWORKS["vit"]()
        for options in ({"in_order": True}, {"on_error": "raise"}, {"max_wait": None}):
            with pytest.raises(ValueError, match="needs `in_order=False`"):
                EngineService(service_engine(model, **options))
        with pytest.raises(ValueError, match="`max_requests`"):
            EngineService(service_engine(model), max_requests=0)
        with EngineService(service_engine(model)) as service, pytest.raises(ValueError, match="`threshold`"):
            service.submit(random_images(1)[0], threshold=-1.0)
