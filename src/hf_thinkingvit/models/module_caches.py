"""Caches of a module, derived from its parameters or settings, which copies of the module do not inherit."""

import torch
from torch import nn


class ModuleCacheMixin:
    """
    Mixin for a module with caches in the attributes `_cache_attributes`. Place it before `nn.Module` in the bases.

    The caches are dropped by `copy.deepcopy`, by `pickle` and `torch.save`, and for the replicas of `nn.DataParallel`,
    which share every other attribute with the original. Each copy builds its own.
    """

    _cache_attributes: tuple[str, ...] = ()

    def __getstate__(self) -> dict:
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name not in self._cache_attributes}

    def _replicate_for_data_parallel(self) -> nn.Module:
        replica = super()._replicate_for_data_parallel()
        for name in self._cache_attributes:
            replica.__dict__.pop(name, None)
        return replica


def is_plain_tensor(tensor: torch.Tensor) -> bool:
    """Whether `tensor` may be cached: not if it is of a subclass, such as a tracer's fake tensor."""
    return type(tensor) is torch.Tensor
