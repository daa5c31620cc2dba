"""
Puts the papers' claims to the test with small models: trains what each claim compares, with several seeds.

    python -m benchmarks.claims --output-dir outputs/claims
    python -m benchmarks.claims --output-dir outputs/claims --table
    python -m benchmarks.claims --data cifar10 --dataset uoft-cs/cifar10 --output-dir outputs/claims-cifar10

Runs of one group train for the same number of epochs by the same recipe. Finished runs are not repeated, and an
interrupted one resumes. The last epoch is reported, so nothing is chosen by the images that are reported. For each run
`logs/` in the output folder gets a CSV file with the training loss and the accuracy of each stage over the epochs.

A claim is a difference in points, taken between runs of the same seed, that the paper says is above 0, or above what it
allows to be lost. It is "seen" where it is above that by a t-test of the differences (one-sided, 5 %), "opposite" where
it is below by the same test, and "not seen" otherwise.
"""

import argparse
import dataclasses
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from transformers import AutoModelForImageClassification, PreTrainedModel

from benchmarks.training_logs import write_training_log
from hf_thinkingvit.auto import AutoImageProcessor
from hf_thinkingvit.evaluation import StageAnswers, evaluate_thresholds
from hf_thinkingvit.evaluation.threshold_points import distinct_thresholds
from hf_thinkingvit.training import parse_config, train


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "configs"
HALTING_LAYERS = 6  # of the plain nets that A-ViT starts from
SHALLOW_LAYERS = 4  # 8 of 12


@dataclasses.dataclass(frozen=True)
class Run:
    """
    Attributes:
        stages (`tuple[int]`): heads of each stage.
        flags (`tuple[str]`): of `examples/train.py`.
        start (`str`, *optional*): the run from whose last stage, as a plain ViT, this one starts.
        model_type (`str`): of the model.
    """

    stages: tuple[int, ...]
    flags: tuple[str, ...] = ()
    start: str | None = None
    model_type: str = "thinkingvit"


