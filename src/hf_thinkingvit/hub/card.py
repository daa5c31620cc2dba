"""Model cards from a configuration and measured results, so that a card cannot disagree with the run."""

import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel

from ..evaluation.conditions import calibration_status
from ..evaluation.macs import stage_macs
from ..evaluation.splits import ALL, UNKNOWN, may_share_images, same_data, why_not_new
from ..evaluation.statements import calibration_statement
from ..evaluation.wording import distinct_labels
from ..families import FAMILIES, family_of, task_of
from ..models.configuration_checks import as_pair
from ..models.configuration_staged import thinks_in_stages
from ..models.exit_criteria import EXIT_CRITERIA
from ..models.staged_arguments import resolve_thresholds
from ..public_names import public_name
from .results import read_results
from .task_texts import TASK_TEXTS


SWEEP_ROWS = 12  # more would hide the table's message; the results file has every row

METRICS = {
    "top1": ("accuracy", "top-1 accuracy"),
    "top5": ("top_5_accuracy", "top-5 accuracy"),
    "mean_iou": ("mean_iou", "mean IoU"),
    "overall_accuracy": ("accuracy", "pixel accuracy"),
}
ROUNDED = {"mean_iou": 4, "overall_accuracy": 4}  # fractions; others are percentages, with 2 digits
COLUMNS = {
    "mean_iou": ("mean IoU (%)", "{:.2f}"),
    "overall_accuracy": ("pixel accuracy (%)", "{:.2f}"),
    "top1": ("top-1 (%)", "{:.2f}"),
    "top5": ("top-5 (%)", "{:.2f}"),
    "mean_depth": ("mean depth in layers", "{:.2f}"),
    "gmacs": ("GMACs", "{:.4g}"),
    "gmacs_per_window": ("GMACs per window", "{:.4g}"),
}
CALIBRATION_FACTS = {
    "target": "target",
    "threshold": "τ",
    "risk": "risk",
    "budget": "budget",
    "epsilon": "ε, the greatest risk asked for",
    "delta": "δ, the probability with which the promise may fail",
    "dataset": "calibrated on",
    "split": "split",
    "images": "images",
    "prepared": "read",
    "dtype": "measured in",
    "achieved": "achieved on them",
    "top1": "top-1 (%) on them at this τ",
    "mean_iou": "mean IoU on them at this τ",
    "gmacs": "GMACs per image on them at this τ",
}
MEASURED = ("achieved", "top1", "mean_iou", "gmacs")  # others are unrounded


def model_card(
    model: PreTrainedModel,
    results: Mapping[str, Any] | str | os.PathLike | None = None,
    *,
    name: str,
    source: str = "path/to/this/folder",
    license: str | None = None,
    datasets: str | Sequence[str] | None = None,
    **card_data: Any,
) -> ModelCard:
    """
    A card for a trained classifier or segmentation model. Every measured number comes from `results`; sections without
    numbers are left out. A calibration, of `results` or of the configuration, is repeated only while it applies to the
    model as it is. Else the card says what has changed since ([`~hf_thinkingvit.evaluation.calibration_status`]).

    Args:
        model (`PreTrainedModel`): the model that the card describes.
        results (`dict` or path, *optional*): measured results, or the JSON file that holds them, in the form that
            `hf_thinkingvit.hub.results` describes.
        name (`str`): name of the model.
        source (`str`): what a user loads it from: a folder, or the id of its repository.
        license (`str`, *optional*): license of the weights, as the Hub writes it, such as `"apache-2.0"`.
        datasets (`str` or `list[str]`, *optional*): Hub ids of the training data; for local data, their names.
        card_data: further metadata of `ModelCardData`, such as `base_model`.

    Returns:
        `ModelCard`, to be saved as `README.md`.

    Raises:
        ValueError: if the model is not of this package, or the results are of another model or not in that form.
    """
    config, task = model.config, TASK_TEXTS[task_of(model)]
    results = _with_selection(config, {} if results is None else read_results(results, config))
    figures = _eval_results(config, results, task.name)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task.name,
        license=license,
        datasets=[public_name(each) for each in ([datasets] if isinstance(datasets, str) else datasets or [])] or None,
        tags=["vision", "adaptive-inference", config.model_type],
        # `model_name` belongs to the model index, which must not be written without figures.
        **({"model_name": name, "eval_results": figures} if figures else {}),
        **card_data,
    )
    template = files("hf_thinkingvit").joinpath("templates", "model_card.md").read_text(encoding="utf-8")
    return ModelCard.from_template(
        data,
        template_str=f"{template}\n",  # Jinja takes one newline from the end
        **_description(model),
        **_measurements(config, results),
        **_calibration(model, results),
        task=task,
        name=name,
        source=source,
    )


