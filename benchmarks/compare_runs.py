"""One method with one seed: its configuration, training, and the evaluation of every operating point in one pass."""

import dataclasses
import json
import math
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification, PreTrainedModel

from benchmarks.compare_methods import METHODS, Sizes, method_fields
from hf_thinkingvit import ElasticViTForImageClassification
from hf_thinkingvit.auto import AutoImageProcessor
from hf_thinkingvit.data import ImageSplit, as_image_split, evaluation_batches, load_splits
from hf_thinkingvit.evaluation import (
    LabelMap,
    StageAnswers,
    collect_stage_answers,
    evaluate_accuracy,
    stage_macs,
    sub_network_macs,
)
from hf_thinkingvit.evaluation.calibration import threshold_grid
from hf_thinkingvit.evaluation.threshold_points import distinct_thresholds
from hf_thinkingvit.models.configuration_staged import thinks_in_stages
from hf_thinkingvit.training import TrainingConfig
from hf_thinkingvit.training.loop import TrainingRun
from hf_thinkingvit.training.memory_images import load_in_memory


COUNTED_IMAGES = 4  # of a batch whose multiply-accumulates are counted
IMPORTANCE_IMAGES = 512  # on which DynaBERT's heads and neurons are ordered
THRESHOLD_STEPS = 48


@dataclasses.dataclass(frozen=True)
class Job:
    """
    Attributes:
        method (`str`), seed (`int`): what is trained.
        base (`TrainingConfig`): of the run of a ThinkingViT, of which a method changes some fields.
        output_dir (`Path`): of the comparison.
        fine_tuning_epochs (`int`): of methods that start from another one.
        given (`dict`): folders of models, by method, that are evaluated and started from instead of training them.
        threads (`int`): of the CPU.
        data (`str`): "cifar10" or "imagenet", for which the methods' shipped configurations are taken.
        rows (`dict`): images of each split of the data set.
    """

    method: str
    seed: int
    base: TrainingConfig
    output_dir: Path
    fine_tuning_epochs: int
    given: dict[str, Path] = dataclasses.field(default_factory=dict)
    threads: int = 1
    data: str = "cifar10"
    rows: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.method}-seed-{self.seed}"

    @property
    def folder(self) -> Path:
        return self.output_dir / self.name

    @property
    def trained(self) -> Path | None:
        return self.given.get(self.method)

    @property
    def model(self) -> Path:
        return self.trained or self.folder / "last"

    @property
    def settings(self) -> Path:
        return self.folder / "settings.json"

    @property
    def training(self) -> Path:
        return self.folder / "training.json"

    @property
    def answers(self) -> Path:
        return self.folder / "answers.pt"

    @property
    def result(self) -> Path:
        return self.folder / "points.json"

    @property
    def begun(self) -> bool:
        """Whether there is anything that training or evaluation has left."""
        return any((self.folder / name).exists() for name in ("points.json", "training.json", "checkpoints"))

    @property
    def start(self) -> "Job | None":
        start = None if self.trained else METHODS[self.method].start
        return None if start is None else dataclasses.replace(self, method=start)


def run_config(job: Job, start: Path | None = None) -> TrainingConfig:
    """The configuration of a job's run, which starts from the model in `start`."""
    method, base, sizes = METHODS[job.method], job.base, Sizes.of(job.base.model)
    epochs = base.epochs if start is None else max(1, math.ceil(method.epochs * job.fine_tuning_epochs))
    share = epochs / base.epochs
    fields: dict[str, Any] = {
        "model_type": method.model_type,
        "model": method.model(sizes),
        "seed": job.seed,
        "epochs": epochs,
        "output_dir": str(job.folder),
        "resume": "auto",
        "from_vit": None,
        "from_pretrained": None,
        "warmup_epochs": share * base.warmup_epochs,
        "cooldown_epochs": round(share * base.cooldown_epochs),
        # The last epoch is reported, and every operating point evaluated afterwards.
        "eval_epochs": epochs + base.cooldown_epochs,
        "max_eval_samples": base.eval_batch_size,
        **method_fields(job.method, job.data, epochs),
    }
    if start is not None:
        fields["from_vit" if method.start_as == "vit" else "from_pretrained"] = str(start)
        fields["teacher"] = str(start) if method.teacher else None
    return dataclasses.replace(base, **fields)


