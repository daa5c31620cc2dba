"""Token pruning (DynamicViT, arXiv 2106.02034) in a configuration: where tokens are removed, and how many remain."""

from collections.abc import Sequence
from itertools import pairwise

from .configuration_checks import as_plain_numbers, check_integer, check_number
from .sub_networks import SubNetwork


DEFAULT_KEEP_RATE = 0.7  # of the models that DynamicViT's authors released


def resolve_keep_rates(
    keep_rate: float | Sequence[float], num_layers: int, name: str = "keep_rate"
) -> tuple[float, ...]:
    """
    The share of the image's patches that remain from each pruning layer on.

    Args:
        keep_rate (`float` or `list[float]`): one number ρ stands for ρ, ρ², ρ³ and so on; a list gives each share.
        num_layers (`int`): pruning layers.
        name (`str`): of the argument or field, for errors.

    Raises:
        ValueError: for a share that is not above 0 and at most 1; for a list of another length, or one that increases.
    """
    given = as_plain_numbers(keep_rate)
    if isinstance(given, Sequence) and not isinstance(given, str):
        rates = tuple(given)
        if len(rates) != num_layers:
            raise ValueError(
                f"`{name}` must be one number or a list of {num_layers}, one per pruning layer, got {len(rates)} "
                f"values: {list(rates)}."
            )
    else:
        check_number(name, given, maximum=1.0)
        rates = tuple(given ** (index + 1) for index in range(num_layers))
    for rate in rates:
        check_number(name, rate, maximum=1.0)
        if rate == 0:
            raise ValueError(f"`{name}` must be above 0, so that tokens remain, got {keep_rate!r}.")
    if any(later > rate for rate, later in pairwise(rates)):
        raise ValueError(
            f"`{name}` gives the share of all patches that remain from each pruning layer on, which cannot increase, "
            f"got {list(rates)}. One number is raised to the power of 1, 2 and so on."
        )
    return rates


def kept_counts(rates: Sequence[float], num_patches: int) -> list[int]:
    """Patches that remain from each pruning layer on, of `num_patches`: rounded down, but at least one."""
    return [max(1, int(num_patches * rate)) for rate in rates]


def check_pruning_fields(config, last_stage: SubNetwork) -> None:
    """`ValueError` for fields of pruning that do not fit the model or each other."""
    layers = config.pruning_layers
    check_number("pruning_ratio_loss_weight", config.pruning_ratio_loss_weight)
    if not layers:
        if config.pruning_keep_rate is not None:
            raise ValueError(
                f"`pruning_keep_rate` ({config.pruning_keep_rate}) has no effect without `pruning_layers`: set both, "
                "or neither."
            )
        return
    if not isinstance(layers, (list, tuple)):
        raise ValueError(f"`pruning_layers` must be a list of layer numbers, got {layers!r}.")
    for layer in layers:
        check_integer("pruning_layers", layer, minimum=0)
    if list(layers) != sorted(set(layers)) or layers[-1] >= config.num_hidden_layers:
        raise ValueError(
            f"`pruning_layers` must be a strictly increasing list of layers from 0 to {config.num_hidden_layers - 1}, "
            f"got {list(layers)}."
        )
    if config.pruning_keep_rate is None:
        raise ValueError("`pruning_layers` needs a `pruning_keep_rate`.")
    resolve_keep_rates(config.pruning_keep_rate, len(layers), "pruning_keep_rate")
    if last_stage.hidden_size % 4:
        raise ValueError(
            f"`pruning_layers` needs a last stage whose width is a multiple of 4, which the score predictors halve "
            f"twice, got {last_stage.hidden_size}."
        )


__all__ = ["DEFAULT_KEEP_RATE", "check_pruning_fields", "kept_counts", "resolve_keep_rates"]
