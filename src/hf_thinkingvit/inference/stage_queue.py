"""The images that wait for one stage."""

import math
from collections import deque

import torch

from ..models.staged_run import State


class StageQueue:
    """
    Images that wait for a stage, oldest first. They come in the order of the input, from the reader or from the stage
    before, so the first has the smallest place of all and has waited longest: nothing here looks at the others.
    """

    def __init__(self):
        self._parts: deque[tuple[State, list[int], float]] = deque()  # state, places in the input, since when
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def since(self) -> float:
        """When the first came, in seconds of `time.monotonic`; infinity where none waits."""
        return self._parts[0][2] if self._parts else math.inf

    @property
    def first(self) -> int | None:
        """Place of the first in the input; `None` where none waits."""
        return self._parts[0][1][0] if self._parts else None

    def fits(self, state: State) -> bool:
        """Whether images of this size can be in one batch with those that wait."""
        return not self._parts or all(
            state[name].shape[1:] == part.shape[1:] for name, part in self._parts[0][0].items()
        )

    def put(self, state: State, indices: list[int], since: float) -> None:
        self._parts.append((state, indices, since))
        self._count += len(indices)

    def put_back(self, state: State, indices: list[int], since: float) -> None:
        """Images that were taken and could not run."""
        self._parts.appendleft((state, indices, since))
        self._count += len(indices)

    def take(self, count: int) -> tuple[State, list[int], float]:
        """The oldest images, at most `count`."""
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
        # One part that is a batch already, as where every image goes on, is not copied.
        state = states[0] if len(states) == 1 else {name: torch.cat([s[name] for s in states]) for name in states[0]}
        return state, taken, since
