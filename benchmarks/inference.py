"""
Adaptive models against the plain models that a user would otherwise run, in one process, taking turns:

    python -m benchmarks.inference --batch-size 1 16
    python -m benchmarks.inference --batch-size 16 --dtype bfloat16 --compile
    python -m benchmarks.inference --device cuda --dtype bfloat16 --batch-size 256 --compile

Pixels in, logits out, 224 × 224, random weights. Rivals are Transformers' plain models of the same sizes, timm's where
it is installed, and the official code's way of early exit: every stage for every image, and a selection afterwards. The
shares of images that go on to the second stage are the published ones at τ = 1.5, 1.0 and 0.5, and none and all. Each τ
is set between the entropies of the images, so the shares are exact and need no trained weights. t₁ is the time of the
first stage, t₂ the further time of all stages, r the share. Times are medians over the repeats, ratios are medians of
the ratios within a repeat. `--family avit` runs `python -m benchmarks.avit`.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks import avit
from benchmarks.measure import describe_run, measure, median_and_quartiles, peak_macs_per_second
from benchmarks.rivals import FAMILIES, Family
from hf_thinkingvit.evaluation import stage_macs
from hf_thinkingvit.inference import AdaptiveEngine


matplotlib.use("Agg")
from matplotlib import pyplot as plt


SHARES = (0.0, 0.18, 0.36, 0.59, 1.0)
# At batch size 1: the fewest images of which 36 % is a whole number.
SINGLE_IMAGES = 25


def threshold_for_share(entropies: torch.Tensor, share: float) -> float:
    """τ at which `share` of the images goes on: halfway between the two entropies on either side of it."""
    entropies = entropies.sort().values
    exits = round(len(entropies) * (1 - share))
    if exits == 0:
        return 0.0
    if exits == len(entropies):
        return 1e3
    return float((entropies[exits - 1] + entropies[exits]) / 2)


@torch.no_grad()
def spread_entropies(model: PreTrainedModel) -> None:
    """Enlarge the weights of embeddings and classifier: with the initial ones, all images have nearly one entropy."""
    for name, parameter in model.named_parameters():
        if "embeddings" in name or "classifier.weight" in name:
            parameter.normal_(std=0.3)


@dataclass
class Comparison:
    """The measurements at one batch size: the adaptive model, in each way of running it, and its rivals."""

    family: Family
    batch_size: int
    repeats: int
    device: torch.device
    dtype: torch.dtype
    compiles: bool
    num_images: int
    shares: list[float]
    lines: list[str] = field(default_factory=list)

    def __post_init__(self):
        torch.manual_seed(0)
        self.model = self._place(self.family.build())
        spread_entropies(self.model)
        self.plain = {name: self._place(build()) for name, build in self.family.plain.items()}
        self.images = torch.randn(self.num_images, 3, 224, 224)
        # The engine gets single images in host memory, as in use; all others get batches that are on the device.
        self.batches = self.images.to(self.device, self.dtype).split(self.batch_size)
        self.ways: dict[str, PreTrainedModel] = {"eager": self.model}
        if self.compiles:
            compiled = self._place(self.family.build())
            compiled.load_state_dict(self.model.state_dict())
            mode = {"mode": "reduce-overhead"} if self.device.type == "cuda" else {}
            compiled.compile_stages(sorted({1, self.batch_size // 4 or 1, self.batch_size}), **mode)
            self.ways["compiled"] = compiled
            self.plain |= {f"{name}, compiled": torch.compile(model, **mode) for name, model in self.plain.items()}

    def _place(self, model: nn.Module) -> nn.Module:
        return model.to(self.device, self.dtype).eval()

    def say(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line)

    def over_batches(self, *calls: Callable[[torch.Tensor], object]) -> Callable[[], object]:
        return lambda: [call(batch) for batch in self.batches for call in calls]

    @torch.no_grad()
    def run(self) -> dict[float, dict[str, list[float]]]:
        """Print the tables. Returns the seconds of each way of running, at each share."""
        self._fixed_costs()
        return self._shares()

    def _fixed_costs(self) -> None:
        rivals = {name: self.over_batches(model) for name, model in self.plain.items()}
        if len(self.family.both) > 1:
            both = [self.plain[name] for name in self.family.both]
            rivals[" + ".join(self.family.both)] = self.over_batches(*both)
        for name, model in self.ways.items():
            rivals[f"first stage, {name}"] = self.over_batches(lambda batch, model=model: model(batch, max_stages=1))
            rivals[f"all stages, {name}"] = self.over_batches(lambda batch, model=model: model(batch, threshold=0.0))
        seconds = measure(rivals, self.repeats, self.device)
        first, every = (seconds[" + ".join(names)] for names in (self.family.first, self.family.both))
        macs = stage_macs(self.model.config)
        peak = peak_macs_per_second(self.device, self.dtype)
        self.say(f"\nBatch {self.batch_size}. A large matrix product reaches {peak / 1e9:.0f} GMAC/s.\n")
        self.say("| | ms per image | images/s | throughput: rival = 1 | of the peak |\n|---|---|---|---|---|")
        for name, values in seconds.items():
            rival, cost = {"first": (first, macs[0]), "all": (every, sum(macs))}.get(name.split()[0], (None, None))
            per_image = statistics.median(values) / self.num_images
            ratio = "" if rival is None else median_and_quartiles([t / o for o, t in zip(values, rival)])
            share = "" if cost is None else f"{cost / per_image / peak:.0%}"
            self.say(f"| {name} | {per_image * 1e3:.2f} | {1 / per_image:.1f} | {ratio} | {share} |")
        names = dict.fromkeys(" + ".join(names) for names in (self.family.first, self.family.both))
        self.say(f"\nThe rival is {' or '.join(names)}, not compiled.")

    def _shares(self) -> dict[float, dict[str, list[float]]]:
        entropies = torch.cat([self.model(batch, max_stages=1).entropy for batch in self.batches])
        results = {}
        self.say("\n| r | way | ms per image | time / (t₁ + r·t₂) | throughput: select after = 1 |")
        self.say("|---|---|---|---|---|")
        for share in self.shares:
            threshold = threshold_for_share(entropies, share)
            seconds = measure(self._ways_at(threshold), self.repeats, self.device)
            goes_on = sum(self.model(batch, threshold=threshold).exit_stage.sum().item() for batch in self.batches)
            exact = goes_on / self.num_images
            for name, values in seconds.items():
                if name.startswith(("first", "all")):
                    continue
                kind = "compiled" if "compiled" in name else "eager"
                first, every = seconds[f"first, {kind}"], seconds[f"all, {kind}"]
                bound = [(1 - exact) * one + exact * both for one, both in zip(first, every)]
                slower = median_and_quartiles([value / limit for value, limit in zip(values, bound)])
                faster = median_and_quartiles([other / v for v, other in zip(values, seconds["select after"])])
                per_image = statistics.median(values) / self.num_images * 1e3
                slower = "" if name == "select after" else slower
                self.say(f"| {exact:.1%} | {name} | {per_image:.2f} | {slower} | {faster} |")
            results[exact] = seconds
        return results

    def _ways_at(self, threshold: float) -> dict[str, Callable[[], object]]:
        ways = {"select after": self.over_batches(lambda batch: self.family.select_after(self.model, batch, threshold))}
        for kind, model in self.ways.items():
            ways[f"first, {kind}"] = self.over_batches(lambda batch, model=model: model(batch, max_stages=1))
            ways[f"all, {kind}"] = self.over_batches(lambda batch, model=model: model(batch, threshold=0.0))
            forward = self.over_batches(lambda batch, model=model: model(batch, threshold=threshold))
            ways[f"forward, {kind}"] = forward
            if self.batch_size > 1:
                engine = AdaptiveEngine(model, batch_size=self.batch_size, threshold=threshold)
                ways[f"engine, {kind}"] = lambda engine=engine: list(engine(self.images))
        return ways

    def plot(self, results: dict[float, dict[str, list[float]]], path: Path) -> None:
        """Images per second against the share that goes on."""
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        shares = list(results)
        names = [name for name in results[shares[0]] if not name.startswith(("first", "all"))]
        for name in names:
            speeds = [self.num_images / statistics.median(results[share][name]) for share in shares]
            axes.plot(shares, speeds, marker="o", label=name)
        bounds = []
        for share in shares:
            first, every = (statistics.median(results[share][f"{part}, eager"]) for part in ("first", "all"))
            bounds.append(self.num_images / ((1 - share) * first + share * every))
        axes.plot(shares, bounds, color="black", linestyle=":", label="t₁ + r·t₂, eager")
        axes.set_xlabel("share of images that go on to the second stage")
        axes.set_ylabel("images per second")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=120)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=[*FAMILIES, "avit"], default="thinkingvit")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--num-images", type=int, help="of one measurement; by default 25 single ones or four batches")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="of images that go on")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="compiled models beside the others; takes minutes")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/benchmark"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    if arguments.family == "avit":
        avit.print_tables(list(avit.SIZES), arguments.batch_size, arguments.repeats, device, arguments.dtype)
        return
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    print(description := describe_run(device, arguments.dtype))
    for batch_size in arguments.batch_size:
        num_images = arguments.num_images or (SINGLE_IMAGES if batch_size == 1 else 4 * batch_size)
        family = FAMILIES[arguments.family]
        comparison = Comparison(
            family, batch_size, arguments.repeats, device, dtype, arguments.compile, num_images, arguments.shares
        )
        results = comparison.run()
        name = f"{arguments.family}-{device.type}-{arguments.dtype}-{batch_size}"
        (arguments.output_dir / f"{name}.md").write_text("\n".join([description, *comparison.lines, ""]), "utf-8")
        comparison.plot(results, arguments.output_dir / f"{name}.png")
        print(f"\n{arguments.output_dir / name}.md and .png")


if __name__ == "__main__":
    main()
