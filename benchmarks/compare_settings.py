"""What the runs of `benchmarks.compare` are made with: recorded beside them, and checked when a comparison goes on."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from benchmarks.compare_methods import METHODS, Sizes, model_config
from benchmarks.compare_runs import Job, run_config, write_json
from hf_thinkingvit.training import TrainingConfig


# Fields of a run that change no result, and those that say in which folder its start lies or belong to the evaluation.
FREE = {
    *("output_dir", "resume", "num_workers", "trackers", "log_steps", "save_steps", "keep_checkpoints", "cpu"),
    *("eval_epochs", "eval_batch_size", "compile", "model_license", "seed"),
    *("from_pretrained", "from_vit", "teacher", "eval_split", "test_split", "max_eval_samples"),
}


def settings_of(job: Job) -> dict[str, Any]:
    """All that a job's result depends on, as JSON: "training", with that of its start, and "evaluation"."""
    base = job.base
    evaluation = {
        "dataset": _dataset(base),
        "eval_split": base.eval_split,
        "max_eval_samples": base.max_eval_samples,
        "rows": job.rows.get(base.eval_split or "", None),
        "columns": [base.image_column, base.label_column],
    }
    method = METHODS[job.method]
    if method.points is not None and job.trained is None:
        evaluation["points"] = method.points(model_config(job.method, Sizes.of(base.model)))
    return json.loads(json.dumps({"training": _training(job), "evaluation": evaluation}))


def _dataset(base: TrainingConfig) -> str:
    path = Path(base.dataset)
    return str(path.resolve()) if path.exists() else base.dataset


def _training(job: Job) -> dict[str, Any]:
    if job.trained is not None:
        return {"trained": str(job.trained.resolve()), "sha256": _digest(job.trained)}
    start = job.start
    run = run_config(job, None if start is None else Path("start")).to_dict()
    fields = {name: value for name, value in run.items() if name not in FREE}
    fields |= {"dataset": _dataset(job.base), "rows": job.rows.get(job.base.train_split)}
    return fields if start is None else {**fields, "start": _training(start)}


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def differences(then: Any, now: Any, name: str = "") -> list[str]:
    """The entries of two nested dicts that differ, in words."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*then, *now])
        return [
            text
            for key in keys
            for text in differences(then.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if then == now else [f"{name}: {then!r} then, {now!r} now"]


def prepare(jobs: Sequence[Job], redo: bool = False) -> None:
    """
    Find what earlier runs have left of the jobs, before any of them goes on. What was evaluated otherwise is evaluated
    anew, from the model that is there.

    Args:
        jobs (`Sequence[Job]`): of the comparison.
        redo (`bool`): delete what was trained with other settings, so that it is trained anew.

    Raises:
        ValueError: where a folder holds a run with other settings, or one that does not say its settings.
    """
    refused = []
    for job in jobs:
        if not job.begun:
            continue
        if job.settings.exists():
            then, now = json.loads(job.settings.read_text(encoding="utf-8")), settings_of(job)
            changed = differences(then["training"], now["training"])
        else:
            changed = ["there is no record of its settings"]
        if changed and redo:
            shutil.rmtree(job.folder)
        elif changed:
            refused.append(f"{job.name}: {'; '.join(changed)}")
        elif job.result.exists() and (changed := differences(then["evaluation"], now["evaluation"])):
            print(f"{job.name} is evaluated anew: {'; '.join(changed)}", flush=True)
            job.result.unlink()
    if refused:
        raise ValueError(
            f"{jobs[0].output_dir} holds runs that were made with other settings than are asked for now. Continue them "
            "with theirs, give another --output-dir, or --redo to delete them and train anew:\n" + "\n".join(refused)
        )


def check_given(job: Job, is_start: bool) -> None:
    """
    Whether a given model can stand for its method, and as the start of others where `is_start`.

    Raises:
        ValueError: if it lies in the folder of the method's own run, is of another architecture, or as a start of
            another size.
    """
    if job.folder.resolve() in job.trained.resolve().parents:
        raise ValueError(
            f"--trained {job.method}={job.trained}: this is of the comparison's own run, which goes on from it without "
            "--trained."
        )
    config = AutoConfig.from_pretrained(job.trained)
    method, sizes = METHODS[job.method], Sizes.of(job.base.model)
    if config.model_type != method.model_type:
        raise ValueError(
            f"--trained {job.method}={job.trained}: this is a {config.model_type!r}, and {method.title!r} needs a "
            f"{method.model_type!r} of this package."
        )
    expected = model_config(job.method, sizes)
    names = method.model(sizes) if is_start else ()
    other = [
        f"`{name}` is {getattr(config, name)!r} instead of {getattr(expected, name)!r}"
        for name in names
        if getattr(config, name) != getattr(expected, name)
    ]
    if other:
        raise ValueError(
            f"--trained {job.method}={job.trained}: methods start from this model, which must be of the comparison's "
            f"size, but {', '.join(other)}. Give a model of this size, a --config of the model's, or leave those "
            "methods out by --methods."
        )


def record(job: Job) -> None:
    """Write a job's settings, before it begins."""
    write_json(job.settings, settings_of(job))
