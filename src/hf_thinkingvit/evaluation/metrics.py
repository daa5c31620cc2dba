"""Metrics for the `evaluate` library that need no download; for `Trainer`, `evaluator` and `evaluate.combine`."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np


_FEATURES = {
    "predictions": datasets.Sequence(datasets.Value("float32")),
    "references": datasets.Value("int64"),
}


def _hits(predictions: Sequence[Sequence[float]], references: Sequence[int], top_k: int) -> np.ndarray:
    """Whether each of an image's best classes is right: bool `(images, top_k)`."""
    scores = np.asarray(predictions, dtype=np.float32)
    if scores.ndim != 2 or not len(scores):
        raise ValueError(f"`predictions` must be one list of scores per image, got the shape {scores.shape}.")
    if top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    return best == np.asarray(references)[:, None]


class TopKAccuracy(evaluate.Metric):
    r"""
    Top-1 and top-k accuracy.

    Args, of `compute`:
        predictions (`list[list[float]]`): scores of each image's classes.
        references (`list[int]`): right classes.
        top_k (`int`, *optional*, defaults to 5): number of best classes that count; at most all.

    Returns:
        `top1` and `top{k}`, fractions.

    Raises:
        ValueError: if there are no images, or `top_k` is below 1.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__, citation="", inputs_description="", features=datasets.Features(_FEATURES)
        )

    def _compute(self, predictions, references, top_k: int = 5) -> dict[str, float]:
        hits = _hits(predictions, references, top_k)
        return {"top1": float(hits[:, 0].mean()), f"top{top_k}": float(hits.any(axis=1).mean())}


class AdaptiveAccuracy(TopKAccuracy):
    r"""
    Accuracy of a model whose images exit at different stages, with share and accuracy of each exit, and mean cost.

    Args, of `compute`:
        predictions, references, top_k: as in `TopKAccuracy`; the scores of each image's accepted stage.
        exit_stages (`list[int]`): stage at which each image exited, from 0.
        stage_macs (`list[int]`, *optional*): multiply-accumulates that each stage adds, as from
            [`~hf_thinkingvit.evaluation.stage_macs`].

    Returns:
        The accuracies; `exit_shares` and `exit_top1` with one entry per stage (`None` if no image exited there); and
        with `stage_macs` the mean `gmacs` per image.

    Raises:
        ValueError: as in `TopKAccuracy`, or if an exit is not one of the stages.

    Example:

    ```python
    >>> metric = AdaptiveAccuracy()
    >>> metric.add_batch(predictions=outputs.logits, references=labels, exit_stages=outputs.exit_stage)
    >>> metric.compute(stage_macs=stage_macs(model.config))
    ```"""

    def _info(self) -> evaluate.MetricInfo:
        info = super()._info()
        info.features = datasets.Features({**_FEATURES, "exit_stages": datasets.Value("int64")})
        return info

    def _compute(
        self, predictions, references, exit_stages, top_k: int = 5, stage_macs: Sequence[int] | None = None
    ) -> dict:
        results = super()._compute(predictions, references, top_k)
        right, exit_stages = _hits(predictions, references, 1)[:, 0], np.asarray(exit_stages)
        num_stages = int(exit_stages.max()) + 1 if stage_macs is None else len(stage_macs)
        if exit_stages.min() < 0 or exit_stages.max() >= num_stages:
            raise ValueError(f"`exit_stages` must lie between 0 and {num_stages - 1}, got {np.unique(exit_stages)}.")
        took = [exit_stages == stage for stage in range(num_stages)]
        results["exit_shares"] = [float(mask.mean()) for mask in took]
        results["exit_top1"] = [float(right[mask].mean()) if mask.any() else None for mask in took]
        if stage_macs is not None:
            results["gmacs"] = float(np.cumsum(stage_macs)[exit_stages].mean() / 1e9)
        return results
