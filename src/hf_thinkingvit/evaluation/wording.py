"""Formats probabilities, rounded so that they never promise more than was found, and thresholds."""

from collections.abc import Sequence
from decimal import ROUND_CEILING, Decimal, localcontext


DIGITS = 3  # significant digits, of the share or of its distance to 1, whichever is smaller


def at_least(delta: float) -> str:
    """
    The probability 1 - δ in percent, rounded down: `"99.6%"` for 0.004. Never `"100%"`.

    Args:
        delta (`float`): above 0 and below 1, taken as Python prints it.
    """
    with localcontext() as context:
        context.prec = 1100  # represents every float between 0 and 1, and its distance to 1, exactly
        return _percent(1 - _rounded_up(delta))


def at_most(epsilon: float) -> str:
    """The share ε in percent, rounded up: `"0.004%"` for 0.00004. Never `"0%"` or `"100%"`."""
    with localcontext() as context:
        context.prec = 1100
        return _percent(_rounded_up(epsilon))


def _rounded_up(share: float) -> Decimal:
    if not 0 < share < 1:
        raise ValueError(f"A share must be above 0 and below 1, got {share!r}.")
    value = Decimal(repr(float(share)))
    leading = min(value.adjusted(), (1 - value).adjusted())
    return value.quantize(Decimal(1).scaleb(leading - DIGITS + 1), rounding=ROUND_CEILING)


def _percent(share: Decimal) -> str:
    text = f"{share.scaleb(2):f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + "%"


def distinct_labels(thresholds: Sequence[float | Sequence[float]], digits: int = 4) -> list[str]:
    """
    Values of τ, each one or one per exit, with as few significant digits as tell different values apart, all with the
    same number of them.

    Args:
        thresholds (`list`): the values.
        digits (`int`): the least number of digits.
    """
    listed = [tuple(each) if isinstance(each, Sequence) else (each,) for each in thresholds]
    for precision in range(digits, 18):  # 17 digits tell all floats apart
        labels = [", ".join(f"{number:.{precision}g}" for number in each) for each in listed]
        if len(set(labels)) == len(set(listed)):
            return labels
    return labels
