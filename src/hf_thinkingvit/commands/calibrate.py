"""Chooses τ, and saves the model with it. `options.py` has its options and description."""

import argparse
import json
import shlex

import torch
from transformers import PreTrainedModel

from ..evaluation import calibrate_budget, calibrate_risk, measure_stage_milliseconds
from ..evaluation.calibration import Calibration
from ..evaluation.segmentation import StageConfusions
from ..evaluation.sweep import StageAnswers
from ..models.configuration_checks import as_pair
from . import command
from .evaluation import batch_size_of, evaluate, measure_of, segments
from .loading import best_device, load_model, start


def run(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.check < 1:
        raise ValueError("`check` must be at least 0 and below 1.")
    model, processor = load_model(arguments.model, task=None, dtype=getattr(torch, arguments.dtype))
    model.to(best_device())
    start(model, dataset=arguments.dataset, saved_to=arguments.output_dir)
    answers, _ = evaluate(model, processor, arguments)
    order = torch.randperm(len(answers), generator=torch.Generator().manual_seed(arguments.seed))
    held_out = round(arguments.check * len(answers))
    check, calibration = answers.select(order[:held_out]), answers.select(order[held_out:])
    found = calibrate(arguments, model, calibration)
    print(f"{answers.dataset}, split {answers.split}, measured in {arguments.dtype}")
    print(f"τ = {found.threshold}\n{found.statement}")
    facts = found.to_dict()
    for name, part in (("calibration", calibration), ("check", check)):
        if len(part):
            row = part.row(found.threshold)
            last = part.stage_rows()[-1]
            measure, words, value = measure_of(row)
            facts[f"{name}_images"] = {"images": len(part), f"last_stage_{measure}": last[measure], **row}
            print(
                f"{name:>12}: {len(part)} images, {words} {value:.2f} % (last stage {measure_of(last)[2]:.2f} %), "
                f"{row['gmacs']:.4g} GMACs (last stage {last['gmacs']:.4g})"
            )
    found.apply(model)
    model.save_pretrained(arguments.output_dir)
    processor.save_pretrained(arguments.output_dir)
    (arguments.output_dir / "calibration.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    folder = shlex.quote(str(arguments.output_dir))
    command.say(
        files=f"model and calibration.json in {arguments.output_dir}",
        # `segment` reads the size of the images from the calibration.
        next=f"hf-thinkingvit {'segment' if segments(model) else 'classify'} --model {folder} --dataset FOLDER",
    )


def calibrate(
    arguments: argparse.Namespace, model: PreTrainedModel, calibration: StageAnswers | StageConfusions
) -> Calibration:
    """τ for the goal that was chosen."""
    if arguments.gmacs is not None:
        return calibrate_budget(calibration, gmacs=arguments.gmacs, per_exit=arguments.per_exit)
    if arguments.milliseconds is not None:
        batch = torch.randn(
            batch_size_of(arguments, model), model.config.num_channels, *as_pair(model.config.image_size)
        )
        times = measure_stage_milliseconds(model, batch.to(model.device, model.dtype))
        return calibrate_budget(
            calibration, milliseconds=arguments.milliseconds, stage_milliseconds=times, per_exit=arguments.per_exit
        )
    risk = calibration.risks[0 if arguments.max_error is None else 1]
    epsilon = arguments.max_drop if arguments.max_error is None else arguments.max_error
    return calibrate_risk(
        calibration,
        epsilon,
        arguments.delta,
        risk,
        arguments.per_exit,
        allow_training_images=arguments.allow_training_images,
    )


def main(words: list[str] | None = None, prog: str | None = None) -> None:
    command.run_command("calibrate", words, prog)


if __name__ == "__main__":
    main()
