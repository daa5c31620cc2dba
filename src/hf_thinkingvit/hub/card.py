"""Model cards, made from what was measured: a card cannot disagree with the run."""

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
from ..evaluation.splits import ALL, UNKNOWN, same_data, why_not_new
from ..evaluation.statements import calibration_statement
from ..models.configuration_checks import as_pair
from ..models.exit_rules import EXIT_CRITERIA, resolve_thresholds
from ..public_names import public_name
from .results import num_stages, read_results


SWEEP_ROWS = 12  # what a reader takes in; the results file has every row

METRICS = {"top1": ("accuracy", "top-1 accuracy"), "top5": ("top_5_accuracy", "top-5 accuracy")}
COLUMNS = {
    "top1": ("top-1 (%)", "{:.2f}"),
    "top5": ("top-5 (%)", "{:.2f}"),
    "mean_depth": ("mean depth in layers", "{:.2f}"),
    "gmacs": ("GMACs", "{:.4g}"),
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
    "dtype": "measured in",
    "achieved": "achieved on them",
}


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
    A card for a trained classifier. Every measured number is one of `results`; what they lack, the card leaves out. A
    calibration of `results`, or the one that the configuration carries, is repeated only while it is of this model as
    it is; else the card says what has changed since ([`~hf_thinkingvit.evaluation.calibration_status`]).

    Args:
        model (`PreTrainedModel`): whose configuration and weights the card describes.
        results (`dict` or path, *optional*): measured results, or the JSON file that holds them, in the form that
            `hf_thinkingvit.hub.results` describes.
        name (`str`): of the model.
        source (`str`): what a user loads it from: a folder, or the id of its repository.
        license (`str`, *optional*): of the weights, as the Hub writes it, such as `"apache-2.0"`.
        datasets (`str` or `list[str]`, *optional*): Hub ids of what the model was trained on; of local data, the names.
        card_data: further metadata of `ModelCardData`, such as `base_model`.

    Returns:
        `ModelCard`, to be saved as `README.md`.

    Raises:
        ValueError: if the results are of another model, or not in that form.
    """
    config = model.config
    results = _with_selection(config, {} if results is None else read_results(results, config))
    figures = _eval_results(config, results)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        license=license,
        datasets=[public_name(each) for each in ([datasets] if isinstance(datasets, str) else datasets or [])] or None,
        tags=["vision", "adaptive-inference", config.model_type],
        # Without figures there must be no model index, and the name is of the index.
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
        name=name,
        source=source,
    )


def _with_selection(config: PreTrainedConfig, results: Mapping[str, Any]) -> dict[str, Any]:
    """Results that say on which images the best epoch was chosen, where the configuration records it of their data."""
    recorded = getattr(config, "training_data", None) or {}
    results = dict(results)
    if results.get("selected_on") is None and recorded and same_data(recorded.get("dataset"), results.get("dataset")):
        results["selected_on"] = recorded.get("selected_on")
    return results


def _seen(config: PreTrainedConfig, results: Mapping[str, Any], calibration: Mapping[str, Any]) -> str | None:
    """Why the calibration images were not new to the model, by the calibration, the configuration or the results."""
    dataset, split = calibration.get("dataset"), calibration.get("split") or UNKNOWN
    seen = calibration.get("seen") or why_not_new(getattr(config, "training_data", None), dataset, split)
    if seen is None and split == results.get("selected_on") and same_data(results.get("dataset"), dataset):
        return f"the best epoch of the model was chosen by split {split!r} of `{public_name(dataset)}`"
    return seen


def _description(model: PreTrainedModel) -> dict[str, Any]:
    """What the configuration alone says."""
    config = model.config
    description = {
        "config": config,
        "image_size": " × ".join(str(side) for side in as_pair(config.image_size)),
        "patch_size": " × ".join(str(side) for side in as_pair(config.patch_size)),
        "parameters": f"{model.num_parameters() / 1e6:.2f} M",
    }
    if num_stages(config) is None:
        return description | {"override": f"halting_epsilon={config.halting_epsilon}"}
    spent = accumulate(stage_macs(config))
    rows = [
        [f"stage {index}", _counts(stage.num_attention_heads), str(stage.hidden_size), f"{macs / 1e9:.4g}"]
        for index, (stage, macs) in enumerate(zip(config.stages, spent))
    ]
    description["schedule"] = _table(["", "heads", "width", "GMACs up to here"], rows)
    if num_stages(config) > 1:  # one stage has no exit, and so no τ
        if config.threshold is not None:  # unset until it is chosen for another criterion
            description["override"] = f"threshold={config.threshold}"
            description["threshold"] = _threshold(config.threshold)
        criterion = EXIT_CRITERIA[config.exit_criterion]
        description["criterion"] = criterion.description.format(top_k=config.entropy_top_k)
        description["side"] = "below" if criterion.exits_below else "above"
    return description


def _measurements(config: PreTrainedConfig, results: Mapping[str, Any]) -> dict[str, Any]:
    """What the results say, as tables and lines; nothing for what they lack."""
    sweep = list(results.get("sweep") or [])
    shown = _evenly_picked(sweep, _row_of_config(config, sweep))
    return {
        "results": results,
        "plot": Path(results["plot"]).name if results.get("plot") else None,
        "accuracy": _accuracy_table(results),
        "sweep": _sweep_table(shown),
        "sweep_picked": f"{len(shown)} of {len(sweep)}" if len(shown) < len(sweep) else None,
        "split": results["split"] if results.get("split") not in (None, ALL, UNKNOWN) else None,
        "training": [
            f"* {key}: {value}" for key, value in (results.get("training") or {}).items() if value is not None
        ],
    }


def _calibration(model: PreTrainedModel, results: Mapping[str, Any]) -> dict[str, Any]:
    """The calibration that is of this model, of those that are given; else the first, and why it is none."""
    found = [results.get("calibration"), getattr(model.config, "calibration", None)]
    judged = [(calibration, calibration_status(model, calibration)) for calibration in found if calibration]
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
        "calibration_threshold": _exactly(calibration.get("threshold")),
        "calibration_facts": [
            # τ, ε and δ to the last digit: a promise is of these and no others.
            f"* {words}: {_readable(facts[fact]) if fact == 'achieved' else _exactly(facts[fact])}"
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


def _sweep_table(sweep: Sequence[Mapping[str, Any]]) -> str | None:
    if not sweep:
        return None
    header, cells = _columns(sweep)
    rows = [[_threshold(row["threshold"]), *cell] for row, cell in zip(sweep, cells)]
    if all(row.get("exit_shares") is not None for row in sweep):
        header += [f"leave after stage {index}" for index in range(len(sweep[0]["exit_shares"]))]
        rows = [[*cell, *(f"{100 * share:.1f} %" for share in row["exit_shares"])] for row, cell in zip(sweep, rows)]
    return _table(["τ", *header], rows)


def _columns(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the figures that every row has: a table has no holes."""
    names = [name for name in COLUMNS if all(row.get(name) is not None for row in rows)]
    return [COLUMNS[name][0] for name in names], [
        [COLUMNS[name][1].format(row[name]) for name in names] for row in rows
    ]


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def _readable(value: Any) -> str:
    return _threshold(value) if isinstance(value, (float, list, tuple)) else str(value)


