"""
Measured results for model cards, as a mapping or as a JSON file of this form. Only `dataset` is required.

    {"dataset": "uoft-cs/cifar10", "split": "test", "selected_on": "validation", "images": 10000, "dtype": "float32",
     "criterion": "topk_entropy",
     "stages": [{"top1": 60.1, "top5": 95.0, "gmacs": 0.013}, ...],
     "sweep": [{"threshold": 0.5, "top1": 70.2, "top5": 97.1, "gmacs": 0.02, "exit_shares": [0.4, 0.6]}, ...],
     "plot": "sweep.png",
     "calibration": {"target": "error", "threshold": 0.5, "epsilon": 0.01, "delta": 0.05, "images": 5000,
                     "split": "validation", "conditions": {"weights": "...", "dtype": "float32", ...}, ...},
     "training": {"epochs": 100, ...}}

`split` is the split of `dataset` that was measured (`"all"` for data without splits), `selected_on` the split by which
the best epoch of the training was chosen, and `dtype` the dtype of the computation. `pruning_keep_rate` or
`halting_epsilon` is that of the model when it was measured, which must still be its own. `calibration` is the result of
[`~hf_thinkingvit.evaluation.Calibration.to_dict`]; without its `conditions` it cannot be verified that it is of this
model. Each of `stages` is for every image answered by that stage, with cumulative GMACs; `threshold` is one number or
one per exit; `plot` is the path of a picture, relative to the file's folder. Top-1 and top-5 are percentages, exit
shares fractions. A segmentation model has `mean_iou` and `overall_accuracy` instead, fractions as in `evaluate`, with
GMACs per image (all of its windows) as `gmacs` and per window as `gmacs_per_window`. A model without stages has `top1`,
`top5`, `mean_depth` and `macs` (mean per image) at the top level instead of `stages` and `sweep`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..evaluation.accuracy import main_measure
from ..evaluation.conditions import token_fields
from ..evaluation.macs import stage_macs
from ..evaluation.statements import exits_early
from ..models.configuration_checks import check_integer, check_number
from ..models.configuration_staged import thinks_in_stages
from ..models.staged_arguments import resolve_thresholds
from ..public_names import public_name, public_text


# What is measured of answers, and its greatest value: percentages of a classifier, shares of a segmentation model.
MEASURES = {"top1": 100.0, "top5": 100.0, "mean_iou": 1.0, "mean_accuracy": 1.0, "overall_accuracy": 1.0}
PLOT_SUFFIXES = (".png", ".svg", ".jpg", ".jpeg", ".webp")


def accuracy_results(model: PreTrainedModel, measured: Mapping[str, Any], dataset: str, **facts: Any) -> dict[str, Any]:
    """
    One model's entry of [`~hf_thinkingvit.evaluation.evaluate_accuracy`], or of `evaluate_segmentation`, in the form of
    a results file.

    Args:
        model (`PreTrainedModel`): the model that was measured.
        measured (`dict`): its entry.
        dataset (`str`): the data it was measured on; a path is reduced to its name.
        facts: further fields, such as `split`, `selected_on` and `training`; those that are `None` are left out.
    """
    results = {"dataset": public_name(dataset), "images": measured["images"], **token_fields(model.config.to_dict())}
    names = [name for name in MEASURES if measured.get(name) is not None]
    if not thinks_in_stages(model):
        results |= {name: main_measure(measured, name) for name in names}
        results |= {name: measured[name] for name in ("mean_depth", "macs") if name in measured}
    else:
        spent = accumulate(stage_macs(model.config))
        results["stages"] = [
            {**{name: measured[name][stage] for name in names}, "gmacs": macs / 1e9} for stage, macs in enumerate(spent)
        ]
    return results | {name: value for name, value in facts.items() if value is not None}


def read_results(results: Mapping[str, Any] | str | os.PathLike, config: PreTrainedConfig) -> dict[str, Any]:
    """
    Results of a model, checked.

    Args:
        results (`dict` or path): the mapping, or the JSON file that holds it.
        config (`PreTrainedConfig`): configuration of the model that was measured.

    Returns:
        `dict`, in which `plot` is a path from the working directory, and paths in all other texts are reduced to their
        names.

    Raises:
        ValueError: if the file cannot be read, a value is invalid, or the results are of another model; the message
            names the field.
    """
    folder = Path()
    if not isinstance(results, Mapping):
        folder = Path(results).parent
        results = _read_json(Path(results))
    check_results(results, config)
    results = without_paths(results)
    if results.get("plot") is not None:
        plot = folder / results["plot"]
        if plot.suffix.lower() not in PLOT_SUFFIXES or not plot.is_file():
            raise ValueError(f"`plot` must name a picture ({', '.join(PLOT_SUFFIXES)}); there is none at {plot}.")
        results["plot"] = str(plot)
    return results


def without_paths(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Results or a calibration for sharing: with names instead of paths, in every text except that of `plot`."""
    return {name: value if name == "plot" else _without_paths(value, name) for name, value in facts.items()}


def _without_paths(value: Any, name: str | None = None) -> Any:
    if isinstance(value, (str, os.PathLike)) and (name == "dataset" or not isinstance(value, str)):
        return public_name(value)
    if isinstance(value, str):
        return public_text(value)
    if isinstance(value, Mapping):
        return {key: _without_paths(entry, key) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(entry) for entry in value]
    return value


