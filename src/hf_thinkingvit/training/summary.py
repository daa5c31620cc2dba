"""What a run is about to do, and what came of it, in words for the console."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from ..data import ImageSplit
from ..evaluation.accuracy import DEFAULT, kind_of_answers, main_measure
from ..evaluation.calibration import Calibration
from ..evaluation.splits import may_share_images
from ..evaluation.wording import distinct_labels
from .config import TrainingConfig
from .setup import TrainingSetup
from .splits import other_half


if TYPE_CHECKING:
    from .loop import TrainingRun


PRECISIONS = {"no": "float32", "fp16": "float16 (mixed)", "bf16": "bfloat16 (mixed)"}


def start_summary(
    setup: TrainingSetup,
    saved_to: Path | None = None,
    calibration_images: ImageSplit | None = None,
    unreadable: Sequence[str] = (),
) -> str:
    """
    Device, precision, data, model, length and place (by default that of the run) of a run that is about to start, with
    the images that τ is calibrated on, and those that are left out because they cannot be decoded.
    """
    config, data, accelerator = setup.config, setup.data, setup.accelerator
    model = accelerator.unwrap_model(setup.model, keep_torch_compile=False)
    processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    cooldown = f" ({config.epochs} and {config.cooldown_epochs} of cooldown)" if config.cooldown_epochs else ""
    begins = config.from_pretrained or config.from_vit
    lines = [
        ("device", f"{accelerator.device}{processes}, {PRECISIONS[config.mixed_precision]}"),
        ("data", f"{config.dataset}, {setup.num_images} images to train on, {len(data.id2label)} classes"),
        ("chosen by", f"{data.selected_on}{_count(data.evaluation.rows)}"),
        *([("τ by", f"{other_half(data.selected_on)}{_count(calibration_images.rows)}")] if calibration_images else []),
        *([("left out", _unreadable(unreadable))] if unreadable else []),
        ("model", f"{type(model).__name__}, {model.num_parameters() / 1e6:.2f} M parameters, {_stages(model.config)}"),
        ("starts from", begins or "new weights"),
        *([("trains", _adapters(config, model))] if config.lora_rank else []),
        (
            "length",
            f"{setup.num_steps} steps of {config.batch_size} images: {setup.num_epochs} epochs{cooldown}, "
            f"{config.warmup_epochs:g} of warm-up",
        ),
        ("learning rate", f"{config.scaled_learning_rate:g}" + _decay(config.layer_decay)),
        ("saved to", str(saved_to or setup.output_dir)),
    ]
    return as_table(lines)


def end_summary(run: "TrainingRun", results: dict[str, Any]) -> str:
    """Best and last accuracy of each stage, where the models are, and the next command."""
    lines = [*_accuracies(run, results), ("files", f"{run.output_dir / 'best'}, {run.output_dir / 'last'}")]
    best = shlex.quote(str(run.output_dir / "best"))
    command = f"hf-thinkingvit sweep --model {best} --dataset {shlex.quote(run.config.dataset)}"
    return as_table([*lines, ("next", command)])


def finetuning_summary(
    run: "TrainingRun",
    chosen: str,
    results: dict[str, Any],
    calibration: Calibration | None,
    remark: str | None,
    folder: Path,
) -> str:
    """What a fine-tuning run has measured, its τ, its files and the next command; the model is that of `chosen`."""
    measured = f"{results.get('split')} ({results.get('images')} images)"
    lines = [*_accuracies(run, {"history": run.history})]
    lines.append(("taken", f"the {chosen} one" + (" (the best is not clearly better)" if chosen == "last" else "")))
    for stage, row in enumerate(results.get("stages") or []):
        lines.append((f"stage {stage}", f"top-1 {row['top1']:.2f} % at {row['gmacs']:.4g} GMACs, on {measured}"))
    if "top1" in results:
        lines.append(("accuracy", f"top-1 {results['top1']:.2f} %, on {measured}"))
    if calibration is not None:
        row = results["at_threshold"]
        shares = ", ".join(f"{share:.0%}" for share in row["exit_shares"])
        lines.append(
            (
                "τ",
                f"{distinct_labels([calibration.threshold])[0]}: top-1 {row['top1']:.2f} % at {row['gmacs']:.4g} "
                f"GMACs, images that leave at each stage: {shares}",
            )
        )
        if may_share_images(results["split"], calibration.split):
            lines.append(("", "τ was chosen on these images: at this τ, expect less on others"))
        lines.append(("", remark or calibration.statement))
    if left_out := results["training"].get("left out"):
        lines.append(("left out", left_out))
    lines.append(("files", f"model, card and results in {folder}; which images were held out in splits.json"))
    return as_table([*lines, ("next", f"hf-thinkingvit classify --model {shlex.quote(str(folder))} --dataset FOLDER")])


def as_table(lines: list[tuple[str, str]]) -> str:
    """Names and texts in two columns."""
    return "\n".join(f"{name:<14}{text}" for name, text in lines)


def _accuracies(run: "TrainingRun", results: dict[str, Any]) -> list[tuple[str, str]]:
    history = results["history"]
    if not history:
        return []
    best = next((entry for entry in history if entry["step"] == run.progress.best_step), history[-1])
    lines, measure = [], run.task.decisive
    for name, entry in (("best", best), ("last", history[-1])):
        measured = entry["results"][entry["chosen"]]
        values, kind = measured[measure], kind_of_answers(measured)
        stages = ", ".join(f"{run.task.percent * value:.2f}" for value in values)
        words = f"{run.task.measures[measure]} of each {kind} {stages} %"
        if DEFAULT in measured:
            words += f" ({main_measure(measured, measure) * run.task.percent:.2f} % of the default one)"
        lines.append((name, f"epoch {entry['epoch']}: {words}, on {run.data.selected_on}"))
    return lines


def _count(rows: Any) -> str:
    return f" ({len(rows)} images)" if hasattr(rows, "__len__") else ""


def _unreadable(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} images that cannot be decoded: {'; '.join(names[:3])}{more}"


def _stages(config: Any) -> str:
    count = getattr(config, "num_stages", None)
    return f"{config.model_type}" if count is None else f"{config.model_type} of {count} stages"


def _adapters(config: TrainingConfig, model: PreTrainedModel) -> str:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"{trained / 1e6:.3g} M parameters: LoRA adapters of rank {config.lora_rank}, and what is not in the layers"


def _decay(layer_decay: float) -> str:
    return "" if layer_decay == 1 else f", times {layer_decay:g} for each earlier layer"