def _counts(heads: int | Sequence[int]) -> str:
    """Of a hierarchy, one number per layer."""
    return str(heads) if isinstance(heads, int) else ", ".join(map(str, heads))


def _threshold(value: float | Sequence[float]) -> str:
    return ", ".join(f"{number:.4g}" for number in (value if isinstance(value, Sequence) else [value]))


def _evenly_picked(rows: Sequence[Mapping[str, Any]], wanted: int | None) -> Sequence[Mapping[str, Any]]:
    """The first, the last, and rows at even distances between; and the wanted one."""
    if len(rows) <= SWEEP_ROWS:
        return rows
    picked = {round(index * (len(rows) - 1) / (SWEEP_ROWS - 1)) for index in range(SWEEP_ROWS)}
    return [rows[index] for index in sorted(picked | ({wanted} - {None}))]


def _row_of_config(config: PreTrainedConfig, sweep: Sequence[Mapping[str, Any]]) -> int | None:
    """Where in the sweep the τ is with which the model is loaded, if it was measured."""
    for index, row in enumerate(sweep if getattr(config, "threshold", None) is not None else ()):
        exits = config.num_stages - 1
        if resolve_thresholds(row["threshold"], exits) == resolve_thresholds(config.threshold, exits):
            return index
    return None


def _eval_results(config: PreTrainedConfig, results: Mapping[str, Any]) -> list[EvalResult]:
    """For the model index: the whole model, and the model as it is loaded if its τ is in the sweep."""
    if stages := results.get("stages"):
        measured = [("" if len(stages) == 1 else ", every image through all stages", stages[-1])]
    else:
        measured = [("", results)]
    sweep = results.get("sweep") or []
    if (index := _row_of_config(config, sweep)) is not None:
        measured.append((f" at τ = {_threshold(config.threshold)}", sweep[index]))
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=results["dataset"],
            dataset_name=results["dataset"].rsplit("/", 1)[-1],
            dataset_split=None if results.get("split") in (ALL, UNKNOWN) else results.get("split"),
            metric_type=kind,
            metric_name=f"{words}{where}",
            metric_value=round(row[field], 2),
        )
        for where, row in measured
        for field, (kind, words) in METRICS.items()
        if row.get(field) is not None
    ]