def published_calibration(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """
    A calibration for publishing: only its facts, without the `statement` that earlier versions saved with them. A
    statement in a file could be read beside a model for which it is not true; the card states it where it is true.
    """
    facts = {name: value for name, value in without_paths(calibration).items() if name != "statement"}
    if not exits_early(calibration):  # earlier versions saved this in the statement only
        facts["exits_early"] = False
    return facts


def _read_json(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: not JSON, or not UTF-8
        raise ValueError(f"Cannot read the results file {path}: {error}. It must be a JSON object.") from error
    if not isinstance(results, dict):
        raise ValueError(f"The results file {path} must hold a JSON object, got a {type(results).__name__}.")
    return results


def check_results(results: Mapping[str, Any], config: PreTrainedConfig) -> None:
    """Raise `ValueError` for invalid results, and for those of another model than `config` describes."""
    if not isinstance(results.get("dataset"), str) or not results["dataset"]:
        raise ValueError(f"`dataset` must name what the results were measured on, got {results.get('dataset')!r}.")
    for name in ("split", "selected_on", "dtype", "prepared"):
        if results.get(name) is not None and not isinstance(results[name], str):
            raise ValueError(f"`{name}` of the results must be a text, got {results[name]!r}.")
    if results.get("images") is not None:
        check_integer("images", results["images"], minimum=1)
    for name, kind in (
        ("stages", Sequence),
        ("sweep", Sequence),
        ("calibration", Mapping),
        ("training", Mapping),
        ("preprocessing", Mapping),
    ):
        if results.get(name) is not None and (not isinstance(results[name], kind) or isinstance(results[name], str)):
            raise ValueError(f"`{name}` of the results must be a {kind.__name__.lower()}, got {results[name]!r}.")
    _check_figures("results", results)
    _check_token_fields(results, config)
    count = config.num_stages if thinks_in_stages(config) else None
    calibrated = (results.get("calibration") or {}).get("threshold")
    if calibrated is not None and count is not None:
        _check_threshold("calibration", calibrated, count)
    stages, sweep = results.get("stages") or [], results.get("sweep") or []
    if count is None:
        if stages or sweep:
            raise ValueError(
                f"The results are of a model that thinks in stages, which `{config.model_type}` does not: give `top1`, "
                "`top5`, `mean_depth` and `macs` instead of `stages` and `sweep`."
            )
        return
    if stages and len(stages) != count:
        raise ValueError(
            f"The results are of {len(stages)} stages, but the model has {count}: they are of another one."
        )
    if results.get("criterion", config.exit_criterion) != config.exit_criterion:
        raise ValueError(
            f"The results were measured with the criterion {results['criterion']!r}, but the model's `exit_criterion` "
            f"is {config.exit_criterion!r}: their thresholds are on another scale. Set the model's, or measure again."
        )
    for index, row in enumerate(stages):
        _check_figures(f"stages[{index}]", row, needs=_needed(config))
    for index, row in enumerate(sweep):
        where = f"sweep[{index}]"
        _check_figures(where, row, needs=_needed(config))
        _check_threshold(where, row.get("threshold"), count)
        shares = row.get("exit_shares")
        if shares is None:
            continue
        if not isinstance(shares, Sequence) or len(shares) != count:
            raise ValueError(f"`{where}.exit_shares` must have {count} entries, one per stage, got {shares!r}.")
        for share in shares:
            check_number(f"{where}.exit_shares", share, maximum=1.0)
        if abs(sum(shares) - 1) > 0.01:  # shares may be rounded
            raise ValueError(f"`{where}.exit_shares` must sum to 1, got {shares!r}.")


def _check_token_fields(results: Mapping[str, Any], config: PreTrainedConfig) -> None:
    now = token_fields(config.to_dict())
    for name, then in token_fields(results).items():
        if _plain(then) != _plain(now.get(name)):
            raise ValueError(
                f"The results were measured with `{name}` = {then}, but the model's is {now.get(name)}: it answers "
                "otherwise, and at another cost. Set the model's, or measure again."
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _needed(config: PreTrainedConfig) -> str:
    """The measure without which a row says nothing."""
    return "top1" if getattr(config, "decoder_type", None) is None else "mean_iou"


def _check_threshold(where: str, threshold: Any, count: int) -> None:
    try:
        resolve_thresholds(threshold, count - 1)
    except ValueError as error:
        raise ValueError(f"`{where}` of the results: {error}") from None


def _check_figures(where: str, row: Mapping[str, Any], needs: str | None = None) -> None:
    if not isinstance(row, Mapping) or (needs is not None and row.get(needs) is None):
        raise ValueError(f"`{where}` of the results must be a mapping with `{needs}`, got {row!r}.")
    for name, maximum in MEASURES.items():
        if row.get(name) is not None:
            check_number(f"{where}.{name}", row[name], maximum=maximum)
    for name in ("gmacs", "gmacs_per_window", "macs", "mean_depth"):
        if row.get(name) is not None:
            check_number(f"{where}.{name}", row[name])