DEEP = ("--model.num_hidden_layers", str(HALTING_LAYERS))
RUNS = {
    "3": Run((3,)),
    "3-3": Run((3, 3)),
    "3-3-3": Run((3, 3, 3)),
    "3-6": Run((3, 6)),
    "3-6 alpha 0": Run((3, 6), ("--freeze", "*.alpha")),
    "2-3-6": Run((2, 3, 6)),
    "3-6-12": Run((3, 6, 12)),
    "plain": Run((6,), DEEP),
    "plain, 2/3 of the layers": Run((6,), ("--model.num_hidden_layers", str(SHALLOW_LAYERS))),
    "plain, longer": Run((6,), DEEP, start="plain"),
    "A-ViT": Run((6,), start="plain", model_type="avit"),
    "A-ViT, no prior": Run((6,), ("--model.prior_loss_weight", "0"), start="plain", model_type="avit"),
}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run that is done: accuracy (%) and cost of its answers, and its training log."""

    folder: Path
    dataset: str

    @functools.cached_property
    def results(self) -> dict[str, Any]:
        return json.loads((self.folder / "results.json").read_text())

    @property
    def top1(self) -> list[float]:
        return self.results["history"][-1]["results"]["weights"]["top1"]

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        return AutoModelForImageClassification.from_pretrained(self.folder / "last")

    @property
    def alpha(self) -> float:
        """The recycling weight of the last stage."""
        return next(value.item() for name, value in [*self.model.named_parameters()][::-1] if name.endswith("alpha"))

    @property
    def mean_depth(self) -> float:
        return self.results["history"][-1]["results"]["weights"]["mean_depth"]

    @functools.cached_property
    def _answers(self) -> dict[str, StageAnswers]:
        return {}

    def answers(self, criterion: str = "topk_entropy") -> StageAnswers:
        """Of every stage to every test image, measured once for each criterion."""
        if criterion not in self._answers:
            self._answers[criterion] = self._measure(criterion)
        return self._answers[criterion]

    def _measure(self, criterion: str) -> StageAnswers:
        self.model.config.exit_criterion = criterion
        self.model.config.threshold = 0.0 if "entropy" in criterion else 1.0
        processor = AutoImageProcessor.from_pretrained(self.folder / "last")
        return evaluate_thresholds(self.model, self.dataset, processor, split="test", batch_size=250, progress=False)[0]

    def curve(self, criterion: str = "topk_entropy") -> tuple[np.ndarray, np.ndarray]:
        """Mean multiply-accumulates and accuracy (%) at every τ that exits differently, by ascending cost."""
        answers = self.answers(criterion)
        rows = [answers.row(threshold) for threshold in distinct_thresholds(answers, 200)]
        points = sorted({(row["gmacs"], row["top1"]) for row in rows})
        return np.array([cost for cost, _ in points]), np.array([top1 for _, top1 in points])


def area_between(one: Trained, other: Trained, criteria: tuple[str, str] = ("topk_entropy",) * 2) -> float:
    """Mean difference in accuracy (points) between two curves, over the multiply-accumulates that both reach."""
    curves = [run.curve(criterion) for run, criterion in zip((one, other), criteria)]
    low, high = max(cost[0] for cost, _ in curves), min(cost[-1] for cost, _ in curves)
    costs = np.linspace(low, high, 400)
    first, second = (np.interp(costs, *curve) for curve in curves)
    return float((first - second).mean())


Runs = dict[str, Trained]  # of one seed


@dataclasses.dataclass(frozen=True)
class Claim:
    """
    Attributes:
        text, paper (`str`): what is claimed, and the paper's own numbers.
        needs (`tuple[str]`): the runs that are compared.
        difference (`Callable`): points by which the claim holds, of the runs of one seed.
        above (`float`): points that the difference must be above; negative where the claim is that little is lost.
    """

    text: str
    paper: str
    needs: tuple[str, ...]
    difference: Callable[[Runs], float]
    above: float = 0.0


def last_answers(one: str, other: str) -> Callable[[Runs], float]:
    return lambda runs: runs[one].top1[-1] - runs[other].top1[-1]


def area(one: str, other: str) -> Callable[[Runs], float]:
    return lambda runs: area_between(runs[one], runs[other])


def signal(rival: str) -> Callable[[Runs], float]:
    return lambda runs: area_between(runs["3-6"], runs["3-6"], ("entropy", rival))


NO_NUMBER = "-"
CLAIMS = [
    Claim(
        "wider thinking beats one more round: 3-6 over 3-3, last answers",
        NO_NUMBER,
        ("3-6", "3-3"),
        last_answers("3-6", "3-3"),
    ),
    Claim("... and two more rounds: 3-6 over 3-3-3", NO_NUMBER, ("3-6", "3-3-3"), last_answers("3-6", "3-3-3")),
    Claim(
        "recycling helps: α learned over α = 0, last answers",
        NO_NUMBER,
        ("3-6", "3-6 alpha 0"),
        last_answers("3-6", "3-6 alpha 0"),
    ),
    Claim(
        "the first stage of 3-6 over a plain net trained as long",
        NO_NUMBER,
        ("3-6", "3"),
        lambda runs: runs["3-6"].top1[0] - runs["3"].top1[0],
    ),
    Claim(
        "the second stage gains over the first, 3-6",
        "81.44 over 74.5 (published weights, τ = 0 and 5)",
        ("3-6",),
        lambda runs: runs["3-6"].top1[-1] - runs["3-6"].top1[0],
    ),
    Claim("2-3-6 over 3-6, mean over the shared compute", NO_NUMBER, ("2-3-6", "3-6"), area("2-3-6", "3-6")),
    Claim("3-6-12 over 3-6, mean over the shared compute", NO_NUMBER, ("3-6-12", "3-6"), area("3-6-12", "3-6")),
    *(
        Claim(f"entropy over {rival} as exit signal, mean over the compute", NO_NUMBER, ("3-6",), signal(rival))
        for rival in ("topk_entropy", "max_probability", "margin")
    ),
    Claim(
        "A-ViT over a plain net of 2/3 of the layers",
        "1.4 (A-ViT-T at 7.23 of 12 layers over DeiT-T of 8)",
        ("A-ViT", "plain, 2/3 of the layers"),
        last_answers("A-ViT", "plain, 2/3 of the layers"),
    ),
    Claim(
        "A-ViT loses less than 1 point to the same net without halting, trained as long",
        "-0.3 (71.0 and 71.3, DeiT-T)",
        ("A-ViT", "plain, longer"),
        last_answers("A-ViT", "plain, longer"),
        above=-1.0,
    ),
    Claim(
        "the distributional prior helps A-ViT",
        NO_NUMBER,
        ("A-ViT", "A-ViT, no prior"),
        last_answers("A-ViT", "A-ViT, no prior"),
    ),
]


def folder_of(output_dir: Path, name: str, seed: int) -> Path:
    return output_dir / f"{name.replace(',', '').replace('/', '-').replace(' ', '-')}-seed-{seed}"


def train_run(name: str, seed: int, arguments: argparse.Namespace, flags: list[str]) -> None:
    run, folder = RUNS[name], folder_of(arguments.output_dir, name, seed)
    if (folder / "done").exists():
        return
    config = CONFIGS / f"{run.model_type}_{arguments.data}.yaml"
    model = parse_config(["--config", str(config)]).model
    heads = model.get("num_attention_heads") or max(model["thinking_stages"])
    size = ["--model.hidden_size", model["hidden_size"] // heads * max(run.stages)]
    if run.model_type == "thinkingvit":
        size += ["--model.thinking_stages", list(run.stages)]
    else:
        size += ["--model.num_hidden_layers", HALTING_LAYERS]
    words = ["--config", config, *size, *run.flags, *flags]
    words += ["--seed", seed, "--output_dir", folder, "--resume", "auto", "--eval_split", "test"]
    if arguments.dataset is not None:
        words += ["--dataset", arguments.dataset]
    if run.start is not None:
        start = folder_of(arguments.output_dir, run.start, seed)
        if not (start / "vit").exists():
            last = AutoModelForImageClassification.from_pretrained(start / "last")
            last.extract_stage(last.config.num_stages - 1).save_pretrained(start / "vit")
        words += ["--from_vit", start / "vit"]
    print(f"{name}, seed {seed}", flush=True)
    train(parse_config([str(word) for word in words]))
    (folder / "done").touch()


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def verdict(values: list[float], above: float = 0.0) -> str:
    mean, error = mean_and_error([value - above for value in values])
    if len(values) < 2:
        return "one seed"
    bound = stats.t.ppf(0.95, len(values) - 1) * error
    return "seen" if mean > bound else "opposite" if mean < -bound else "not seen"


def tables(runs: dict[int, Runs]) -> str:
    """Accuracy of every run, and every claim; of the seeds for which all that it needs is done."""
    lines = ["| run | seeds | top-1 (%) of each stage | α of the last stage | mean depth |", "|---|---|---|---|---|"]
    for name, run in RUNS.items():
        done = [found[name] for found in runs.values() if name in found]
        if not done:
            continue
        top1 = [
            "{:.2f} ± {:.2f}".format(*mean_and_error(list(values))) for values in zip(*(each.top1 for each in done))
        ]
        alphas = ", ".join(f"{each.alpha:.2f}" for each in done) if len(run.stages) > 1 else ""
        depth = f"{statistics.fmean(each.mean_depth for each in done):.2f}" if run.model_type == "avit" else ""
        lines.append(f"| {name} | {len(done)} | {', '.join(top1)} | {alphas} | {depth} |")
    lines += ["", "| claim | paper | here, points ± standard error | each seed | verdict |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        values = [claim.difference(found) for found in runs.values() if all(name in found for name in claim.needs)]
        if values:
            shown, each = "{:+.2f} ± {:.2f}".format(*mean_and_error(values)), ", ".join(f"{v:+.2f}" for v in values)
            lines.append(f"| {claim.text} | {claim.paper} | {shown} | {each} | {verdict(values, claim.above)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other flags are those of `examples/train.py`, for every run.",
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--data", default="digits", choices=("digits", "cifar10"), help="whose configurations to use")
    parser.add_argument("--dataset", help="Hub id or folder, where not that of the configurations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(RUNS), help="runs to train")
    parser.add_argument("--table", action="store_true", help="print what is there without training")
    arguments, flags = parser.parse_known_args()
    torch.manual_seed(0)
    for seed in arguments.seeds:
        for name in RUNS:
            if not arguments.table and name in (arguments.only or RUNS):
                train_run(name, seed, arguments, flags)
    dataset = (
        arguments.dataset or parse_config(["--config", str(CONFIGS / f"thinkingvit_{arguments.data}.yaml")]).dataset
    )
    found: dict[int, Runs] = {seed: {} for seed in arguments.seeds}
    for seed in arguments.seeds:
        for name in RUNS:
            folder = folder_of(arguments.output_dir, name, seed)
            if (folder / "done").exists():
                found[seed][name] = Trained(folder, dataset)
                write_training_log(folder, arguments.output_dir / "logs" / f"{folder.name}.csv")
    print(tables(found))


if __name__ == "__main__":
    main()
