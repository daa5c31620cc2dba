"""
Evaluates any number of τ from one pass: every stage runs once per image, and its score and hits are recorded. They
determine, for any τ, at which stage the image exits and whether its answer is right.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..accelerate_state import released_afterwards
from ..data import as_image_split, evaluation_batches
from ..models.configuration_checks import as_plain_numbers
from ..models.exit_rules import ExitRule
from ..models.staged_run import Answer
from ..public_names import public_name
from .conditions import model_conditions, token_fields
from .labels import LabelMap
from .macs import stage_macs
from .splits import UNKNOWN, evaluation_rows, warn_if_not_new
from .stages import StageScores, Threshold, measure_stages


@dataclass(frozen=True)
class StageAnswers(StageScores):
    """
    Score and hits of every stage's answer to every image.

    Attributes:
        scores (`torch.FloatTensor` of shape `(images, stages)`): the exit criterion's, float32.
        top1, top5 (`torch.BoolTensor` of shape `(images, stages)`): whether the right class is among the best.
        macs (`tuple[int]`): multiply-accumulates of an image that exits at each stage.
        criterion (`str`), entropy_top_k, num_labels (`int`), exit_at_threshold (`bool`): as in the model's
            configuration.
        dataset (`str`): name of the data set, without local paths.
        split (`str`): a split's name, `"all"` for data without splits, or `"unknown"`.
        conditions (`dict`, *optional*): the model that was measured, as [`model_conditions`] describes it.
        seen (`str`, *optional*): why the images are not new to the model, in words, if its configuration records it.
    """

    risks = ("accuracy_drop", "error")

    scores: torch.Tensor
    top1: torch.Tensor
    top5: torch.Tensor
    macs: tuple[int, ...]
    criterion: str
    entropy_top_k: int
    num_labels: int
    dataset: str
    split: str = UNKNOWN
    conditions: Mapping[str, Any] | None = None
    seen: str | None = None
    exit_at_threshold: bool = False

    def select(self, rows: torch.Tensor) -> "StageAnswers":
        """The answers to the images `rows` (indices or a mask)."""
        return replace(self, scores=self.scores[rows], top1=self.top1[rows], top5=self.top5[rows])

    def losses(self, risk: str) -> torch.Tensor:
        """Whether each image fails if it exits at each stage, bool `(images, stages)`; see `calibrate_risk`."""
        return {"accuracy_drop": ~self.top1 & self.top1[:, -1:], "error": ~self.top1}[risk]

    def qualities(self, thresholds: Sequence[Threshold]) -> list[float]:
        """The accuracy (%) under each τ."""
        return (100 * self.means(thresholds, self.top1)).tolist()

    def row(self, threshold: Threshold) -> dict[str, Any]:
        """Accuracy (%), cost and exits under τ; `exit_top1` is `None` for exits that no image takes."""
        threshold = as_plain_numbers(threshold)
        stages = self.exit_stages(threshold)
        right = self.at(self.top1, stages)
        took = [stages == stage for stage in range(self.num_stages)]
        return {
            "threshold": list(threshold) if isinstance(threshold, Sequence) else threshold,
            "top1": 100 * right.double().mean().item(),
            "top5": 100 * self.at(self.top5, stages).double().mean().item(),
            "gmacs": torch.tensor(self.macs)[stages].double().mean().item() / 1e9,
            "exit_shares": [mask.double().mean().item() for mask in took],
            "exit_top1": [100 * right[mask].double().mean().item() if mask.any() else None for mask in took],
        }

    def stage_rows(self) -> list[dict[str, float]]:
        """Accuracy (%) and cost of each stage alone, for all images."""
        return [
            {
                "top1": 100 * self.top1[:, stage].double().mean().item(),
                "top5": 100 * self.top5[:, stage].double().mean().item(),
                "gmacs": macs / 1e9,
            }
            for stage, macs in enumerate(self.macs)
        ]

    def results(self, thresholds: Sequence[Threshold]) -> dict[str, Any]:
        """All measurements as plain data: the content of the results file of [`~hf_thinkingvit.hub.push`]."""
        return {
            "dataset": public_name(self.dataset),
            "split": self.split,
            "images": len(self),
            **({"dtype": self.conditions["dtype"]} if self.conditions else {}),
            **token_fields(self.conditions or {}),
            "criterion": self.criterion,
            "stages": self.stage_rows(),
            "sweep": [self.row(threshold) for threshold in thresholds],
        }


def collect_stage_answers(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    labels: LabelMap,
    accelerator: Accelerator | None = None,
    progress: bool = True,
    split: str = UNKNOWN,
    seen: str | None = None,
    generator: torch.Generator | None = None,
) -> StageAnswers:
    """
    Run every stage once on every image. Every process must call it, and gets all answers.

    Args:
        model (`PreTrainedModel`): a model that thinks in stages, on the accelerator's device; its mode is restored.
        batches: `pixel_values` and `labels`, prepared by `accelerator` if it is given.
        labels (`LabelMap`): decides which answers are right.
        accelerator (`Accelerator`, *optional*): gathers the results of several processes.
        progress (`bool`): show a progress bar, on the main process.
        split (`str`): name of the split of the images.
        seen (`str`, *optional*): why the images are not new to the model.
        generator (`torch.Generator`, *optional*): of a model whose answers are random, as in `measure_stages`.

    Raises:
        ValueError: if the model does not think in stages, or there are no images with labels.
    """

    def measure(answer: Answer, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        logits, truth = answer["logits"], batch["labels"]
        hits = {f"top{k}": labels.hits(logits, truth, k) for k in (1, 5)}
        return {**hits, "counted": labels.counted(truth)}

    measured = measure_stages(model, batches, measure, accelerator, progress, generator=generator)
    counted = measured.measures["counted"][:, 0] > 0 if len(measured) else torch.zeros(0, dtype=torch.bool)
    if not counted.any():
        raise ValueError(f"{labels.name} has no images with labels to evaluate on.")
    config = model.config
    cumulative = torch.tensor(stage_macs(config, measured.image_size)).cumsum(0).tolist()
    return StageAnswers(
        scores=measured.scores[counted],
        top1=measured.measures["top1"][counted] > 0,
        top5=measured.measures["top5"][counted] > 0,
        macs=tuple(cumulative),
        criterion=config.exit_criterion,
        entropy_top_k=config.entropy_top_k,
        num_labels=config.num_labels,
        dataset=public_name(labels.name),
        split=split,
        conditions=model_conditions(model),
        seen=seen,
        exit_at_threshold=getattr(config, "exit_at_threshold", False),  # missing in remote code of earlier versions
    )


@released_afterwards()
def evaluate_thresholds(
    model: PreTrainedModel,
    dataset: Any,
    processor: Any,
    thresholds: Sequence[Threshold] = (),
    *,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    label_map: Any = None,
    restrict: bool | None = None,
    streaming: bool = False,
    max_samples: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    progress: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[StageAnswers, list[dict[str, Any]]]:
    """
    Evaluate any number of thresholds in one pass over the images.

    Args:
        model (`PreTrainedModel`): a model that thinks in stages.
        dataset (`str`, `datasets.Dataset` or `datasets.IterableDataset`): Hub id, folder or Parquet file; or a split.
        processor (`BaseImageProcessor`): the model's.
        thresholds (`list`): each one τ, or a list with one per exit; in any order.
        split (`str`, *optional*): for a dataset given by name, the split to read; by default "validation", else "test",
            else "val", and "all" for a folder or Parquet file without splits. A split by which the model's best epoch
            was chosen comes last; `training_data` of its configuration records it for the data set of that public name.
            A training split must be named. For a dataset given as an object, the name of its split; by default its own
            `split`.
        image_column, label_column (`str`, *optional*): by default found by their types.
        label_map, restrict: see [`LabelMap`].
        streaming, batch_size, num_workers: how to read the images.
        max_samples (`int`, *optional*): read only this many images: a random sample with a fixed seed; of a stream, the
            first ones, which may have only a few of the labels.
        accelerator (`Accelerator`, *optional*): by default a new one, which supports `accelerate launch`.
        generator (`torch.Generator`, *optional*): of a model whose answers are random (PonderNet's sampling); by
            default one with the seed 0, so that the same images give the same rows.

    Returns:
        The [`StageAnswers`], which evaluate further τ without running the model, and one row per τ: `threshold`, `top1`
        and `top5` (%), `gmacs`, `exit_shares` and `exit_top1` per stage.

    Raises:
        ValueError: if a τ is invalid (checked before anything runs); if the data have no labels or no images; if there
            is no such split, or `split` is not given and there are only training images.
    """
    for threshold in thresholds:
        ExitRule.from_config(model.config, threshold)
    accelerator = accelerator or Accelerator(cpu=model.device.type == "cpu")
    name = dataset if isinstance(dataset, str) else "the dataset"
    trained_on = getattr(model.config, "training_data", None)
    rows, split = evaluation_rows(dataset, split, streaming, trained_on)
    seen = warn_if_not_new(trained_on, dataset, split)
    images = as_image_split(rows, name, image_column, label_column).sample(max_samples)
    labels = LabelMap(model.config, images.label_names, label_map, restrict, name)
    model.to(accelerator.device)
    batches = accelerator.prepare(evaluation_batches(images, processor, batch_size, num_workers))
    answers = collect_stage_answers(model, batches, labels, accelerator, progress, split, seen, generator)
    return answers, [answers.row(threshold) for threshold in thresholds]
