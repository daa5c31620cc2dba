"""The images that wait for one stage."""

import math

import torch

from ..models.early_exit import State


class StageQueue:
    """Images that wait for a stage, oldest first."""

    def __init__(self):
        self.parts: list[tuple[State, torch.Tensor, float]] = []  # state, places in the input, since when

    def __len__(self) -> int:
        return sum(len(indices) for _, indices, _ in self.parts)

    @property
    def since(self) -> float:
        return min((since for *_, since in self.parts), default=math.inf)

    def holds(self, index: int) -> bool:
        return any(bool((indices == index).any()) for _, indices, _ in self.parts)

    def fits(self, state: State) -> bool:
        """Whether images of this size can be in one batch with those that wait."""
        return not self.parts or all(state[name].shape[1:] == part.shape[1:] for name, part in self.parts[0][0].items())

    def put(self, state: State, indices: torch.Tensor, since: float) -> None:
        self.parts.append((state, indices, since))

    def put_back(self, state: State, indices: torch.Tensor, since: float) -> None:
        """Images that were taken and could not run."""
        self.parts.insert(0, (state, indices, since))

    def take(self, count: int) -> tuple[State, torch.Tensor, float]:
        """The oldest images, at most `count`."""
        states, indices, since = zip(*self.parts)
        # One part that is a batch already, as where every image goes on, is not copied.
        state = states[0] if len(states) == 1 else {name: torch.cat([s[name] for s in states]) for name in states[0]}
        indices = torch.cat(indices)
        self.parts = []
        if len(indices) > count:
            self.put({name: tensor[count:] for name, tensor in state.items()}, indices[count:], since[-1])
        return {name: tensor[:count] for name, tensor in state.items()}, indices[:count], min(since)
