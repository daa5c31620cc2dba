"""
Compilation of single stages, for a few batch sizes. Early exit leaves any number of images to a stage, and compiling a
program for each number would take too long, so batches are padded to the next size and the padding is cut off again.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from .module_caches import ModuleCacheMixin
from .module_recording import RECORDINGS, recording_off, wants_recordings


def check_batch_sizes(batch_sizes: Sequence[int]) -> list[int]:
    """`batch_sizes` ascending and unique; `ValueError` unless it is a non-empty list of positive integers."""
    valid = isinstance(batch_sizes, Sequence) and not isinstance(batch_sizes, str) and len(batch_sizes) > 0
    if not valid or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in batch_sizes):
        raise ValueError(f"`batch_sizes` must be a list of positive integers, got {batch_sizes!r}.")
    return sorted(set(batch_sizes))


def compilable_step(step: Callable) -> Callable:
    """
    Decorator for a step of a staged model (`begin`, `run_stage`, `recycle`): `step(self, [stage_index,] state, ...)`.
    After `compile_stages`, calling the step in inference runs its compiled program.
    """
    parameters = [p for p in list(signature(step).parameters.values())[1:] if p.kind is p.POSITIONAL_OR_KEYWORD]
    names = [parameter.name for parameter in parameters]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    state_name = next(name for name in names if name != "stage_index")

    @wraps(step)
    def run(self, *args, **kwargs):
        programs = self._stage_programs
        if programs is None or self.training or torch.is_grad_enabled():
            return step(self, *args, **kwargs)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # the caller is being compiled
            return step(self, *args, **kwargs)
        given = {name: kwargs[name] for name in kwargs if kwargs[name] is not None and name not in RECORDINGS}
        positional = dict(zip(names, args))
        arguments = {**defaults, **positional, **given}
        state = arguments.get(state_name)
        # A program takes the step's own arguments, each given once and as a plain value. Any other call, for example
        # one that records outputs, runs (or fails) without a program.
        fits = set(names) == arguments.keys() and len(args) == len(positional) and not positional.keys() & given.keys()
        constants = {name: value for name, value in arguments.items() if name != state_name}
        fits = fits and _is_batch(state) and all(isinstance(value, int | range | None) for value in constants.values())
        if not fits or wants_recordings(self.config, kwargs):
            return step(self, *args, **kwargs)
        return programs.run(self, step, state_name, state, constants)

    return run


class CompiledStagesMixin(ModuleCacheMixin):
    """
    Provides `compile_stages`, for a model whose steps are decorated with `compilable_step`. Copies of the model do not
    inherit its programs: they run uncompiled until `compile_stages` is called on them.
    """

    _stage_programs: "StagePrograms | None" = None
    _cache_attributes = ("_stage_programs",)

    def compile_stages(self, batch_sizes: Sequence[int] | None = (1, 2, 4, 8, 16, 32, 64), **options) -> None:
        r"""
        Compile each stage, and each step from one stage to the next, separately. In evaluation without gradients,
        `forward` and everything else that runs stages then use the compiled programs; calls that record hidden states
        run uncompiled. Compilation happens at first use, once for each stage, batch size and image size. Later changes
        of the model (weights, dtype, modules, hooks, configuration) take effect, and recompile if necessary. Copies
        (`copy.deepcopy`, `pickle`, the replicas of `nn.DataParallel`) are not compiled.

        Args:
            batch_sizes (`list[int]`, *optional*):
                Batches are padded to the next of these sizes, and larger batches than the last run in parts, so that no
                number of images compiles again. `None` removes the compiled programs.
            options:
                Options of `torch.compile`, such as `mode="reduce-overhead"` for CUDA graphs.

        Raises:
            ValueError: if `batch_sizes` is neither `None` nor a list of positive integers.
        """
        programs = None if batch_sizes is None else StagePrograms(check_batch_sizes(batch_sizes), options)
        self.__dict__.pop("_stage_programs", None)
        if programs is not None:
            self._stage_programs = programs


class StagePrograms:
    """
    The compiled programs of a model's steps: one for each step, its arguments, batch size and image size.

    A program takes the model as an argument and holds no reference to it, so it reads the current weights of the model
    that it is called with. The guards of `torch.compile` decide whether it must be recompiled.

    Args:
        batch_sizes (`list[int]`): ascending. Larger batches than the last run in parts.
        options (`dict`): options of `torch.compile`.
    """

    def __init__(self, batch_sizes: list[int], options: dict[str, Any]):
        self.batch_sizes, self.options = batch_sizes, options
        self.programs: dict[tuple, Callable] = {}
        # A CUDA graph reuses the memory of its outputs, so they are copied before the next call may run.
        self.copies = options.get("mode") in ("reduce-overhead", "max-autotune")
        self.lock = threading.Lock() if self.copies else nullcontext()

    def run(self, model: nn.Module, step: Callable, state_name: str, state: Any, constants: dict[str, Any]) -> Any:
        """`step` of `model` on `state` (pixel values or a dict), by the program for its batch size."""
        count = len(_first(state))
        if count == 0:
            return step(model, **{state_name: state}, **constants)
        largest = self.batch_sizes[-1]
        if count > largest:
            parts = [_rows(state, slice(start, start + largest)) for start in range(0, count, largest)]
            return _join([self.run(model, step, state_name, part, constants) for part in parts])
        size = next(size for size in self.batch_sizes if size >= count)
        if size > count:
            rows = torch.arange(size, device=_first(state).device).clamp(max=count - 1)
            state = tree_map(lambda tensor: tensor.index_select(0, rows), state)
        # Programs are specialised on strides, even of dimensions of size 1: those of a view would recompile.
        state = tree_map(lambda tensor: tensor.flatten().view(tensor.shape), state)
        program = self._program(step, state_name, state, constants)
        # A hook that is added or removed later must be seen; by default `torch.compile` does not look for hooks again.
        with self.lock, torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            output = program(model, state)
            return tree_map(lambda tensor: tensor[:count].clone() if self.copies else tensor[:count], output)

    def _program(self, step: Callable, state_name: str, state: Any, constants: dict[str, Any]) -> Callable:
        inputs = tuple((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tree_leaves(state))
        key = step, tuple(constants.items()), inputs
        if key not in self.programs:

            def program(model: nn.Module, state: Any) -> Any:
                with recording_off():
                    return step(model, **{state_name: state}, **constants)

            # Each program gets its own code object, because dynamo limits recompilations per code object.
            program.__code__ = program.__code__.replace(co_name=f"stage_program_{len(self.programs)}")
            self.programs.setdefault(key, torch.compile(program, dynamic=False, **self.options))
        return self.programs[key]


def _is_batch(state: Any) -> bool:
    tensors = tree_leaves(state) if isinstance(state, dict) else [state]
    return len(tensors) > 0 and all(isinstance(tensor, torch.Tensor) and tensor.dim() > 0 for tensor in tensors)


def _first(state: Any) -> torch.Tensor:
    return next(iter(state.values())) if isinstance(state, dict) else state


def _rows(state: Any, rows: slice) -> Any:
    return tree_map(lambda tensor: tensor[rows], state)


def _join(parts: list[Any]) -> Any:
    return tree_map(lambda *tensors: torch.cat(tensors), parts[0], *parts[1:])
