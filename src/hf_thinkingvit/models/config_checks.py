"""Checks that configurations share: each names the field, what was given and what was expected."""

import math
from collections.abc import Sequence


def check_integer(name: str, value, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {value!r}.")


def check_number(name: str, value, minimum: float = 0.0, maximum: float = math.inf) -> None:
    """Refuse what is no number in [`minimum`, `maximum`]: NaN always, infinity only where `maximum` is finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not minimum <= value <= maximum:
        limits = f"of at least {minimum:g}" if maximum == math.inf else f"between {minimum:g} and {maximum:g}"
        raise ValueError(f"`{name}` must be a number {limits}, got {value!r}.")


def check_size(name: str, value) -> None:
    """An image or patch size: one positive integer, or (height, width)."""
    sides = value if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(sides) != 2:
        raise ValueError(f"`{name}` must be an integer or a pair (height, width), got {value!r}.")
    for side in sides:
        check_integer(name, side, minimum=1)


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size given as one integer or as a pair."""
    return (size, size) if isinstance(size, int) else tuple(size)