def prepare_start(job: Job) -> Path | None:
    """The folder of the model that a job's run starts from, made from that of the method it names."""
    method, start = METHODS[job.method], job.start
    if start is None:
        return None
    if method.start_as == "model":
        return start.model
    processor = AutoImageProcessor.from_pretrained(start.model)
    model = AutoModelForImageClassification.from_pretrained(start.model).extract_stage(0)
    if method.start_as == "rewired":
        columns = job.base.image_column, job.base.label_column
        split = as_image_split(load_splits(job.base.dataset)[job.base.train_split], job.base.dataset, *columns)
        batch = next(iter(evaluation_batches(split.sample(IMPORTANCE_IMAGES), processor, IMPORTANCE_IMAGES)))
        sub_networks = method.model(Sizes.of(job.base.model))["sub_networks"]
        options = {"reorder": "importance", "sub_networks": sub_networks}
        model = ElasticViTForImageClassification.from_vit(model, **batch, **options)
    folder = job.folder / "start"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def count_training_macs(run: TrainingRun) -> float:
    """
    Multiply-accumulates in matrix products of a training step for each image, of teachers too: the mean over the steps
    of the whole run, each of which computes what its sampler draws. Attention runs as plain products, because the
    counter knows only some of the fused kernels. Weights and gradients are left as they are.
    """
    device, micro_batches = run.accelerator.device, run.config.gradient_accumulation_steps
    size = run.model_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(COUNTED_IMAGES, 3, height, width, device=device)
    labels = torch.arange(COUNTED_IMAGES, device=device) % run.model_config.num_labels
    model = run.accelerator.unwrap_model(run.model, keep_torch_compile=False).train()
    steps = [(step, part) for step in range(run.num_steps) for part in range(micro_batches)]
    counted: dict[str, int] = {}  # by the arguments that a step's sampler draws
    total = 0
    for step, part in steps:
        arguments = run.loss.model_arguments(step, part)
        if repr(arguments) not in counted:
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                outputs = model(images, labels=labels, **arguments)
                loss, _ = run.loss(outputs, images, labels, step, part)
                loss.backward()
            counted[repr(arguments)] = counter.get_total_flops()
        total += counted[repr(arguments)]
    run.optimizer.zero_grad()
    return total / 2 / (len(steps) * COUNTED_IMAGES)


def load_model(folder: Path, fields: dict[str, Any], device: torch.device) -> PreTrainedModel:
    """A trained model at an operating point."""
    return AutoModelForImageClassification.from_pretrained(folder, **fields).to(device).eval()


