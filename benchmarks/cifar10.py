"""
Tests the papers' claims with small models on CIFAR-10: trains them one after another, then prints a table.

    python -m benchmarks.cifar10 --output-dir outputs/cifar10
    python -m benchmarks.cifar10 --output-dir outputs/cifar10 --table

First plain nets of two widths are trained. Four runs of equal length start from the narrow net: ThinkingViT 3 → 6, the
same without recycling (α stays 0), naive iteration 3 → 3, and the narrow net alone. Two start from the wide net: A-ViT,
and the wide net alone. Finished runs are not repeated, and an interrupted run resumes. `benchmarks.checkpoints` makes a
shipped checkpoint of one of them.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForImageClassification

from hf_thinkingvit.evaluation import stage_macs


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "configs"

NARROW = ["--model.thinking_stages", "[3]", "--model.hidden_size", "48"]
WIDE = ["--model.thinking_stages", "[6]"]
# Name, the run whose net it starts from, epochs, flags.
RUNS = [
    ("single 3", None, 15, NARROW),
    ("single 6", None, 10, WIDE),
    ("3-6", "single 3", 8, ["--model.thinking_stages", "[3, 6]"]),
    ("3-6 without recycling", "single 3", 8, ["--model.thinking_stages", "[3, 6]", "--freeze", "*.alpha"]),
    ("3-3", "single 3", 8, ["--model.thinking_stages", "[3, 3]", "--model.hidden_size", "48"]),
    ("single 3 longer", "single 3", 8, NARROW),
    ("single 6 longer", "single 6", 5, WIDE),
    ("A-ViT", "single 6", 5, []),
    ("A-ViT ponder weight 3e-3", "single 6", 5, ["--model.ponder_loss_weight", "3e-3"]),
]


def train(name: str, start: str | None, epochs: int, flags: list[str], output_dir: Path, dataset: str) -> None:
    folder = output_dir / name.replace(" ", "-")
    if (folder / "done").exists():
        return
    command = [sys.executable, ROOT / "examples" / "train.py", "--dataset", dataset]
    command += ["--config", CONFIGS / ("avit_cifar10.yaml" if "A-ViT" in name else "thinkingvit_cifar10.yaml")]
    # The table reports the last epoch, so nothing is selected on the test images.
    command += ["--eval_split", "test"]
    command += ["--output_dir", folder, "--epochs", epochs, "--resume", "auto", "--cpu", "--num_workers", 0]
    if start is not None:
        source = output_dir / start.replace(" ", "-") / "vit"
        if not source.exists():
            trained = AutoModelForImageClassification.from_pretrained(source.parent / "last")
            trained.extract_stage(0).save_pretrained(source)
        command += ["--from_vit", source]
    subprocess.run([str(word) for word in (*command, *flags)], check=True)
    (folder / "done").touch()


def table(output_dir: Path) -> str:
    lines = [
        "| run | from | epochs | top-1 (%) per stage | M MACs up to it | mean depth | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, start, epochs, _ in RUNS:
        folder = output_dir / name.replace(" ", "-")
        if not (folder / "done").exists():
            continue
        run = json.loads((folder / "results.json").read_text())
        result = run["history"][-1]["results"]["weights"]
        depth = "-"
        if "macs" in result:
            macs, depth = [result["macs"]], f"{result['mean_depth']:.2f}"
        else:
            per_stage = stage_macs(AutoModelForImageClassification.from_pretrained(folder / "last").config)
            macs = [sum(per_stage[: stage + 1]) for stage in range(len(per_stage))]
        top1, spent = ", ".join(f"{value:.2f}" for value in result["top1"]), ", ".join(f"{m / 1e6:.1f}" for m in macs)
        lines.append(f"| {name} | {start or '-'} | {epochs} | {top1} | {spent} | {depth} | {run['seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--dataset", default="uoft-cs/cifar10", help="Hub id or folder")
    parser.add_argument("--only", nargs="+", choices=[name for name, *_ in RUNS], help="runs to train")
    parser.add_argument("--table", action="store_true", help="print what is there without training")
    arguments = parser.parse_args()
    for name, start, epochs, flags in RUNS:
        if not arguments.table and name in (arguments.only or [name]):
            train(name, start, epochs, flags, arguments.output_dir, arguments.dataset)
    print(table(arguments.output_dir))


if __name__ == "__main__":
    main()
