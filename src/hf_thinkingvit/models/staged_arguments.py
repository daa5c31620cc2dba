"""
Arguments of calls of models that think in stages, as plain numbers: τ of each exit, and which stages run. Imports no
torch, since exported models run without it.
"""

from collections.abc import Sequence

from .configuration_checks import as_plain_numbers, check_number


def resolve_thresholds(threshold: float | Sequence[float], num_exits: int) -> tuple[float, ...]:
    """
    One τ per exit, as Python numbers, from one number or from `num_exits` of them (every stage but the last is an
    exit): Python's or NumPy's numbers, lists, NumPy arrays or tensors.

    Raises:
        ValueError: if a τ is negative, NaN or not a number, or if the list has the wrong length.
    """
    threshold = as_plain_numbers(threshold)
    if isinstance(threshold, Sequence) and not isinstance(threshold, str):
        if len(threshold) != num_exits:
            raise ValueError(
                f"`threshold` must be one number or a list of {num_exits}, one per exit (every stage but the last), "
                f"got {len(threshold)} values: {list(threshold)}."
            )
        thresholds = tuple(threshold)
    else:
        check_number("threshold", threshold)
        thresholds = (threshold,) * num_exits
    for value in thresholds:
        check_number("threshold", value)
    return thresholds


def resolve_stages(
    num_stages: int,
    max_stages: int | None = None,
    sub_network: int | None = None,
    threshold: float | Sequence[float] | None = None,
) -> range:
    """
    Which of `num_stages` stages run: all, the first `max_stages`, or the sub-network of one stage alone.

    Raises:
        ValueError: unless `max_stages` is an integer from 1 to `num_stages`, or `sub_network` one from 0 to
            `num_stages` - 1; if `sub_network` is given with `max_stages` or `threshold`.
    """
    if sub_network is not None:
        if max_stages is not None or threshold is not None:
            raise ValueError(
                "`sub_network` runs one sub-network alone, without exits: it cannot be combined with `max_stages` or "
                "`threshold`."
            )
        if isinstance(sub_network, bool) or not isinstance(sub_network, int) or not 0 <= sub_network < num_stages:
            raise ValueError(
                f"`sub_network` must be an integer from 0 to {num_stages - 1}, a stage of this model, got "
                f"{sub_network!r}."
            )
        return range(sub_network, sub_network + 1)
    if max_stages is None:
        return range(num_stages)
    if isinstance(max_stages, bool) or not isinstance(max_stages, int) or not 1 <= max_stages <= num_stages:
        raise ValueError(
            f"`max_stages` must be an integer from 1 to {num_stages}, the number of stages of this model, "
            f"got {max_stages!r}."
        )
    return range(max_stages)


def resolve_feature_stages(config, max_stages: int | None = None, sub_network: int | None = None) -> range:
    """The same for a bare model, which by default runs the stages up to that whose features are read."""
    if max_stages is None and sub_network is None:
        max_stages = config.feature_stage + 1
    return resolve_stages(config.num_stages, max_stages, sub_network)


__all__ = ["resolve_feature_stages", "resolve_stages", "resolve_thresholds"]
