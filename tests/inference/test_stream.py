"""The queue of images that wait for a stage, and the limit of their waiting time."""

import math
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from hf_thinkingvit.inference import AdaptiveEngine
from hf_thinkingvit.inference.stage_queue import StageQueue
from hf_thinkingvit.inference.stream import Stream
from hf_thinkingvit.models.exit_scores import mean_binary_entropy
from tests.models.test_modeling_avit import lively_avit
from tests.utils import lively_model, random_images


def part(*places: int) -> tuple[dict[str, torch.Tensor], list[int]]:
    """State and indices of waiting images; the state holds the indices."""
    return {"hidden_states": torch.tensor(places)[:, None]}, list(places)


def test_the_oldest_leave_first_and_the_others_go_on_waiting_since_they_came():
    queue = StageQueue()
    assert (len(queue), queue.since, queue.first) == (0, math.inf, None)
    queue.put(*part(0, 1, 2), since=1.0)
    queue.put(*part(3, 4), since=2.0)
    queue.put(*part(5), since=3.0)
    assert (len(queue), queue.since, queue.first) == (6, 1.0, 0)
    for taken, left, since, first in (([0, 1], 4, 1.0, 2), ([2, 3], 2, 2.0, 4), ([4, 5], 0, math.inf, None)):
        state, places, oldest = queue.take(2)
        assert places == state["hidden_states"][:, 0].tolist() == taken
        assert oldest == {0: 1.0, 2: 1.0, 4: 2.0}[taken[0]]
        assert (len(queue), queue.since, queue.first) == (left, since, first)


def test_what_is_put_back_is_the_oldest_again():
    queue = StageQueue()
    queue.put(*part(0, 1), since=1.0)
    queue.put(*part(2), since=2.0)
    queue.put_back(*queue.take(2))
    assert (len(queue), queue.since, queue.first) == (3, 1.0, 0)
    assert queue.take(5)[1] == [0, 1, 2]


def test_waits_for_the_source_no_longer_than_any_image_may_wait():
    model = lively_model()
    stream = Stream(AdaptiveEngine(model, max_wait=0.5), [])
    assert stream._patience() is None  # nothing waits
    stream.queues[1].put(*part(0), since=time.monotonic())
    assert 0 <= stream._patience() <= 0.5
    stream.queues[0].put(*part(1), since=time.monotonic() - 9)
    assert stream._patience() == 0
    endless = Stream(AdaptiveEngine(model), [])
    endless.queues[0].put(*part(0), since=time.monotonic())
    assert endless._patience() is None


def test_nothing_is_copied_where_every_image_goes_on():
    model, states = lively_model(), []
    engine, run_stage = AdaptiveEngine(model, threshold=0.0), model.run_stage

    def recorded(*args, **kwargs):
        states.append(run_stage(*args, **kwargs))
        return dict(states[0])

    model.run_stage = recorded
    exits, answer, state = engine.step(0, {"pixel_values": random_images(4)})
    assert not exits.any() and len(answer["logits"]) == 0
    assert all(state[name] is tensor for name, tensor in states[0].items())


def test_nothing_waits_for_others_if_it_may_not():
    engine = AdaptiveEngine(lively_model(), threshold=0.0, batch_size=4, max_wait=0)
    answered = threading.Semaphore(0)

    def each_after_the_answer_before() -> Iterator[torch.Tensor]:
        for image in random_images(3):
            yield image
            assert answered.acquire(timeout=60), "no answer to the image before"

    for index, result in enumerate(engine(each_after_the_answer_before())):
        assert result.index == index
        answered.release()
    assert engine.stats.batches == engine.stats.rows == [3, 3, 3]


def test_the_entropy_of_a_multi_label_avit_is_of_each_label():
    network = lively_avit(problem_type="multi_label_classification")
    results = list(AdaptiveEngine(network)(random_images(3)))
    expected = mean_binary_entropy(torch.stack([result.logits for result in results]))
    assert [result.entropy for result in results] == pytest.approx(expected.tolist())