def _with_selection(config: PreTrainedConfig, results: Mapping[str, Any]) -> dict[str, Any]:
    """Results completed with the split by which the best epoch was chosen, if the configuration records it."""
    recorded = getattr(config, "training_data", None) or {}
    results = dict(results)
    if results.get("selected_on") is None and recorded and same_data(recorded.get("dataset"), results.get("dataset")):
        results["selected_on"] = recorded.get("selected_on")
    return results


def _seen(config: PreTrainedConfig, results: Mapping[str, Any], calibration: Mapping[str, Any]) -> str | None:
    """Why the calibration images were not new to the model, according to calibration, configuration or results."""
    dataset, split = calibration.get("dataset"), calibration.get("split") or UNKNOWN
    seen = calibration.get("seen") or why_not_new(getattr(config, "training_data", None), dataset, split)
    if seen is None and split == results.get("selected_on") and same_data(results.get("dataset"), dataset):
        return f"the best epoch of the model was chosen by split {split!r} of `{public_name(dataset)}`"
    return seen


def _shares_images(results: Mapping[str, Any], calibration: Mapping[str, Any]) -> bool:
    """Whether τ may have been chosen on images of which the results are, so that these are optimistic at this τ."""
    splits = [facts.get("split") or UNKNOWN for facts in (results, calibration)]
    return same_data(results.get("dataset"), calibration.get("dataset")) and may_share_images(*splits)


def _description(model: PreTrainedModel) -> dict[str, Any]:
    """Fields of the template that follow from the configuration and the family."""
    config, family = model.config, family_of(model)
    papers = list(dict.fromkeys(each.paper for each in FAMILIES.values()))
    description = {
        "family": family.card,
        "papers": papers,
        "paper_titles": ", ".join(paper.title for paper in papers[:-1]) + f" and {papers[-1].title}",
        "config": config,
        "image_size": " × ".join(str(side) for side in as_pair(config.image_size)),
        "patch_size": " × ".join(str(side) for side in as_pair(config.patch_size)),
        "parameters": f"{model.num_parameters() / 1e6:.2f} M",
        "tokens": family.card.tokens(config),
    }
    if not thinks_in_stages(config):
        field, rule = family.card.override, family.card.rule
        return description | {
            "override": f"{field}={getattr(config, field)}" if field else None,
            "rule": rule.format_map(config.to_dict()) if rule else None,
        }
    spent = accumulate(stage_macs(config))
    rows = [
        [f"stage {index}", _counts(stage.num_attention_heads), str(stage.hidden_size), f"{macs / 1e9:.4g}"]
        for index, (stage, macs) in enumerate(zip(config.stages, spent))
    ]
    description["schedule"] = _table(["", "heads", "width", "GMACs up to here"], rows)
    if config.num_stages > 1:  # a model of one stage has no exit, and no τ
        if config.threshold is not None:  # None after `exit_criterion` was changed
            description["override"] = f"threshold={config.threshold}"
            description["threshold"] = _threshold(config.threshold)
        criterion = EXIT_CRITERIA[config.exit_criterion]
        description["criterion"] = criterion.description.format(top_k=config.entropy_top_k)
        side = "below" if criterion.exits_below else "above"
        description["side"] = f"{side} or equal to" if config.exit_at_threshold else side
    return description


