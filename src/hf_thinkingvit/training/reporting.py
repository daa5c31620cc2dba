"""What a run saves for use: models with image processor and model card, and their accuracy on the test split."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from ..auto import TASKS
from ..evaluation.accuracy import kind_of_answers, main_measure
from ..hub import accuracy_results, model_card
from ..public_names import public_name
from .adapters import adapter_facts, merged
from .checkpoints import replacing_folder
from .progress import Progress
from .setup import TrainingSetup
from .tasks import TRAINING_TASKS


# The step of a saved model. `output_dir` may contain models of another run, or of steps after the checkpoint that this
# run resumed from.
MODEL_STEP = "training_step.json"


def save_model(
    folder: Path, model: PreTrainedModel, measured: Mapping[str, Any], setup: TrainingSetup, progress: Progress
) -> None:
    """
    Replace `folder` by the model with its image processor and model card. The configuration records as `training_data`
    which images the model was trained on and chosen by.

    Args:
        folder (`Path`): may contain the model of an earlier step.
        model (`PreTrainedModel`): not wrapped. Adapters are merged in what is saved.
        measured (`dict`): its entry of the task's `evaluate` on the images that choose the best epoch.
        setup (`TrainingSetup`), progress (`Progress`): of the run.
    """
    # An evaluation can warn of images that the model was trained on. Overwrites the record of the starting point.
    model.config.training_data = {
        "dataset": public_name(setup.config.dataset),
        "split": setup.config.train_split,
        "selected_on": setup.data.selected_on,
        **setup.task.record(setup.config),
    }
    model = merged(model)
    with replacing_folder(folder) as temporary:
        model.save_pretrained(temporary)
        setup.processor.save_pretrained(temporary)
        step = {"step": progress.step, "epoch": progress.epoch}
        (temporary / MODEL_STEP).write_text(json.dumps(step), encoding="utf-8")
        _save_card(temporary, model, measured, setup, progress.epoch, progress.step, split=setup.data.selected_on)


def say_measures(setup: TrainingSetup, progress: Progress, results: Mapping[str, Mapping], seconds: float) -> None:
    """Print and track what the task's `evaluate` has returned after an epoch."""
    say = setup.accelerator.print
    for name, result in results.items():
        say(f"\nepoch {progress.epoch}, {name}: {_in_words(setup, result)}", end="")
        if setup.config.trackers:
            kind = kind_of_answers(result).replace("-", "_")
            values = {
                f"eval/{name}/{measure}_{kind}_{stage}": value
                for measure in setup.task.measures
                for stage, value in enumerate(result[measure])
            }
            setup.accelerator.log(values, step=progress.step)
    if progress.skipped_images:
        say(f"\n{progress.skipped_images} training images could not be decoded so far", end="")
    say(f" ({seconds:.0f} s)")


def _in_words(setup: TrainingSetup, result: Mapping[str, Any]) -> str:
    """The decisive measure of every stage or sub-network."""
    decisive, percent = setup.task.decisive, setup.task.percent
    return f"{setup.task.measures[decisive]} {', '.join(f'{percent * value:.2f}' for value in result[decisive])} %"


def continue_models(setup: TrainingSetup, history: list[dict], progress: Progress, checkpoint: Path | None) -> None:
    """
    Make sure that the best and the last model of a resumed run are in its `output_dir`: one that is missing is copied
    from the run of the checkpoint. If it is missing there as well, the run chooses its best model among later epochs
    (`best_score` is reset), and if the checkpoint had been evaluated, evaluates it again. Every process calls it.

    Args:
        setup (`TrainingSetup`): of the run.
        history (`list[dict]`), progress (`Progress`): those of the checkpoint; changed in place.
        checkpoint (`Path`, *optional*): the one that the run resumed from.
    """
    if checkpoint is None or not history:
        return
    wanted, missing = _wanted(history, progress), [[]]
    if setup.accelerator.is_main_process:
        missing[0] = [name for name in wanted if not _bring(setup.output_dir, name, wanted, checkpoint)]
    if setup.accelerator.num_processes > 1:
        broadcast_object_list(missing)
    for name in missing[0]:
        setup.accelerator.print(f"the {name} model (of step {wanted[name]['step']}) is not there any more")
    if "best" in missing[0]:
        setup.accelerator.print("the best model is chosen among the epochs that are evaluated from here on")
    again = bool(missing[0]) and history[-1]["step"] == progress.step
    if "best" in missing[0] or (again and progress.best_step == progress.step):
        progress.best_score, progress.best_step = Progress().best_score, None
    if again:
        history.pop()


def _wanted(history: list[dict], progress: Progress) -> dict[str, dict]:
    """By `"best"` and `"last"`, the entries of the history that describe these models."""
    wanted = {"last": history[-1]}
    if progress.best_step is not None:
        wanted["best"] = next(entry for entry in history if entry["step"] == progress.best_step)
    elif progress.best_score >= 0:  # saved by a version that did not record the step
        wanted["best"] = _most_accurate(history)
    return wanted


def _most_accurate(history: list[dict]) -> dict:
    """The first entry with the greatest decisive measure, of the last stage or the default sub-network."""
    return max(history, key=lambda entry: _score(entry["results"][entry["chosen"]]))


def _score(result: Mapping[str, Any]) -> float:
    decisive = next(task.decisive for task in TRAINING_TASKS.values() if task.decisive in result)
    return main_measure(result, decisive)


def _step_of(folder: Path) -> int | None:
    """The step of a saved model; `None` if it was saved by a version that did not record it."""
    try:
        return json.loads((folder / MODEL_STEP).read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError):
        return None


