"""
A sub-network of a nested model, as data: which part of each layer's weights it uses, and which layers.

Weights are shared: a sub-network uses the leading rows and columns of every matrix. Layers get a `SubNetwork` with each
call and hold no active size of their own, so the same model may run several at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .configuration_checks import check_integer


@dataclass(frozen=True)
class SubNetwork:
    """
    The sizes of one sub-network.

    Args:
        num_attention_heads (`int`): leading attention heads.
        hidden_size (`int`): leading channels of the residual stream.
        intermediate_size (`int` or `tuple[int, ...]`): leading MLP channels; one number for all layers, or one for each
            layer of the model.
        head_dim (`int`, *optional*): channels of a head, by default `hidden_size // num_attention_heads`. The projected
            queries, keys and values have `num_attention_heads * head_dim` channels, which need not be `hidden_size`.
        layers (`tuple[int, ...]`, *optional*): numbers of the layers that run, in ascending order; all by default.

    Raises:
        ValueError: for sizes that are no positive integers, or layers that are not strictly increasing.
    """

    num_attention_heads: int
    hidden_size: int
    intermediate_size: int | tuple[int, ...]
    head_dim: int | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        for name in ("intermediate_size", "layers"):
            value = getattr(self, name)
            if isinstance(value, Sequence):
                object.__setattr__(self, name, tuple(value))
        for name in ("num_attention_heads", "hidden_size", "head_dim"):
            check_integer(name, getattr(self, name), minimum=1)
        widths = self.intermediate_size if isinstance(self.intermediate_size, tuple) else (self.intermediate_size,)
        for width in widths:
            check_integer("intermediate_size", width, minimum=1)
        layers = self.layers
        if layers is not None:
            for layer in layers:
                check_integer("layers", layer, minimum=0)
            if not layers or list(layers) != sorted(set(layers)):
                raise ValueError(f"`layers` must be a non-empty, strictly increasing list, got {list(layers)}.")

    @property
    def attention_size(self) -> int:
        """Channels of the projected queries, keys and values."""
        return self.num_attention_heads * self.head_dim

    def layer_numbers(self, num_layers: int) -> Sequence[int]:
        """The layers that run, of a model with `num_layers` layers."""
        return range(num_layers) if self.layers is None else self.layers

    def at_layer(self, layer: int) -> "SubNetwork":
        """The sizes in one layer: `intermediate_size` is one number."""
        if isinstance(self.intermediate_size, int):
            return self
        return replace(self, intermediate_size=self.intermediate_size[layer])

    def same_sizes(self, other: "SubNetwork") -> bool:
        """Whether both have the same heads and channels, whichever layers they run."""
        return replace(self, layers=None) == replace(other, layers=None)

    def check_fits(self, config, name: str) -> None:
        """`ValueError`, which calls the sub-network `name`, unless a model of this `NestedViTConfig` contains it."""
        num_layers = config.num_hidden_layers
        for what, used, full in (
            ("channels", self.hidden_size, config.hidden_size),
            ("channels of its heads", self.attention_size, config.hidden_size),
            ("MLP channels", self._widest, config.intermediate_size),
            ("layers", (self.layers or (num_layers - 1,))[-1] + 1, num_layers),
        ):
            if used > full:
                raise ValueError(f"{name} uses {used} {what}, but the model has {full}.")
        if isinstance(self.intermediate_size, tuple) and len(self.intermediate_size) != num_layers:
            raise ValueError(
                f"{name} needs one `intermediate_size`, or one for each of {num_layers} layers, got "
                f"{len(self.intermediate_size)}."
            )

    @property
    def _widest(self) -> int:
        return max(self.intermediate_size) if isinstance(self.intermediate_size, tuple) else self.intermediate_size


__all__ = ["SubNetwork"]
