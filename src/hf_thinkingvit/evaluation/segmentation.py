"""
Semantic segmentation at every τ, from one pass: each stage runs once per image or window, and its confusion matrix is
recorded. Under a τ, the matrices of the stages at which images leave are summed, and the measures follow from the sum.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..models.configuration_checks import as_pair, as_plain_numbers
from ..models.staged_run import Answer
from ..models.task_segmentation import check_mask_size, resize_logits
from .macs import stage_macs
from .stages import StageScores, Threshold, measure_stages


def confusion_matrices(logits: torch.Tensor, labels: torch.Tensor, config) -> torch.Tensor:
    """
    Pixels by true class (rows) and predicted class (columns) of each image.

    Args:
        logits (`torch.Tensor` of shape `(images, num_labels, rows, columns)`): of the patches.
        labels (`torch.LongTensor` of shape `(images, height, width)`): class indices;
            `config.semantic_loss_ignore_index` does not count.
        config (`PreTrainedConfig`): of the model.

    Returns:
        `torch.LongTensor` of shape `(images, num_labels, num_labels)`.
    """
    num_images, num_labels = logits.shape[:2]
    predicted = resize_logits(logits.float(), as_pair(config.patch_size), labels.shape[1:]).argmax(dim=1)
    counted = labels != config.semantic_loss_ignore_index
    image = torch.arange(num_images, device=labels.device).view(-1, 1, 1).expand_as(labels)
    cells = (image * num_labels + labels) * num_labels + predicted
    return cells[counted].bincount(minlength=num_images * num_labels**2).view(num_images, num_labels, num_labels)


def segmentation_measures(confusion: torch.Tensor) -> dict[str, Any]:
    """
    What a confusion matrix `(num_labels, num_labels)` says, under the names of the metric `mean_iou` of `evaluate` and
    as shares from 0 to 1: `mean_iou`, `mean_accuracy`, `overall_accuracy`, and lists `per_category_iou` and
    `per_category_accuracy`. Classes that are neither true nor predicted anywhere have no IoU (`None`), classes that are
    never true no accuracy; the means are over the others, and `None` if there are none.
    """
    confusion = confusion.double()
    right, true, predicted = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)
    iou, accuracy = right / (true + predicted - right), right / true
    overall = right.sum() / true.sum()
    return {
        "mean_iou": _plain(iou.nanmean()),
        "mean_accuracy": _plain(accuracy.nanmean()),
        "overall_accuracy": _plain(overall),
        "per_category_iou": [_plain(value) for value in iou],
        "per_category_accuracy": [_plain(value) for value in accuracy],
    }


def _plain(value: torch.Tensor) -> float | None:
    return None if value.isnan() else value.item()


@torch.no_grad()
def evaluate_segmentation(
    accelerator: Accelerator, models: dict[str, nn.Module], batches: Iterable[dict[str, torch.Tensor]]
) -> dict[str, dict[str, Any]]:
    """
    Evaluate every stage of several models in one pass over images in windows. Every process must call it.

    Args:
        accelerator (`Accelerator`): has prepared `batches`; images that it repeats to fill a batch count once.
        models (`dict[str, nn.Module]`): unwrapped models, run in evaluation mode; their modes are restored.
        batches: as [`~hf_thinkingvit.windows.window_batches`] makes them.

    Returns:
        For each model, the measures of `segmentation_measures`, each a list with one entry per stage, and `images`, the
        number of images.

    Raises:
        ValueError: if there are no images, or none of their pixels counts.
    """
    was_training = {name: model.training for name, model in models.items()}
    sums: dict[str, torch.Tensor] = {}
    images = 0
    try:
        for model in models.values():
            model.eval()
        for batch in batches:
            count = int(batch["rows"])
            for name, model in models.items():
                with accelerator.autocast():
                    answers = model(batch["pixel_values"], output_stage_logits=True).stage_logits
                confusions = torch.stack(
                    [confusion_matrices(logits, batch["labels"], model.config) for logits in answers], dim=1
                )
                rows = confusions.new_zeros(count, *confusions.shape[1:]).index_add_(0, batch["image"], confusions)
                rows = accelerator.gather_for_metrics(rows)
                sums[name] = sums.get(name, 0) + rows.sum(dim=0).cpu()
            images += len(rows)
    finally:
        for name, model in models.items():
            model.train(was_training[name])
    if not images or not all(total.sum() for total in sums.values()):
        raise ValueError("There are no images to evaluate on, or none of their pixels has a class.")
    results = {}
    for name, total in sums.items():
        stages = [segmentation_measures(confusion) for confusion in total]
        results[name] = {measure: [stage[measure] for stage in stages] for measure in stages[0]} | {"images": images}
    return results


@dataclass(frozen=True)
class StageConfusions(StageScores):
    """
    What is recorded of every stage's answer to every image, or every window of images.

    Attributes:
        scores (`torch.FloatTensor` of shape `(images, stages)`): of the exit criterion.
        confusions (`torch.FloatTensor` of shape `(images, stages, num_labels, num_labels)`):
            Pixels by true and predicted class: 90 KB per image and stage with 150 classes.
        macs (`tuple[int]`): multiply-accumulates of an image that exits at each stage.
        criterion (`str`), entropy_top_k (`int`), exit_at_threshold (`bool`): as in the model's configuration.
    """

    scores: torch.Tensor
    confusions: torch.Tensor
    macs: tuple[int, ...]
    criterion: str
    entropy_top_k: int
    exit_at_threshold: bool = False

    def row(self, threshold: Threshold) -> dict[str, Any]:
        """The measures under a τ, the mean cost of an image in GMACs, and the share of images that leave per stage."""
        stages = self.exit_stages(threshold)
        confusion = self.at(self.confusions, stages).sum(dim=0, dtype=torch.float64)
        return {
            "threshold": as_plain_numbers(threshold),
            **segmentation_measures(confusion),
            "gmacs": torch.tensor(self.macs)[stages].double().mean().item() / 1e9,
            "exit_shares": [(stages == stage).double().mean().item() for stage in range(self.num_stages)],
        }

    def stage_rows(self) -> list[dict[str, Any]]:
        """What each stage alone would do for all images."""
        sums = self.confusions.sum(dim=0, dtype=torch.float64)
        return [{**segmentation_measures(confusion), "gmacs": macs / 1e9} for confusion, macs in zip(sums, self.macs)]


def collect_stage_confusions(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> StageConfusions:
    """
    Run every stage once on every image. Every process calls it; each gets the confusion matrices of all images.

    Images that are windows of larger ones are measured each by itself: logits are not averaged where windows overlap,
    as they are in `SlidingWindowSegmenter`.

    Args:
        model (`PreTrainedModel`): a segmentation model, on the accelerator's device; left in the mode it was in.
        batches: `pixel_values` and `labels` `(images, height, width)` of the same size in all batches, prepared by
            `accelerator` where there is one.
        accelerator (`Accelerator`, *optional*): gathers what several processes compute.
        progress (`bool`): show a progress bar, on the main process.

    Raises:
        ValueError: for masks that do not fit the images or the classes; if there are no images.
    """

    def measure(answer: Answer, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        labels = batch["labels"]
        check_mask_size(labels, batch["pixel_values"])
        model.check_labels(labels, len(labels))
        return {"confusion": confusion_matrices(answer["logits"], labels, model.config)}

    measured = measure_stages(model, batches, measure, accelerator, progress)
    if not len(measured):
        raise ValueError("There are no images to evaluate on.")
    return StageConfusions(
        scores=measured.scores,
        confusions=measured.measures["confusion"],
        macs=tuple(torch.tensor(stage_macs(model.config, measured.image_size)).cumsum(0).tolist()),
        criterion=model.config.exit_criterion,
        entropy_top_k=model.config.entropy_top_k,
        exit_at_threshold=model.config.exit_at_threshold,
    )
