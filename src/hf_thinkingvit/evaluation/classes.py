"""Tables by class: which classes gain or lose from further stages, or against another model, and how deep they go."""

from collections.abc import Sequence
from typing import Any

import torch

from .image_answers import ImageAnswers
from .segmentation import StageConfusions, segmentation_measures
from .stages import Threshold


def class_table(
    answers: ImageAnswers, threshold: Threshold | None = None, baseline: ImageAnswers | None = None
) -> list[dict[str, Any]]:
    """
    One row for each class that has images.

    Args:
        answers (`ImageAnswers`): of the model.
        threshold (`float` or `list[float]`, *optional*): τ, needed if the model thinks in stages.
        baseline (`ImageAnswers`, *optional*): of another model to the same images; its last answer counts.

    Returns:
        Rows of `class`, `images`, `top1` (% right of the accepted answers); where there are several answers `top1_0`
        and so on, of each for all images, and `leaves_0`, the share whose first answer is accepted; `entropy`, the mean
        of the first answers; of an A-ViT `depth`, the mean layers of a token; with `baseline`, its `baseline_top1`; and
        `gain` in percentage points: of `top1` over the baseline's, or without one of the last answer over the first.

    Raises:
        ValueError: if `baseline` is of other images.
    """
    if baseline is not None and not torch.equal(answers.labels, baseline.labels):
        raise ValueError("`baseline` must be of the same images, in the same order.")
    accepted = answers.accepted(threshold)
    right = answers.right.gather(1, accepted[:, None])[:, 0]
    rows = []
    for label in answers.labels.unique().tolist():
        mask = answers.labels == label
        row: dict[str, Any] = {"class": answers.label_names[label], "images": int(mask.sum())}
        row["top1"] = _percent(right[mask])
        if answers.num_answers > 1:
            each = [_percent(answers.right[mask, answer]) for answer in range(answers.num_answers)]
            row |= {f"top1_{answer}": value for answer, value in enumerate(each)}
            row["leaves_0"] = (accepted[mask] == 0).double().mean().item()
            row["gain"] = each[-1] - each[0]
        row["entropy"] = answers.entropies[mask, 0].double().mean().item()
        if answers.depths is not None:
            row["depth"] = answers.depths[mask].double().mean().item()
        if baseline is not None:
            row["baseline_top1"] = _percent(baseline.right[mask, -1])
            row["gain"] = row["top1"] - row["baseline_top1"]
        rows.append(row)
    return rows


def segmentation_class_table(
    confusions: StageConfusions, class_names: Sequence[str], threshold: Threshold
) -> list[dict[str, Any]]:
    """
    The same of a segmentation model, for each class that has pixels: `class`, `pixels`, `iou` (%) of what is accepted
    under τ, `iou_0` and so on of each stage for all windows, and `gain` of the last over the first.
    """
    windows = torch.arange(len(confusions.scores))
    exits = confusions.exit_stages(threshold)
    accepted = segmentation_measures(confusions.sum_at(windows, exits))["per_category_iou"]
    stages = [
        segmentation_measures(confusions.sum_at(windows, torch.full_like(exits, stage)))["per_category_iou"]
        for stage in range(confusions.num_stages)
    ]
    pixels = confusions.sum_at(windows, exits).sum(dim=1).tolist()
    rows = []
    for index, count in enumerate(pixels):
        if not count:
            continue
        each = [100 * stage[index] for stage in stages]
        row = {"class": class_names[index], "pixels": count, "iou": 100 * accepted[index]}
        row |= {f"iou_{stage}": value for stage, value in enumerate(each)}
        rows.append({**row, "gain": each[-1] - each[0]} if len(each) > 1 else row)
    return rows


def entropy_histogram(
    entropies: torch.Tensor, right: torch.Tensor | None = None, bins: int = 40
) -> list[dict[str, Any]]:
    """
    How many answers have which entropy.

    Args:
        entropies (`torch.FloatTensor` of shape `(images, answers)`): in nats; those that are not finite are left out.
        right (`torch.BoolTensor` of shape `(images, answers)`, *optional*): which are right.
        bins (`int`): of equal width, from 0 to the greatest entropy, the same for every answer.

    Returns:
        Rows of `answer`, `low` and `high` (the last bin includes it), and counts: `right` and `wrong`, or `count`.
    """
    finite = entropies.isfinite()
    greatest = float(entropies[finite].max()) if finite.any() else 0.0
    greatest = greatest if greatest > 0 else 1.0
    edges = torch.linspace(0, greatest, bins + 1, dtype=torch.float64).tolist()
    rows = []
    for answer in range(entropies.shape[1]):
        place = (entropies[:, answer].double() / greatest * bins).nan_to_num(0).long().clamp(0, bins - 1)
        groups = {"count": finite[:, answer]}
        if right is not None:
            groups = {
                "right": finite[:, answer] & right[:, answer],
                "wrong": finite[:, answer] & ~right[:, answer],
            }
        counts = {name: place[mask].bincount(minlength=bins).tolist() for name, mask in groups.items()}
        rows += [
            {"answer": answer, "low": edges[index], "high": edges[index + 1]}
            | {name: values[index] for name, values in counts.items()}
            for index in range(bins)
        ]
    return rows


def _percent(right: torch.Tensor) -> float:
    return 100 * right.double().mean().item()