def _measured_in(folder: Path) -> dict[int, dict]:
    """The history of the last run in a folder, by step; empty if there is no readable one."""
    try:
        history = json.loads((folder / "results.json").read_text(encoding="utf-8"))["history"]
        return {entry["step"]: entry for entry in history if entry["chosen"] in entry["results"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _holds(folder: Path, name: str, wanted: Mapping[str, dict], recorded: bool) -> bool:
    """
    Whether the model `name` in the folder of a run is that of `wanted[name]`. With `recorded`, only a model that
    records its step counts; else only one that does not.
    """
    step, measured = _step_of(folder / name), _measured_in(folder)
    entry, newest = wanted[name], wanted["last"]["step"]
    if not (folder / name).is_dir() or (step is not None) != recorded:
        return False
    if measured.get(entry["step"], entry)["results"] != entry["results"]:  # another run with the same steps
        return False
    if recorded:
        return step == entry["step"]
    # If the run in this folder has gone on after the checkpoint, it may have replaced the model.
    later = max(measured, default=0) if name == "last" else _most_accurate(list(measured.values()) or [entry])["step"]
    return later <= newest


def _bring(output_dir: Path, name: str, wanted: Mapping[str, dict], checkpoint: Path) -> bool:
    """Copy the model of `wanted[name]` to `output_dir` if it is not there; `False` if it cannot be found."""
    own = output_dir.resolve()
    # The checkpoint may be a copy of one of this run, and the folder of checkpoints a link to another disk.
    runs = (checkpoint.absolute().parent.parent.resolve(), checkpoint.resolve().parent.parent)
    folders = dict.fromkeys((own, *runs))
    found = [folder for recorded in (True, False) for folder in folders if _holds(folder, name, wanted, recorded)]
    if found and found[0] != own:
        with replacing_folder(output_dir / name) as temporary:
            shutil.copytree(found[0] / name, temporary, dirs_exist_ok=True)
    return bool(found)


def _saved(folder: Path, history: list[dict], progress: Progress) -> tuple[dict[str, dict], list[str]]:
    """By name, the entries of the history for the models saved in `folder`; and messages about missing ones."""
    entries, problems = {}, []
    measured = {entry["step"]: entry for entry in history}
    for name, wanted in _wanted(history, progress).items():
        path, step = folder / name, _step_of(folder / name)
        if not path.is_dir():
            problems.append(f"the {name} model (of step {wanted['step']}) is not reported: there is no folder {path}")
        elif step not in (*measured, None):
            problems.append(
                f"the {name} model is not reported: {path} is of step {step}, which this run never measured"
            )
        else:
            entries[name] = wanted if step is None else measured[step]
    most = _most_accurate(history)
    if "best" in entries and entries["best"]["step"] != most["step"]:
        problems.append(
            f"the model of step {most['step']} was more accurate, but is not there any more: what is reported as best "
            f"is of step {entries['best']['step']}"
        )
    return dict(sorted(entries.items())), problems


def report_test(
    setup: TrainingSetup, history: list[dict], progress: Progress, each: Callable[[Iterable[dict]], Iterable[dict]]
) -> dict[str, dict] | None:
    """
    Measure the best and the last model of a finished run on the test split, and update their model cards. Every process
    calls it.

    Args:
        setup (`TrainingSetup`): of the run.
        history (`list[dict]`): the evaluations after epochs.
        progress (`Progress`): of the run.
        each (`Callable`): iterates over the batches it is given, and may raise to stop.

    Returns:
        For each of the two that exists, what the task's `evaluate` returned and the model's `step`. `None` without a
        test split.
    """
    data, accelerator, folder = setup.data, setup.accelerator, setup.output_dir
    if data.test is None:
        return None
    found: list = [_saved(folder, history, progress) if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    entries, problems = found[0]
    for problem in problems:
        accelerator.print(problem)
    if not entries:
        return {}
    models = {name: TASKS[setup.task.name][0].from_pretrained(folder / name).to(accelerator.device) for name in entries}
    measured = setup.task.evaluate(accelerator, models, each(setup.batches_to_evaluate(data.test)))
    for name, entry in entries.items():
        words = _in_words(setup, measured[name])
        accelerator.print(f"{data.split}, {name} model (step {entry['step']}): {words}")
        if accelerator.is_main_process:
            _save_card(folder / name, models[name], measured[name], setup, entry["epoch"], entry["step"], data.split)
    accelerator.wait_for_everyone()
    return {name: {"step": entry["step"], **measured[name]} for name, entry in entries.items()}


def _save_card(
    folder: Path,
    model: PreTrainedModel,
    measured: Mapping[str, Any],
    setup: TrainingSetup,
    epoch: int,
    step: int,
    split: str,
) -> None:
    """Write the card of the model in `folder`, with its entry of the task's `evaluate` on the images named `split`."""
    config, data = setup.config, setup.data
    dataset = public_name(config.dataset)
    training = {
        "data": f"`{dataset}`, split `{config.train_split}`, {setup.num_images} images",
        "epochs": f"{epoch} of {setup.num_epochs}, {step} optimizer steps",
        "batch size": config.batch_size,
        "learning rate": f"{config.scaled_learning_rate:g} at that batch size",
        **adapter_facts(config),
        "seed": config.seed,
    }
    results = accuracy_results(model, measured, dataset, split=split, selected_on=data.selected_on, training=training)
    name = f"{config.model_type}-{dataset.rsplit('/')[-1]}"
    card = model_card(model, results, name=name, license=config.model_license)
    temporary = folder / ".README.md.partial"
    card.save(temporary)
    os.replace(temporary, folder / "README.md")