def _measurements(config: PreTrainedConfig, results: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the template that follow from the results, as tables and lines; `None` or empty for missing ones."""
    sweep = list(results.get("sweep") or [])
    shown = _evenly_picked(sweep, _row_of_config(config, sweep))
    return {
        "results": results,
        "plot": Path(results["plot"]).name if results.get("plot") else None,
        "accuracy": _accuracy_table(results),
        "sweep": _sweep_table(config, shown),
        "sweep_picked": f"{len(shown)} of {len(sweep)}" if len(shown) < len(sweep) else None,
        "split": results["split"] if results.get("split") not in (None, ALL, UNKNOWN) else None,
        "training": [
            f"* {key}: {value}" for key, value in (results.get("training") or {}).items() if value is not None
        ],
    }


def _calibration(model: PreTrainedModel, results: Mapping[str, Any]) -> dict[str, Any]:
    """The first given calibration that applies to this model; else the first one, and why it does not apply."""
    found = [results.get("calibration"), getattr(model.config, "calibration", None)]
    measured = results.get("preprocessing")  # figures of other images would stand beside the promise
    judged = [(calibration, calibration_status(model, calibration, measured)) for calibration in found if calibration]
    if not judged:
        return {"calibration": {}}
    calibration, status = next((pair for pair in judged if pair[1].holds), judged[0])
    facts = {**calibration, "dtype": (calibration.get("conditions") or {}).get("dtype")}
    if facts.get("dataset") is not None:
        facts["dataset"] = public_name(facts["dataset"])
    return {
        "calibration": calibration,
        "calibration_status": status,
        "calibration_statement": calibration_statement(calibration),
        "calibration_seen": _seen(model.config, results, calibration),
        "calibration_measured": _shares_images(results, calibration),
        "calibration_threshold": _exactly(calibration.get("threshold")),
        "calibration_facts": [
            # τ, ε and δ unrounded: the promise holds for exactly these values.
            f"* {words}: {_readable(facts[fact]) if fact in MEASURED else _exactly(facts[fact])}"
            for fact, words in CALIBRATION_FACTS.items()
            if facts.get(fact) is not None
        ],
    }


def _exactly(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _accuracy_table(results: Mapping[str, Any]) -> str | None:
    if stages := results.get("stages"):
        header, cells = _columns(stages)
        rows = [[f"stage {index}", *row] for index, row in enumerate(cells)]
        return _table(["every image answered by", *header], rows)
    row = {**results, "gmacs": results["macs"] / 1e9} if results.get("macs") is not None else results
    header, cells = _columns([row])
    return _table(header, cells) if header else None


def _sweep_table(config: PreTrainedConfig, sweep: Sequence[Mapping[str, Any]]) -> str | None:
    if not sweep:
        return None
    header, cells = _columns(sweep)
    labels = distinct_labels([row["threshold"] for row in sweep])
    if (shipped := _row_of_config(config, sweep)) is not None:
        labels[shipped] = f"**{labels[shipped]}** (as configured)"
    rows = [[label, *cell] for label, cell in zip(labels, cells)]
    if all(row.get("exit_shares") is not None for row in sweep):
        header += [f"leave after stage {index}" for index in range(len(sweep[0]["exit_shares"]))]
        rows = [[*cell, *(f"{100 * share:.1f} %" for share in row["exit_shares"])] for row, cell in zip(sweep, rows)]
    return _table(["τ", *header], rows)


def _columns(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of those figures that every row has, so that no cell is empty."""
    names = [name for name in COLUMNS if all(row.get(name) is not None for row in rows)]
    return [COLUMNS[name][0] for name in names], [
        [COLUMNS[name][1].format(100 * row[name] if name in ROUNDED else row[name]) for name in names] for row in rows
    ]


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def _readable(value: Any) -> str:
    return _threshold(value) if isinstance(value, (float, list, tuple)) else str(value)


def _counts(heads: int | Sequence[int]) -> str:
    """Heads of a stage: one number, or one per layer of a hierarchy."""
    return str(heads) if isinstance(heads, int) else ", ".join(map(str, heads))


def _threshold(value: float | Sequence[float]) -> str:
    return distinct_labels([value])[0]


def _evenly_picked(rows: Sequence[Mapping[str, Any]], wanted: int | None) -> Sequence[Mapping[str, Any]]:
    """The first row, the last, rows at even distances between them, and the row of index `wanted`."""
    if len(rows) <= SWEEP_ROWS:
        return rows
    picked = {round(index * (len(rows) - 1) / (SWEEP_ROWS - 1)) for index in range(SWEEP_ROWS)}
    return [rows[index] for index in sorted(picked | ({wanted} - {None}))]


def _row_of_config(config: PreTrainedConfig, sweep: Sequence[Mapping[str, Any]]) -> int | None:
    """Index of the sweep's row with the configuration's τ; `None` if it was not measured."""
    for index, row in enumerate(sweep if getattr(config, "threshold", None) is not None else ()):
        exits = config.num_stages - 1
        if resolve_thresholds(row["threshold"], exits) == resolve_thresholds(config.threshold, exits):
            return index
    return None


def _eval_results(config: PreTrainedConfig, results: Mapping[str, Any], task: str) -> list[EvalResult]:
    """For the model index: all stages of the model, and the configuration's τ if it is in the sweep."""
    if stages := results.get("stages"):
        measured = [("" if len(stages) == 1 else ", every image through all stages", stages[-1])]
    else:
        measured = [("", results)]
    sweep = results.get("sweep") or []
    if (index := _row_of_config(config, sweep)) is not None:
        measured.append((f" at τ = {_threshold(config.threshold)}", sweep[index]))
    return [
        EvalResult(
            task_type=task,
            dataset_type=results["dataset"],
            dataset_name=results["dataset"].rsplit("/", 1)[-1],
            dataset_split=None if results.get("split") in (ALL, UNKNOWN) else results.get("split"),
            metric_type=kind,
            metric_name=f"{words}{where}",
            metric_value=round(row[field], ROUNDED.get(field, 2)),
        )
        for where, row in measured
        for field, (kind, words) in METRICS.items()
        if row.get(field) is not None
    ]
