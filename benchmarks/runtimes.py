"""
The stages in each runtime against plain ViTs in the same runtime and precision, in one process, taking turns:

    python -m benchmarks.runtimes --picture outputs/runtimes.png
    python -m benchmarks.runtimes --runtimes openvino:bf16 --batch-size 16

Pixels in, logits out, 224 × 224, random weights, on the CPU. A plain ViT is Transformers', exported by the same
exporter and loaded with the same options. Its time is that of the runtime alone; ours has the loop, the exit rule and,
for shares of images that go on, the engine with its queues. Times are medians over the repeats, ratios medians of the
ratios within a repeat. Each τ lies between the entropies of the images, so the shares are exact and need no trained
weights. Goals: the first stage is no slower than ViT-Tiny, all stages no slower than ViT-Tiny and ViT-Small one after
the other, and a share of 0.36 is 1.9 times as fast as all stages for every image.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
import torch
from torch import nn

from benchmarks.inference import SINGLE_IMAGES, spread_entropies, threshold_for_share
from benchmarks.measure import describe_run, measure, median_and_quartiles
from benchmarks.rivals import FAMILIES, plain_vit
from hf_thinkingvit.inference import AdaptiveEngine, ExportedModel, export_model, from_exported
from hf_thinkingvit.inference.runtimes import RUNTIMES
from hf_thinkingvit.inference.runtimes.quantisation import quantise_stages
from hf_thinkingvit.inference.runtimes.torch_program import StageProgram, load_program
from hf_thinkingvit.inference.runtimes.writing import SUFFIXES, write_openvino
from hf_thinkingvit.torch_free.programs import Output, ProgramFile


matplotlib.use("Agg")
from matplotlib import pyplot as plt


WAYS = ("openvino:fp32", "openvino:bf16", "openvino:int8", "onnxruntime:fp32", "onnxruntime:int8")
SHARE = 0.36
FIRST, ALL, SHARED = "first stage", "all stages", f"engine, share {SHARE}"
GOALS = {FIRST: 1.0, ALL: 1.0, SHARED: 1.9}
RIVALS = {FIRST: "ViT-Tiny", ALL: "ViT-Tiny + ViT-Small", SHARED: "engine, all stages"}


class LogitsOf(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


@torch.no_grad()
def plain_program(
    heads: int, runtime: str, precision: str, calibration: torch.Tensor, folder: Path, options: dict
) -> StageProgram:
    """A plain ViT in the runtime, with what `export_model` and `from_exported` do for a stage."""
    model = LogitsOf(plain_vit(heads).eval())
    file_format, state = RUNTIMES[runtime].file_format, {"pixel_values": torch.zeros(2, 3, 224, 224)}
    model.model.set_attn_implementation("sdpa" if file_format == "openvino" else "eager")
    batch = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, tuple(state.values()), dynamic_shapes=batch)
    stage = ProgramFile(f"vit_{heads}{SUFFIXES[file_format]}", [Output("logits", [1000], "float32", False)], [])
    if file_format == "openvino":
        write_openvino(program, state, folder / stage.file)
    else:
        names = {"input_names": list(state), "output_names": ["logits"]}
        torch.onnx.export(program, dynamo=True, verbose=False, **names).save(folder / stage.file)
    if precision == "int8":
        quantise_stages(folder, file_format, [stage], calibration, partial(load_program, RUNTIMES[runtime]))
    return load_program(RUNTIMES[runtime], folder / stage.file, stage.outputs, precision, options)


def our_model(runtime: str, precision: str, calibration: torch.Tensor, folder: Path, options: dict) -> ExportedModel:
    model = FAMILIES["thinkingvit"].build().eval()
    spread_entropies(model)
    stored = "int8" if precision == "int8" else "fp32"
    images = {"calibration": calibration} if precision == "int8" else {}
    export_model(model, folder / "ours", RUNTIMES[runtime].file_format, precision=stored, **images)
    return from_exported(folder / "ours", precision, **options)


def run_engine(engine: AdaptiveEngine, images: torch.Tensor) -> list:
    return list(engine(images))


def over(batches: list[torch.Tensor], *calls: Callable[[torch.Tensor], object]) -> Callable[[], object]:
    return lambda: [call(batch) for batch in batches for call in calls]


@torch.no_grad()
def compare(way: str, arguments: argparse.Namespace) -> dict[tuple[int, str], float]:
    """Print a way's table. Returns the median ratio of each measurement, by batch size and name."""
    runtime, precision = way.split(":")
    options: dict = {"threads": arguments.threads}
    if runtime == "onnxruntime":
        # Otherwise its idle threads spin on the cores that the other rivals are timed on.
        options["config"] = {"session.intra_op.allow_spinning": "0"}
    print(f"\n{runtime}, {precision}\n", flush=True)  # before the exports, which take a while
    torch.manual_seed(0)
    calibration = torch.randn(32, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder:
        tiny, small = (plain_program(heads, runtime, precision, calibration, Path(folder), options) for heads in (3, 6))
        ours = our_model(runtime, precision, calibration, Path(folder), options)
    print("| batch | | ms per image | throughput: rival = 1 | rival | goal |\n|---|---|---|---|---|---|", flush=True)
    ratios = {}
    for batch_size in arguments.batch_size:
        images = torch.randn(SINGLE_IMAGES if batch_size == 1 else arguments.images, 3, 224, 224)
        batches = list(images.split(batch_size))
        entropies = torch.cat([ours(batch, max_stages=1).entropy for batch in batches])

        def run_tiny(batch):
            return tiny({"pixel_values": batch})

        def run_small(batch):
            return small({"pixel_values": batch})

        engines = {
            "engine, all stages": AdaptiveEngine(ours, batch_size=batch_size, threshold=0.0),
            SHARED: AdaptiveEngine(ours, batch_size=batch_size, threshold=threshold_for_share(entropies, SHARE)),
        }
        calls = {
            "ViT-Tiny": over(batches, run_tiny),
            FIRST: over(batches, lambda batch: ours(batch, max_stages=1)),
            "ViT-Tiny + ViT-Small": over(batches, run_tiny, run_small),
            ALL: over(batches, lambda batch: ours(batch, threshold=0.0)),
            **{name: partial(run_engine, engine, images) for name, engine in engines.items()},
        }
        seconds = measure(calls, arguments.repeats, torch.device("cpu"))
        exact = engines[SHARED].stats.rows[1] / len(images)
        for name, values in seconds.items():
            per_image = statistics.median(values) / len(images) * 1e3
            rival = RIVALS.get(name)
            if rival is None:
                print(f"| {batch_size} | {name} | {per_image:.2f} | | | |", flush=True)
                continue
            each = [other / own for own, other in zip(values, seconds[rival])]
            ratios[batch_size, name] = statistics.median(each)
            reached = "reached" if ratios[batch_size, name] >= GOALS[name] else "missed"
            shown = f"engine, share {exact:.2f}" if name == SHARED else name
            print(
                f"| {batch_size} | {shown} | {per_image:.2f} | {median_and_quartiles(each)} | {rival} | "
                f"{GOALS[name]}, {reached} |",
                flush=True,
            )
    return ratios


def draw(ratios: dict[str, dict[tuple[int, str], float]], path: Path) -> None:
    """A panel for each measurement: a bar for each runtime and batch size, and a line at the goal."""
    figure, axes = plt.subplots(1, len(GOALS), figsize=(11, 3.4), layout="constrained")
    for axis, (name, goal) in zip(axes, GOALS.items()):
        bars = [
            (f"{way}\nbatch {size}", value)
            for way, found in ratios.items()
            for (size, measured), value in found.items()
            if measured == name
        ]
        axis.barh([label for label, _ in bars], [value for _, value in bars], color="tab:blue")
        axis.axvline(goal, color="black", linestyle="--", linewidth=1)
        axis.set_title(f"{name}\nthroughput, {RIVALS[name]} = 1", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtimes", nargs="+", choices=WAYS, default=list(WAYS), help="RUNTIME:PRECISION")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--images", type=int, default=64, help="of each measurement, at batch sizes above 1")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    packages = [__import__(package) for package in dict.fromkeys(way.split(":")[0] for way in arguments.runtimes)]
    versions = ", ".join(f"{package.__name__} {package.__version__}" for package in packages)
    print(f"{versions}, {describe_run(torch.device('cpu'), 'see the tables')}", flush=True)
    ratios = {way: compare(way, arguments) for way in arguments.runtimes}
    if arguments.picture is not None:
        draw(ratios, arguments.picture)


if __name__ == "__main__":
    main()
