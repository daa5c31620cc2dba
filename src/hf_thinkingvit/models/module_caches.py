"""Attributes of a module that are derived from its other attributes and stay behind when the module is copied."""

import torch
from torch import nn


class ModuleCacheMixin:
    """
    For a module that caches what it derived from its parameters or settings in the attributes `_cache_attributes`.

    They are dropped by `copy.deepcopy`, by `pickle` and `torch.save`, and for the replicas of `nn.DataParallel`, which
    share every other attribute with the original: each copy derives its own. Place it before `nn.Module` in the bases.
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
    """Whether `tensor` may outlive the call: not one of a tracer (a fake tensor, say), nor of another subclass."""
    return type(tensor) is torch.Tensor
