"""Sizes of images of which only the sides are given, as segmentation resizes them everywhere."""

from collections.abc import Sequence

from transformers import PreTrainedConfig


def fitted_size(
    size: Sequence[int], short_side: int | None, long_side: int | None = None, ratio: float = 1.0
) -> tuple[int, int]:
    """
    (height, width) of an image of `size`, resized in proportion so that the shorter side has `short_side` pixels, or
    fewer where the longer one would exceed `long_side`; then times `ratio`. Without `short_side`, `size` times `ratio`.
    """
    scale = 1.0 if short_side is None else short_side / min(size)
    if short_side is not None and long_side is not None:
        scale = min(scale, long_side / max(size))
    return tuple(max(round(side * scale * ratio), 1) for side in size)


def recorded_sides(config: PreTrainedConfig) -> tuple[int | None, int | None]:
    """
    `short_side` and `long_side` with which a model was calibrated; else those with which it was trained; else none,
    which leaves images as they are.
    """
    calibration, trained = (getattr(config, name, None) or {} for name in ("calibration", "training_data"))
    conditions = calibration.get("conditions") or {}
    found = conditions.get("preprocessing") or trained.get("preprocessing") or {}
    return found.get("short_side"), found.get("long_side")
