"""Training logs as CSV: the losses and the accuracy of each answer, a line for each evaluation of a run."""

import csv
import json
from pathlib import Path


def write_training_log(run: Path, path: Path) -> None:
    """
    Args:
        run (`Path`): output folder of `examples/train.py`, which has `results.json`.
        path (`Path`): the CSV file to write.
    """
    history = json.loads((run / "results.json").read_text())["history"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        losses, count = list(history[0]["losses"]), len(history[0]["results"]["weights"]["top1"])
        names = [f"top1_of_answer_{answer}" for answer in range(count)]
        writer.writerow(["epoch", "step", "seconds", *losses, *names])
        for entry in history:
            top1 = [round(value, 2) for value in entry["results"]["weights"]["top1"]]
            means = [round(entry["losses"][name], 4) for name in losses]
            writer.writerow([entry["epoch"], entry["step"], entry["seconds"], *means, *top1])
