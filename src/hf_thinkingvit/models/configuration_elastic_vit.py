"""Elastic ViT configuration."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from .configuration_checks import (
    check_boolean,
    check_integer,
    check_label_smoothing,
    check_loss_weights,
    check_number,
)
from .configuration_nested_vit import NestedViTConfig
from .sub_networks import SubNetwork


class ElasticViTConfig(NestedViTConfig):
    r"""
    Configuration of one Vision Transformer that contains several smaller ones, of which the user picks one. The class
    methods `hydravit`, `matformer`, `dynabert` and `sortednet` choose the published sub-networks for any full size.

    Args:
        sub_networks (`list[dict]`, *optional*):
            The fields of a [`SubNetwork`] for each: `num_attention_heads`, `hidden_size`, `intermediate_size` (one
            number, or one for each layer), `head_dim` and `layers`. By default one, the whole model.
        default_sub_network (`int`, *optional*):
            The sub-network that `forward` runs where none is asked for; by default the last.
        sub_network_loss_weights (`list[float]`, *optional*):
            Weight of each sub-network's loss in training, and of each where a run draws one at random; by default
            equal ones that sum to 1.
        separate_classifiers (`bool`, *optional*, defaults to `False`):
            Whether each sub-network has a classifier of its own, instead of the leading columns of one.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Share of each target that the training loss spreads evenly over all classes, at least 0 and below 1.
        kwargs:
            The ViT fields of [`NestedViTConfig`], at full size: `num_attention_heads` (12), `hidden_size` (by default
            64 channels a head), `num_hidden_layers` (12), `intermediate_size` and so on.

    Raises:
        ValueError: for values that cannot work; the message names the field.
    """

    model_type = "elastic_vit"
    keys_to_ignore_at_inference = ["sub_network_logits", "hidden_states", "attentions"]
    remote_code: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_elastic_vit.ElasticViTConfig",
        "AutoModel": "modeling_elastic_vit.ElasticViTModel",
        "AutoModelForImageClassification": "modeling_elastic_vit.ElasticViTForImageClassification",
    }

    num_attention_heads: int = 12
    sub_networks: list[dict] | tuple[dict, ...] | None = None
    default_sub_network: int | None = None
    sub_network_loss_weights: list[float] | tuple[float, ...] | None = None
    separate_classifiers: bool = False
    label_smoothing: float | int = 0.0

    def __post_init__(self, **kwargs):
        check_integer("num_attention_heads", self.num_attention_heads, minimum=1)
        width = 64 * self.num_attention_heads if self.hidden_size is None else self.hidden_size
        if self.sub_networks is None:
            mlp = 4 * width if self.intermediate_size is None else self.intermediate_size
            self.sub_networks = [
                {"num_attention_heads": self.num_attention_heads, "hidden_size": width, "intermediate_size": mlp}
            ]
        self.sub_networks = [_as_dict(each) for each in self.sub_networks]
        if self.default_sub_network is None:
            self.default_sub_network = len(self.sub_networks) - 1
        super().__post_init__(**kwargs)

    @property
    def networks(self) -> tuple[SubNetwork, ...]:
        """The sub-networks as objects."""
        return tuple(SubNetwork(**fields) for fields in self.sub_networks)

    @property
    def whole_sub_network(self) -> int:
        """The number of the sub-network that runs all of the model. `ValueError` if there is none."""
        whole = SubNetwork(self.num_attention_heads, self.hidden_size, self.intermediate_size)
        return self.find_sub_network(whole, "whole model")

    def find_sub_network(self, sizes: SubNetwork, name: str) -> int:
        """
        The number of the sub-network with these heads and channels in all layers, which the error calls `name`.

        Raises:
            ValueError: if there is none.
        """
        layers = range(self.num_hidden_layers)
        for number, network in enumerate(self.networks):
            runs_all = tuple(network.layer_numbers(self.num_hidden_layers)) == tuple(layers)
            if runs_all and all(network.at_layer(each).same_sizes(sizes.at_layer(each)) for each in layers):
                return number
        raise ValueError(f"None of `sub_networks` is the {name}, with all layers: add it.")

    def validate(self) -> None:
        super().validate()
        if not isinstance(self.sub_networks, Sequence) or not self.sub_networks:
            raise ValueError(f"`sub_networks` must be a non-empty list, got {self.sub_networks!r}.")
        for index, network in enumerate(self.networks):
            network.check_fits(self, f"`sub_networks[{index}]`")
        check_integer("default_sub_network", self.default_sub_network, minimum=0)
        if self.default_sub_network >= len(self.sub_networks):
            raise ValueError(
                f"`default_sub_network` must be from 0 to {len(self.sub_networks) - 1}, got {self.default_sub_network}."
            )
        check_loss_weights("sub_network_loss_weights", self.sub_network_loss_weights, len(self.sub_networks))
        check_boolean("separate_classifiers", self.separate_classifiers)
        check_label_smoothing(self)

    @classmethod
    def hydravit(cls, heads: Sequence[int] | None = None, **fields: Any) -> "ElasticViTConfig":
        """
        HydraViT (arXiv 2409.17978): as many leading heads, with their channels, as `heads` lists; by default every
        number from a quarter of the heads to all.
        """
        full = _full_size("hydravit", fields)
        if heads is None:
            heads = range(max(1, full.num_attention_heads // 4), full.num_attention_heads + 1)
        networks = [
            {
                "num_attention_heads": h,
                "hidden_size": h * full.head_dim,
                "intermediate_size": _share_of_mlp(full, h, full.num_attention_heads),
            }
            for h in heads
        ]
        return cls(sub_networks=_distinct(networks), **fields)

    @classmethod
    def matformer(cls, **fields: Any) -> "ElasticViTConfig":
        """MatFormer (arXiv 2310.07707): full width and heads; an eighth, a quarter, half and all of the MLP."""
        full = _full_size("matformer", fields)
        sizes = {"num_attention_heads": full.num_attention_heads, "hidden_size": full.hidden_size}
        networks = [{**sizes, "intermediate_size": _share_of_mlp(full, 1, part)} for part in (8, 4, 2, 1)]
        return cls(sub_networks=_distinct(networks), **fields)

    @classmethod
    def dynabert(cls, depths: Sequence[float] = (0.5, 0.75, 1.0), **fields: Any) -> "ElasticViTConfig":
        """
        DynaBERT (arXiv 2004.04037): full width; a quarter, half, three quarters and all of the heads and of the MLP,
        each at the `depths`, by default a half, three quarters and all of the layers. Widths ascend within each depth.
        Where heads or layers are too few for all of these, there are fewer sub-networks: none is there twice. Its first
        phase of training has the widths alone: `depths=[1.0]`.
        """
        full, networks = _full_size("dynabert", fields), []
        depth, all_heads = full.num_hidden_layers, full.num_attention_heads
        for depth_share in depths:
            check_number("depths", depth_share, maximum=1.0)
            if not depth_share:
                raise ValueError(f"`depths` must be above 0, got {list(depths)}.")
            kept = max(1, round(depth_share * depth))
            layers = sorted({min(int(index / depth_share), depth - 1) for index in range(kept)})
            for width_share in (0.25, 0.5, 0.75, 1.0):
                heads = max(1, round(width_share * all_heads))
                networks.append(
                    {
                        "num_attention_heads": heads,
                        "hidden_size": full.hidden_size,
                        "intermediate_size": _share_of_mlp(full, heads, all_heads),
                        "head_dim": full.head_dim,
                        "layers": layers,
                    }
                )
        return cls(sub_networks=_distinct(networks), **fields)

    @classmethod
    def sortednet(cls, widths: Sequence[int] | None = None, **fields: Any) -> "ElasticViTConfig":
        """
        SortedNet (arXiv 2309.00255): leading channels with all heads, which get narrower; by default a quarter, half,
        three quarters and all of the channels.
        """
        full = _full_size("sortednet", fields)
        heads, size = full.num_attention_heads, full.hidden_size
        if widths is None:
            widths = [max(1, full.head_dim * part // 4) * heads for part in (1, 2, 3, 4)]
        networks = [
            {
                "num_attention_heads": heads,
                "hidden_size": width,
                "intermediate_size": _share_of_mlp(full, width, size),
            }
            for width in sorted(widths)
        ]
        return cls(sub_networks=_distinct(networks), **fields)


def _as_dict(network: Any) -> dict[str, Any]:
    """Plain data, as saved: without fields that follow from the others."""
    fields = asdict(network) if isinstance(network, SubNetwork) else dict(network)
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in fields.items() if value is not None
    }


def _full_size(method: str, fields: dict[str, Any]) -> ElasticViTConfig:
    """The whole model with these fields, alone. `ValueError` for those that the preset itself chooses."""
    if "sub_networks" in fields:
        raise ValueError(
            f"`{method}` chooses the `sub_networks`: leave them out, or give them to `ElasticViTConfig` itself."
        )
    chosen = ("default_sub_network", "sub_network_loss_weights")  # they count the sub-networks
    return ElasticViTConfig(**{name: value for name, value in fields.items() if name not in chosen})


def _share_of_mlp(full: ElasticViTConfig, part: int, whole: int) -> int:
    """That part of the MLP's channels, rounded down, and at least one."""
    return max(1, full.intermediate_size * part // whole)


def _distinct(networks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without repetitions, which the rounding of small sizes makes, in the same order."""
    return list({SubNetwork(**fields): fields for fields in networks}.values())


__all__ = ["ElasticViTConfig"]
