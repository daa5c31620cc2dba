"""What may be set in `config.json` of an exported folder, read without the configuration's class, which needs torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..models.configuration_labels import complete_labels
from ..models.staged_arguments import resolve_thresholds
from .manifest import check_has_threshold, check_unchanged, read_fields


@dataclass(frozen=True)
class Settings:
    """
    Attributes:
        threshold (`tuple[float, ...]`): τ of each stage but the last.
        id2label (`dict[int, str]`): the classes.
        is_regression (`bool`): whether outputs are values, and no scores of classes.
    """

    threshold: tuple[float, ...]
    id2label: dict[int, str]
    is_regression: bool

    def thresholds(self, threshold: Any, count: int) -> np.ndarray:
        """
        τ of each image and exit, float32 `(count, exits)`.

        Args:
            threshold: `None` for that of the folder, or one number, or one for each exit, or an array `(count, exits)`.

        Raises:
            ValueError: if it is none of these, a τ is negative or NaN, or above 0 for a regression.
        """
        num_exits = len(self.threshold)
        if threshold is None:
            rows = [self.threshold]
        elif getattr(threshold, "ndim", 0) == 2:
            if tuple(threshold.shape) != (count, num_exits):
                raise ValueError(
                    f"`threshold` with two dimensions is of each image and exit, here ({count}, {num_exits}), got "
                    f"{tuple(threshold.shape)}."
                )
            rows = [resolve_thresholds(row, num_exits) for row in threshold]
        else:
            rows = [resolve_thresholds(threshold, num_exits)]
        if self.is_regression and any(map(any, rows)):
            raise ValueError(
                f"Regression has no criterion of certainty for early exits, got `threshold` = {threshold!r}: leave it "
                "out, or give 0, at which no image exits early, and choose the compute of a call by `max_stages`."
            )
        with np.errstate(over="ignore"):  # infinity is as good
            return np.broadcast_to(np.asarray(rows, np.float32).reshape(len(rows), num_exits), (count, num_exits))


def read_settings(folder: Path, manifest: Mapping[str, Any]) -> Settings:
    """
    Raises:
        ValueError: if `config.json` is damaged, its τ or labels are invalid, or it differs from the programs in a field
            that is fixed in them.
    """
    fields, fixed = read_fields(folder), {**manifest["fixed"], **manifest["judged"]}
    labels = {name: fields.get(name) for name in ("id2label", "label2id", "num_labels")}
    if labels["id2label"] is None and labels["num_labels"] is None:  # Transformers leaves out its default, two
        labels["num_labels"] = 2
    id2label = complete_labels({**labels, "label2id": None})["id2label"]
    check_unchanged(
        {**fields, "num_labels": len(id2label)},
        fixed,
        "Without torch, only τ and labels may be changed: undo it, or change the PyTorch model and export it. (An edit "
        f"of {', '.join(f'`{name}`' for name in manifest['judged'])} is what `from_exported`, with torch, follows.)",
    )
    check_has_threshold(fields, folder)
    settings = Settings(
        resolve_thresholds(fields["threshold"], len(manifest["stages"]) - 1), id2label, _is_regression(fixed)
    )
    settings.thresholds(None, 1)
    return settings


def _is_regression(fixed: Mapping[str, Any]) -> bool:
    """As `configured_problem_type`."""
    return fixed["problem_type"] == "regression" or (fixed["problem_type"] is None and fixed["num_labels"] == 1)