def read_images(
    split: ImageSplit, processor: Any, base: TrainingConfig, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches for evaluation; with `in_memory`, of images that were decoded once for all runs."""
    if not base.in_memory:
        for batch in evaluation_batches(split, processor, base.eval_batch_size, base.num_workers):
            yield {name: entry.to(device) for name, entry in batch.items()}
        return
    images = load_in_memory(split)
    if images.skipped.any():
        raise ValueError(
            f"An evaluation image of `{split.name}` cannot be decoded, which would change what is measured."
        )
    for pixels, labels in zip(images.pixels.split(base.eval_batch_size), images.labels.split(base.eval_batch_size)):
        pixels = processor(pixels.permute(0, 2, 1, 3), return_tensors="pt")["pixel_values"]
        yield {"pixel_values": pixels.to(device), "labels": labels.to(device)}


def evaluate_points(job: Job, device: torch.device) -> dict[str, Any]:
    """Accuracy (%) and mean GMACs of every operating point, from one pass over the images."""
    method, base = METHODS[job.method], job.base
    processor = AutoImageProcessor.from_pretrained(job.model)
    model = load_model(job.model, {}, device)
    # The run's mixed precision is part of Accelerate's global state, and scores are measured in float32.
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    split = as_image_split(
        load_splits(base.dataset)[base.eval_split], base.dataset, base.image_column, base.label_column
    )
    split = split.sample(base.max_eval_samples)
    if method.points is None:
        labels = LabelMap(model.config, split.label_names, name=base.dataset)
        answers = collect_stage_answers(model, read_images(split, processor, base, device), labels, progress=False)
        fields = {field.name: getattr(answers, field.name) for field in dataclasses.fields(answers)}
        torch.save({**fields, "conditions": None}, job.answers)
        return {"images": len(answers)}
    overrides = method.points(model.config)
    models = {index: load_model(job.model, fields, device) for index, fields in enumerate(overrides)}
    measured = evaluate_accuracy(accelerator, models, read_images(split, processor, base, device))
    points = [
        {
            "fields": fields,
            "top1": measured[index]["top1"][-1],
            "gmacs": measured[index].get("macs", own_macs(models[index])) / 1e9,
        }
        for index, fields in enumerate(overrides)
    ]
    return {"images": measured[0]["images"], "points": points}


def read_answers(job: Job) -> StageAnswers:
    """Scores and hits of every stage, of which any τ can be evaluated."""
    return StageAnswers(**torch.load(job.answers, weights_only=True))


def operating_thresholds(answers: StageAnswers) -> list[float]:
    """
    A τ for every way in which the images can exit, where there are at most `THRESHOLD_STEPS` different scores (as of
    patience, which counts layers), and else at so many of their quantiles.
    """
    scores = answers.scores[:, :-1]
    values = scores[scores.isfinite()].unique()
    if len(values) > THRESHOLD_STEPS:
        return distinct_thresholds(answers, THRESHOLD_STEPS)
    if not torch.equal(values, values.round()):  # counts are exact; near other scores rounding would decide
        values = (values[1:].double() + values[:-1].double()) / 2
    grid = threshold_grid(answers)
    candidates = [grid[0], *sorted(values.tolist(), reverse=grid[0] > grid[-1]), grid[-1]]
    exits = answers.exit_stages_of_each(candidates)
    # Of equal neighbours the second, which is a count or lies beyond all of them.
    following = [torch.equal(*pair) for pair in pairwise(exits)]
    return [value for value, same in zip(candidates, [*following, False]) if not same]


def points_of_seeds(jobs: Sequence[Job]) -> list[list[dict[str, Any]]]:
    """
    The operating points of each seed of one method, the same ones in the same order: `top1` (%) and `gmacs` (mean of
    an image), with the `threshold` or the `fields` that are overridden.
    """
    if METHODS[jobs[0].method].points is not None:
        return [json.loads(job.result.read_text(encoding="utf-8"))["points"] for job in jobs]
    answers = [read_answers(job) for job in jobs]
    columns = {name: torch.cat([getattr(each, name) for each in answers]) for name in ("scores", "top1", "top5")}
    thresholds = operating_thresholds(dataclasses.replace(answers[0], **columns))
    rows = [[each.row(threshold) for threshold in thresholds] for each in answers]
    return [[{name: row[name] for name in ("threshold", "top1", "gmacs")} for row in seed] for seed in rows]


def own_macs(model: PreTrainedModel) -> float:
    """Of an image, where it does not depend on the image; NaN of an A-ViT, whose outputs have them."""
    config = model.config
    if getattr(config, "sub_networks", None):
        return sub_network_macs(config)[config.default_sub_network]
    return sum(stage_macs(config)) if thinks_in_stages(config) else math.nan


def perform(job: Job) -> None:
    """Train, evaluate and write `points.json`; what is already there is not repeated. Output goes to `log.txt`."""
    if job.result.exists():
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(job.threads)
    with (job.folder / "log.txt").open("a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        try:
            _perform(job)
        except SystemExit:
            raise
        except BaseException:
            traceback.print_exc()
            sys.exit(1)


def _perform(job: Job) -> None:
    cuda = torch.cuda.is_available() and not job.base.cpu
    device = torch.device("cuda" if cuda else "cpu")
    if job.trained is None and not job.training.exists():
        run = TrainingRun(run_config(job, prepare_start(job)))
        facts = {"training_macs_per_image": count_training_macs(run)}
        facts |= {"epochs": run.num_epochs, "seconds": run.run()["seconds"]}
        facts["images_seen"] = run.progress.step * run.config.batch_size
        facts["device"] = torch.cuda.get_device_name() if cuda else "cpu"
        write_json(job.training, facts)
    trained = {} if job.trained else json.loads(job.training.read_text(encoding="utf-8"))
    measured = {} if METHODS[job.method].is_step else evaluate_points(job, device)
    write_json(job.result, {"method": job.method, "seed": job.seed, **trained, **measured})


def write_json(path: Path, content: Any) -> None:
    """Written whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    partial.replace(path)
