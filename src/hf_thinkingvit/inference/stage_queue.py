"""The images that wait for one stage."""

import math
from collections import deque

import torch

from ..models.staged_run import State


class StageQueue:
    """
    First-in, first-out queue of the images that wait for a stage. They arrive in input order, from the reader or from
    the previous stage, so the first image has the smallest index and has waited longest.
    """

    def __init__(self):
        self._parts: deque[tuple[State, list[int], float]] = deque()  # state, indices in the input, arrival time
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def since(self) -> float:
        """Arrival time of the first image, in seconds of `time.monotonic`; infinity if the queue is empty."""
        return self._parts[0][2] if self._parts else math.inf

    @property
    def first(self) -> int | None:
        """Index of the first image in the input; `None` if the queue is empty."""
        return self._parts[0][1][0] if self._parts else None

    def fits(self, state: State) -> bool:
        """Whether `state` has the shapes of the waiting images, so that they can be in one batch."""
        return not self._parts or all(
            state[name].shape[1:] == part.shape[1:] for name, part in self._parts[0][0].items()
        )

    def put(self, state: State, indices: list[int], since: float) -> None:
        self._parts.append((state, indices, since))
        self._count += len(indices)

    def put_back(self, state: State, indices: list[int], since: float) -> None:
        """Return images to the front of the queue, after a step that failed."""
        self._parts.appendleft((state, indices, since))
        self._count += len(indices)

    def take(self, count: int) -> tuple[State, list[int], float]:
        """Remove at most `count` images from the front. Returns their state, indices and first arrival time."""
        since, states, taken = self.since, [], []
        while self._parts and len(taken) < count:
            state, indices, part_since = self._parts.popleft()
            wanted = count - len(taken)
            if len(indices) > wanted:
                rest = {name: tensor[wanted:] for name, tensor in state.items()}
                self._parts.appendleft((rest, indices[wanted:], part_since))
                state, indices = {name: tensor[:wanted] for name, tensor in state.items()}, indices[:wanted]
            states.append(state)
            taken += indices
        self._count -= len(taken)
        # A single part is not copied. It is a whole batch if every image of the previous stage went on.
        state = states[0] if len(states) == 1 else {name: torch.cat([s[name] for s in states]) for name in states[0]}
        return state, taken, since
