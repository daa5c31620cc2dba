"""
Makes a shipped checkpoint of a training run: the best model in half precision, with these weights' results in its card.

    python -m benchmarks.checkpoints --run outputs/thinkingvit-cifar10-distilled --name thinkingvit-cifar10

The τ of a model that thinks in stages is the one of least compute whose accuracy on the images that the run held out is
within `--max-drop` points of the last stage's. Test is measured afterwards. The run's losses and accuracies over the
epochs go into `benchmarks/logs`.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForImageClassification

from benchmarks.training_logs import write_training_log
from hf_thinkingvit.auto import AutoImageProcessor
from hf_thinkingvit.data import evaluation_batches
from hf_thinkingvit.evaluation import StageAnswers, evaluate_accuracy, evaluate_thresholds
from hf_thinkingvit.evaluation.threshold_points import distinct_thresholds
from hf_thinkingvit.hub import accuracy_results, model_card
from hf_thinkingvit.models.configuration_staged import thinks_in_stages
from hf_thinkingvit.training import parse_config
from hf_thinkingvit.training.data import load_data


ROOT = Path(__file__).parents[1]
PUBLIC_NAME = "uoft-cs/cifar10"


def cheapest_threshold(answers: StageAnswers, max_drop: float) -> float:
    """The τ of least compute whose accuracy is within `max_drop` points of the last stage's."""
    grid = [round(0.02 * step, 2) for step in range(round(50 * torch.tensor(float(answers.num_labels)).log().item()))]
    least = answers.stage_rows()[-1]["top1"] - max_drop
    fitting = [row for row in map(answers.row, grid) if row["top1"] >= least]
    return min(fitting, key=lambda row: row["gmacs"])["threshold"]


@torch.no_grad()
def export(run: Path, name: str, max_drop: float, command: str, folder: Path) -> None:
    config = parse_config(["--config", str(run / "config.yaml")])
    data = load_data(config)
    model = AutoModelForImageClassification.from_pretrained(run / "best", dtype=torch.float16)
    processor = AutoImageProcessor.from_pretrained(run / "best")
    measured = copy.deepcopy(model).float()
    training = {
        "data": f"CIFAR-10, {len(data.train.rows)} of the training images",
        "epochs": config.epochs,
        "command": f"`{command}`",
        "seed": config.seed,
    }
    facts = {"selected_on": data.selected_on, "training": training}
    if thinks_in_stages(model):
        held_out, _ = evaluate_thresholds(
            measured, data.evaluation.rows, processor, split=data.selected_on, batch_size=250
        )
        model.config.threshold = measured.config.threshold = cheapest_threshold(held_out, max_drop)
        answers, _ = evaluate_thresholds(measured, data.test.rows, processor, split="test", batch_size=250)
        thresholds = distinct_thresholds(answers, including=model.config.threshold)
        results = answers.results(thresholds) | {"dataset": PUBLIC_NAME, **facts}
    else:
        accelerator = Accelerator(cpu=True)
        batches = accelerator.prepare(evaluation_batches(data.test, processor, batch_size=250))
        found = evaluate_accuracy(accelerator, {"half": measured}, batches)["half"]
        results = accuracy_results(model, found, PUBLIC_NAME, split="test", **facts)
    model.config.training_data["dataset"] = PUBLIC_NAME
    # The folder is loaded with the package installed, so it needs no copy of its code.
    model.save_pretrained(folder)
    for code in folder.glob("*.py"):
        code.unlink()
    saved = json.loads((folder / "config.json").read_text())
    saved.pop("auto_map", None)
    (folder / "config.json").write_text(json.dumps(saved, indent=2) + "\n")
    processor.save_pretrained(folder)
    source = f"examples/checkpoints/{name}"
    card = model_card(model, results, name=name, source=source, license="apache-2.0", datasets=PUBLIC_NAME)
    card.save(folder / "README.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output folder of `examples/train.py`, finished")
    parser.add_argument("--name", required=True, help="of the checkpoint")
    parser.add_argument("--max-drop", type=float, default=0.2, help="points of accuracy that τ may cost")
    parser.add_argument("--command", required=True, help="what the run was trained by, for the card")
    parser.add_argument("--output", type=Path, default=ROOT / "examples" / "checkpoints")
    arguments = parser.parse_args()
    export(arguments.run, arguments.name, arguments.max_drop, arguments.command, arguments.output / arguments.name)
    write_training_log(arguments.run, ROOT / "benchmarks" / "logs" / f"{arguments.name}.csv")


if __name__ == "__main__":
    main()
