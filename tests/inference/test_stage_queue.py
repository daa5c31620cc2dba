import math

import torch

from hf_thinkingvit.inference.stage_queue import StageQueue


def part(*places: int) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Waiting images, whose state holds their places."""
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
