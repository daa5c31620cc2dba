"""Small models and inputs that tests share."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import IterableDataset
from torch.utils.flop_counter import FlopCounterMode

from hf_thinkingvit import (
    EXIT_CRITERIA,
    ThinkingSwinConfig,
    ThinkingSwinForImageClassification,
    ThinkingViTConfig,
    ThinkingViTForImageClassification,
)


FIXTURES = Path(__file__).parent / "fixtures"


def tiny_config(**overrides) -> ThinkingViTConfig:
    fields = {
        "thinking_stages": [1, 2, 4],
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "image_size": 32,
        "patch_size": 8,
        "num_labels": 12,
        "threshold": 0.0,
    }
    return ThinkingViTConfig(**{**fields, **overrides})


def lively_model(config: ThinkingViTConfig | None = None, **overrides) -> ThinkingViTForImageClassification:
    """A model in evaluation mode whose weights are large enough that every part shows in the logits, α included."""
    return lively(ThinkingViTForImageClassification, config or tiny_config(**overrides))


def tiny_swin_config(**overrides) -> ThinkingSwinConfig:
    """Three rounds over two layers with grids of 8 × 8 and 4 × 4 patches, the first with shifted windows."""
    fields = {
        "head_rounds": [[1, 1], [1, 2], [2, 4]],
        "num_heads": [2, 4],
        "depths": [2, 1],
        "embed_dim": 8,
        "image_size": 32,
        "patch_size": 4,
        "window_size": 4,
        "num_labels": 12,
        "threshold": 0.0,
    }
    return ThinkingSwinConfig(**{**fields, **overrides})


def lively_swin(config: ThinkingSwinConfig | None = None, **overrides) -> ThinkingSwinForImageClassification:
    """Like `lively_model`, for ThinkingSwin."""
    return lively(ThinkingSwinForImageClassification, config or tiny_swin_config(**overrides))


def lively(model_class, config):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.5))
    return model.eval()


def perturbed(model: nn.Module) -> nn.Module:
    """The same model in evaluation mode, with noise on every weight, so that none is 0 or 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def random_images(count: int = 6, size: int | tuple[int, int] = 32, seed: int = 2) -> torch.Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def middle_threshold(model, pixel_values: torch.Tensor) -> float:
    """A τ at which half of the images exit after stage 0: halfway between the two middle scores of that stage."""
    with torch.no_grad():
        logits = model(pixel_values, max_stages=1).logits
    scores = EXIT_CRITERIA[model.config.exit_criterion].score(logits, model.config.entropy_top_k).sort().values
    middle = len(scores) // 2
    return float((scores[middle - 1] + scores[middle]) / 2)


def counted_flops(call: Callable[[], object]) -> int:
    """
    Floating-point operations (two per multiply-accumulate) of the matrix products in `call()`. Attention runs as plain
    products, because the counter knows only some of the fused kernels.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


class HostSynchronisations(TorchDispatchMode):
    """
    Records the operations that would make the host wait for a GPU: values read, and sizes that depend on values.

    Attributes:
        counts: names of the operations so far, in order.
    """

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")

    def __init__(self):
        super().__init__()
        self.counts: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in self.WAITING or by_mask:
            self.counts.append(name)
        return function(*args, **(kwargs or {}))


class SizedStream(IterableDataset):
    """An iterable dataset with a length, such as webdataset's."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __iter__(self):
        return iter(self.images)


class CountOperations(TorchDispatchMode):
    """Counts the operations with one of the given names that run in this context."""

    def __init__(self, *names: str):
        super().__init__()
        self.count, self.names = 0, names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in self.names
        return function(*args, **(kwargs or {}))
