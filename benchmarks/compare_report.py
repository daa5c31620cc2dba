"""What `benchmarks.compare` makes of finished runs: the speed of each method, tables and a picture."""

import csv
import json
import statistics
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare_methods import METHODS
from benchmarks.compare_picture import draw
from benchmarks.compare_runs import Job, load_model, points_of_seeds
from benchmarks.measure import describe_run, measure
from hf_thinkingvit.auto import AutoImageProcessor
from hf_thinkingvit.data import as_image_split, evaluation_batches, load_splits
from hf_thinkingvit.evaluation.plots import save_figure


SHOWN = 6  # operating points of a method in the table, and that are timed


def by_method(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    """The finished jobs of each method that is reported, in the order of the method table."""
    return {name: found for name, m in METHODS.items() if not m.is_step and (found := _of(jobs, name))}


def _of(jobs: Sequence[Job], method: str) -> list[Job]:
    return [job for job in jobs if job.method == method]


def read(job: Job) -> dict[str, Any]:
    return json.loads(job.result.read_text(encoding="utf-8"))


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard error of the mean; `None` of a single value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def mean_points(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """
    The operating points of a method, each averaged over the seeds, in the order of their cost. Of neighbours that no
    image tells apart (thresholds between which there is no score), the first.
    """
    points, seen = [], set()
    for same in zip(*points_of_seeds(jobs), strict=True):
        costs, accuracies = [point["gmacs"] for point in same], [point["top1"] for point in same]
        if (key := (*costs, *accuracies)) in seen:
            continue
        seen.add(key)
        top1, error = spread(accuracies)
        at = {name: same[0][name] for name in ("threshold", "fields") if name in same[0]}
        gmacs, gmacs_error = spread(costs)
        points.append({**at, "top1": top1, "top1_se": error, "gmacs": gmacs, "gmacs_se": gmacs_error})
    return sorted(points, key=lambda point: point["gmacs"])


def shown_points(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `SHOWN` of the points: the cheapest, the dearest, and those nearest to even steps between."""
    low, high = points[0]["gmacs"], points[-1]["gmacs"]
    goals = [low + (high - low) * step / (SHOWN - 1) for step in range(SHOWN)]
    nearest = (min(points, key=lambda point: abs(point["gmacs"] - goal)) for goal in goals)
    return [*{id(point): point for point in nearest}.values()]


def setting(point: dict[str, Any]) -> str:
    if "threshold" in point:
        return f"τ = {point['threshold']:.12g}"  # all its digits: thresholds just below 1 are settings of their own
    return ", ".join(f"{name} = {value:g}" for name, value in point["fields"].items()) or "-"


@torch.no_grad()
def measure_speed(
    jobs: Sequence[Job], images: int, batch_size: int, repeats: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """
    Images per second of each method at the points of the table, of the first seed's models, in float32: median of the
    repeats, in which all methods and points take turns.
    """
    calls, batches = {}, None
    for name, found in by_method(jobs).items():
        job = found[0]
        if batches is None:  # one data set and one image processor for all
            base = job.base
            columns = base.image_column, base.label_column
            split = as_image_split(load_splits(base.dataset)[base.eval_split], base.dataset, *columns)
            processor = AutoImageProcessor.from_pretrained(job.model)
            read_batches = evaluation_batches(split.sample(images), processor, batch_size)
            batches = [batch["pixel_values"].to(device) for batch in islice(read_batches, images)]
        for point in shown_points(mean_points(found)):
            model = load_model(job.model, point.get("fields", {}), device)
            arguments = {"threshold": point["threshold"]} if "threshold" in point else {}
            calls[name, setting(point)] = _over(batches, model, arguments)
    count = sum(map(len, batches or ()))
    seconds = measure(calls, repeats, device)
    speeds: dict[str, dict[str, float]] = {}
    for (name, point), values in seconds.items():
        speeds.setdefault(name, {})[point] = count / statistics.median(values)
    return speeds


def _over(batches: list[torch.Tensor], model: Any, arguments: dict[str, Any]) -> Any:
    return lambda: [model(batch, **arguments) for batch in batches]


def declaration(jobs: Sequence[Job]) -> dict[str, Any]:
    """
    Images seen and multiply-accumulates of training of one seed, its own and those of what it starts from; `None` of a
    model that was given.
    """
    images, spent = cost_of(jobs[0])
    before: tuple[int | None, float | None] = (0, 0.0) if images is not None else (None, None)
    start = jobs[0].start
    while start is not None:
        cost = cost_of(start)
        before = tuple(None if None in pair else sum(pair) for pair in zip(before, cost))
        start = start.start
    return {
        "images": images,
        "training_tmacs": spent,
        "pretraining_images": before[0],
        "pretraining_tmacs": before[1],
    }


def cost_of(job: Job) -> tuple[int | None, float | None]:
    """Images seen, and 10¹² multiply-accumulates; of a model that was given, nothing is known."""
    if job.trained is not None:
        return None, None
    facts = read(job)
    return facts["images_seen"], facts["training_macs_per_image"] * facts["images_seen"] / 1e12


def write_report(jobs: Sequence[Job], speeds: dict[str, dict[str, float]], output_dir: Path) -> str:
    """Write `compare.md`, `.csv`, `.json`, `.png` and `.svg`. Returns the Markdown."""
    results = {}
    for name, found in by_method(jobs).items():
        points = mean_points(found)
        for point in points:
            point["images_per_second"] = speeds.get(name, {}).get(setting(point))
        facts = {"title": METHODS[name].title, "seeds": [job.seed for job in found], **declaration(found)}
        facts["evaluated_images"] = read(found[0])["images"]
        results[name] = {**facts, "points": points}
    (output_dir / "compare.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    columns = ["gmacs", "gmacs_se", "top1", "top1_se", "images_per_second"]
    with (output_dir / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "setting", *columns])
        for name, result in results.items():
            writer.writerows([name, setting(p), *(p[column] for column in columns)] for p in result["points"])
    text = _markdown(results, ", ".join({read(job)["device"]: None for job in jobs if not job.trained}) or "-")
    (output_dir / "compare.md").write_text(text + "\n", encoding="utf-8")
    if results:
        save_figure(draw(results), output_dir / "compare.png")
    return text


def _number(value: float | None, places: int, error: float | None = None) -> str:
    if value is None:
        return ""
    return f"{value:.{places}f}" + ("" if error is None else f" ± {error:.{places}f}")


def _markdown(results: dict[str, dict], device: str) -> str:
    lines = [f"Trained on: {device}. {describe_run(torch.device('cpu'), 'evaluated in float32')}"]
    lines += [
        "| method | seeds | images seen | training TMACs | images before | TMACs before |",
        "|---|---|---|---|---|---|",
    ]
    for result in results.values():
        names = ("images", "training_tmacs", "pretraining_images", "pretraining_tmacs")
        costs = [result[name] for name in names]
        costs = [
            "unknown" if cost is None else f"{cost:.3g}" if isinstance(cost, float) else str(cost) for cost in costs
        ]
        lines.append(f"| {result['title']} | {len(result['seeds'])} | {' | '.join(costs)} |")
    lines += ["", "| method | setting | mean MMACs | top-1 (%) | images/s |", "|---|---|---|---|---|"]
    for result in results.values():
        for point in shown_points(result["points"]):
            cost = _number(1e3 * point["gmacs"], 2)
            top1, speed = _number(point["top1"], 2, point["top1_se"]), _number(point["images_per_second"], 0)
            lines.append(f"| {result['title']} | {setting(point)} | {cost} | {top1} | {speed} |")
    lines.append(
        "\nMean over the seeds ± standard error. The settings of a method are those nearest to even steps in cost."
    )
    return "\n".join(lines)
