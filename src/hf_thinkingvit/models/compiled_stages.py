"""
Stages compiled one by one, for a few batch sizes: early exit leaves any number of images, and a program for each number
would compile for ever. Batches are filled up to the next size, and what was filled in is cut off again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map


def check_batch_sizes(batch_sizes: Sequence[int]) -> list[int]:
    """Ascending, without repetition; `ValueError` for what is no list of positive integers."""
    valid = isinstance(batch_sizes, Sequence) and not isinstance(batch_sizes, str) and len(batch_sizes) > 0
    if not valid or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in batch_sizes):
        raise ValueError(f"`batch_sizes` must be a list of positive integers, got {batch_sizes!r}.")
    return sorted(set(batch_sizes))


class CompiledStage:
    """
    A step of a staged model (`begin`, `run_stage` or `recycle` of one stage) that compiles itself once for each batch
    size and image size.

    Args:
        step (`Callable`): from a state, or pixel values, to tensors whose first dimension is the image.
        batch_sizes (`list[int]`): ascending. More images than the last run in parts.
        options: of `torch.compile`.
    """

    def __init__(self, step: Callable, batch_sizes: list[int], **options: Any):
        self.step, self.batch_sizes, self.options = step, batch_sizes, options
        self.programs: dict[tuple, Callable] = {}  # by the shapes of their input
        # A CUDA graph writes each answer to where the last one was.
        self.copies = options.get("mode") in ("reduce-overhead", "max-autotune")

    def __call__(self, state: Any) -> Any:
        count = len(_first(state))
        if count == 0:
            return self.step(state)
        largest = self.batch_sizes[-1]
        if count > largest:
            parts = [_rows(state, slice(start, start + largest)) for start in range(0, count, largest)]
            return _join([self(part) for part in parts])
        size = next(size for size in self.batch_sizes if size >= count)
        if size > count:
            rows = torch.arange(size, device=_first(state).device).clamp(max=count - 1)
            state = tree_map(lambda tensor: tensor.index_select(0, rows), state)
        # A program is for certain strides, also where a dimension is 1: those of a view would make it compile again.
        state = tree_map(lambda tensor: tensor.flatten().view(tensor.shape), state)
        output = self._program(state)(state)
        return tree_map(lambda tensor: tensor[:count].clone() if self.copies else tensor[:count], output)

    def _program(self, state: Any) -> Callable:
        shapes = tuple(tuple(tensor.shape) for tensor in tree_leaves(state))
        if shapes not in self.programs:
            # Of its own code object: dynamo counts recompilations by code, and these are none.
            def program(state: Any, step: Callable = self.step) -> Any:
                return step(state)

            program.__code__ = program.__code__.replace(co_name=f"stage_program_{len(self.programs)}")
            self.programs[shapes] = torch.compile(program, dynamic=False, **self.options)
        return self.programs[shapes]


def _first(state: Any) -> torch.Tensor:
    return next(iter(state.values())) if isinstance(state, dict) else state


def _rows(state: Any, rows: slice) -> Any:
    return tree_map(lambda tensor: tensor[rows], state)


def _join(parts: list[Any]) -> Any:
    return tree_map(lambda *tensors: torch.cat(tensors), parts[0], *parts[1:])
