"""
Token pruning against plain models of the same size, in one run:

    python -m benchmarks.pruning --batch-size 16
    python -m benchmarks.pruning --batch-size 64 256 --dtype bfloat16 --device cuda --compile

Pixels in, logits out, 224 × 224, random weights; the models take turns, and the median of the ratios over the repeats
counts. First DynamicViT DeiT-S against Transformers' `ViTForImageClassification` of the same size, which is how DeiT
without distillation runs there. The goal is a speedup of 0.92 times the ratio of multiply-accumulates. Then ThinkingViT
3 → 6 with and without pruning of its second stage, for several shares of images that go on to it.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.avit import plain_macs
from benchmarks.measure import add_run_arguments, describe_run, measure, median_and_quartiles
from benchmarks.rivals import plain_vit
from hf_thinkingvit import ThinkingViTConfig, ThinkingViTForImageClassification
from hf_thinkingvit.evaluation import published_stage_macs, stage_macs


LAYERS = [3, 6, 9]
HEADS = 6
GOAL = 0.92


def thinkingvit(stages: list[int], keep_rate: float | None = None) -> ThinkingViTForImageClassification:
    """A ThinkingViT of DeiT proportions with random weights; pruned where there is a rate."""
    pruning = {} if keep_rate is None else {"pruning_layers": LAYERS, "pruning_keep_rate": keep_rate}
    return ThinkingViTForImageClassification(ThinkingViTConfig(thinking_stages=stages, num_labels=1000, **pruning))


def threshold_for(model: ThinkingViTForImageClassification, pixel_values: torch.Tensor, share: float) -> float:
    """The τ at which `share` of these images go on to the second stage."""
    entropies = model(pixel_values, max_stages=1).entropy.double().sort().values
    staying = len(entropies) - round(share * len(entropies))
    if staying == 0:
        return 0.0
    below, above = entropies[staying - 1], entropies[min(staying, len(entropies) - 1)]
    return ((below + above) / 2).item()


def print_row(name: str, batch_size: int, seconds: dict[str, list[float]], macs: float) -> None:
    """One row: `seconds` of `ours` and of the `rival` in turns, and how many times more multiply-accumulates it has."""
    ms = {rival: statistics.median(values) * 1e3 / batch_size for rival, values in seconds.items()}
    speedups = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["rival"])]
    reached = statistics.median(speedups) / macs
    print(
        f"| {name} | {batch_size} | {ms['rival']:.3g} | {ms['ours']:.3g} | {median_and_quartiles(speedups)} | "
        f"{macs:.3f} | {reached:.2f} |",
        flush=True,
    )


@torch.no_grad()
def compare(arguments: argparse.Namespace, prepare: Callable, batch_size: int) -> None:
    """The rows of one batch size. `prepare` moves a model to the device and dtype, and compiles it if asked to."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    pixel_values = torch.randn(batch_size, 3, 224, 224, device=device, dtype=dtype)
    plain = prepare(plain_vit(HEADS))
    for keep_rate in arguments.keep_rate:
        pruned = prepare(thinkingvit([HEADS], keep_rate), batch_size)
        macs = plain_macs(HEADS) / published_stage_macs(pruned.config)[0]
        calls = {"ours": partial(pruned, pixel_values), "rival": partial(plain, pixel_values)}
        seconds = measure(calls, arguments.repeats, device)
        print_row(f"DynamicViT DeiT-S at {keep_rate} / ViT-S", batch_size, seconds, macs)
        if not arguments.compile:
            calls["rival"] = partial(prepare(thinkingvit([HEADS])), pixel_values)
            seconds = measure(calls, arguments.repeats, device)
            own_macs = stage_macs(ThinkingViTConfig(thinking_stages=[HEADS], num_labels=1000))[0]
            macs = own_macs / stage_macs(pruned.config)[0]
            print_row(f"DynamicViT DeiT-S at {keep_rate} / ours unpruned", batch_size, seconds, macs)
    staged = thinkingvit([3, 6])
    pruned = thinkingvit([3, 6], arguments.staged_keep_rate)
    pruned.load_state_dict(staged.state_dict(), strict=False)
    staged, pruned = prepare(staged, batch_size), prepare(pruned, batch_size)
    for share in arguments.shares:
        threshold = threshold_for(staged, pixel_values, share)
        call = {"threshold": threshold}
        going_on = (staged(pixel_values, **call).exit_stage == 1).float().mean().item()
        first, second = stage_macs(staged.config)
        macs = (first + going_on * second) / (first + going_on * stage_macs(pruned.config)[1])
        calls = {"ours": partial(pruned, pixel_values, **call), "rival": partial(staged, pixel_values, **call)}
        seconds = measure(calls, arguments.repeats, device)
        name = f"ThinkingViT 3 → 6 at {arguments.staged_keep_rate} / unpruned, {going_on:.0%} go on"
        print_row(name, batch_size, seconds, macs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, repeats=11)
    parser.add_argument("--keep-rate", type=float, nargs="+", default=[0.7], help="of DynamicViT")
    parser.add_argument("--staged-keep-rate", type=float, default=0.8, help="of ThinkingViT")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.36, 1.0], help="of images that go on")
    parser.add_argument("--compile", action="store_true", help="compile all models; on CUDA with CUDA graphs")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    options = {"mode": "reduce-overhead"} if device.type == "cuda" else {}

    def prepare(model: torch.nn.Module, batch_size: int | None = None) -> torch.nn.Module:
        model = model.to(device, dtype).eval()
        if arguments.compile and batch_size is None:
            model = torch.compile(model, dynamic=False, **options)
        elif arguments.compile:
            sizes = sorted({batch_size, *(max(1, round(share * batch_size)) for share in arguments.shares)})
            model.compile_stages(sizes, **options)
        return model

    torch.manual_seed(0)
    print(describe_run(device, arguments.dtype))
    print("| models | batch | rival, ms per image | ours | throughput: rival = 1 | by MACs | of that |")
    print("|---|---|---|---|---|---|---|")
    for batch_size in arguments.batch_size:
        compare(arguments, prepare, batch_size)


if __name__ == "__main__":
    main()
