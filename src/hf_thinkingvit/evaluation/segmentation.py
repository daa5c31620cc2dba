"""
Semantic segmentation at every τ, from one pass: each stage runs once per image or window, and its confusion matrix is
recorded. Under a τ, the matrices of the stages at which images leave are summed, and the measures follow from the sum.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..models.configuration_checks import as_pair, as_plain_numbers
from ..models.staged_run import Answer
from ..models.task_segmentation import check_mask_size, resize_logits
from ..public_names import public_name
from .conditions import model_conditions
from .macs import stage_macs
from .splits import UNKNOWN
from .stages import StageScores, Threshold, measure_stages, parts_of


def predicted_classes(logits: torch.Tensor, size: Sequence[int], config) -> torch.Tensor:
    """
    The most probable class of each pixel. One image after another, because the logits of all pixels of one window of
    512 × 512 take 157 MB with 150 classes.

    Args:
        logits (`torch.Tensor` of shape `(images, num_labels, rows, columns)`): of the patches.
        size (`tuple[int, int]`): (height, width) of the images.
        config (`PreTrainedConfig`): of the model.

    Returns:
        `torch.LongTensor` of shape `(images, height, width)`.
    """
    patch_size = as_pair(config.patch_size)
    return torch.cat([resize_logits(image.float(), patch_size, size).argmax(dim=1) for image in logits.split(1)])


def confusion_matrices(logits: torch.Tensor, labels: torch.Tensor, config) -> torch.Tensor:
    """
    Pixels by true class (rows) and predicted class (columns) of each image.

    Args:
        logits, config: as of `predicted_classes`.
        labels (`torch.LongTensor` of shape `(images, height, width)`): class indices;
            `config.semantic_loss_ignore_index` does not count.

    Returns:
        `torch.IntTensor` of shape `(images, num_labels, num_labels)`.
    """
    num_labels = logits.shape[1]
    predicted = predicted_classes(logits, labels.shape[1:], config)
    counted = labels != config.semantic_loss_ignore_index
    cells = [(label * num_labels + found)[mask] for label, found, mask in zip(labels, predicted, counted)]
    counts = torch.stack([cell.bincount(minlength=num_labels**2) for cell in cells])
    return counts.int().view(-1, num_labels, num_labels)


def lost_pixels(logits: torch.Tensor, last: torch.Tensor, labels: torch.Tensor, config) -> torch.Tensor:
    """
    How many pixels of each image are right by the logits `last` and wrong by `logits`, int64 `(images,)`. Arguments as
    of `confusion_matrices`.
    """
    here, there = (predicted_classes(each, labels.shape[1:], config) == labels for each in (logits, last))
    return (there & ~here & (labels != config.semantic_loss_ignore_index)).sum(dim=(1, 2))


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
                rows = 0
                for part in parts_of(batch):
                    with accelerator.autocast():
                        answers = model(part["pixel_values"], output_stage_logits=True).stage_logits
                    confusions = torch.stack(
                        [confusion_matrices(logits, part["labels"], model.config).long() for logits in answers], dim=1
                    )
                    rows = rows + confusions.new_zeros(count, *confusions.shape[1:]).index_add_(
                        0, part["image"], confusions
                    )
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
        scores (`torch.FloatTensor` of shape `(windows, stages)`): of the exit criterion.
        confusions (`torch.IntTensor` of shape `(windows, stages, num_labels, num_labels)`):
            Pixels by true and predicted class: 90 KB per window and stage with 150 classes.
        lost (`torch.LongTensor` of shape `(windows, stages)`):
            Pixels that are right at the last stage and wrong at each.
        image (`torch.LongTensor` of shape `(windows,)`): the image that each window is of, from 0, not decreasing.
        macs (`tuple[int]`): multiply-accumulates of a window that exits at each stage.
        criterion (`str`), entropy_top_k, num_labels (`int`), exit_at_threshold (`bool`): as in the model's
            configuration.
        dataset, split, conditions, seen: as in [`StageAnswers`].
        prepared (`str`, *optional*): how the images were resized and cut, in words.
    """

    risks = ("pixels_lost", "pixel_error")

    scores: torch.Tensor
    confusions: torch.Tensor
    lost: torch.Tensor
    image: torch.Tensor
    macs: tuple[int, ...]
    criterion: str
    entropy_top_k: int
    num_labels: int
    exit_at_threshold: bool = False
    dataset: str = "unknown"
    split: str = UNKNOWN
    conditions: Mapping[str, Any] | None = None
    seen: str | None = None
    prepared: str | None = None

    def __len__(self) -> int:
        """The number of images."""
        return int(self.image[-1]) + 1 if len(self.image) else 0

    def select(self, rows: torch.Tensor) -> "StageConfusions":
        """What is recorded of the images `rows` (indices or a mask), in their order here."""
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[rows] = True
        windows = chosen[self.image]
        numbers = chosen.cumsum(0) - 1
        return replace(
            self,
            scores=self.scores[windows],
            confusions=self.confusions[windows],
            lost=self.lost[windows],
            image=numbers[self.image[windows]],
        )

    def judged(self) -> "StageConfusions":
        """What is recorded of the images of which any pixel counts; `ValueError` if there is none."""
        pixels = self.confusions[:, 0].sum(dim=(1, 2))
        counting = torch.zeros(len(self), dtype=torch.long).index_add_(0, self.image, pixels) > 0
        if not counting.any():
            raise ValueError("None of the calibration images has a pixel that counts: no promise follows from them.")
        return self if counting.all() else self.select(counting)

    def row(self, threshold: Threshold) -> dict[str, Any]:
        """
        The measures under a τ; the mean cost of an image, that is of all of its windows, and of a window, in GMACs; and
        the share of windows that leave per stage.
        """
        threshold = as_plain_numbers(threshold)
        stages = self.exit_stages(threshold)
        confusion = self.sum_at(torch.arange(len(stages)), stages)
        spent = torch.tensor(self.macs)[stages].double().sum().item() / 1e9
        return {
            "threshold": list(threshold) if isinstance(threshold, Sequence) else threshold,
            **segmentation_measures(confusion),
            "gmacs": spent / len(self),
            "gmacs_per_window": spent / len(stages),
            "exit_shares": [(stages == stage).double().mean().item() for stage in range(self.num_stages)],
        }

    def stage_rows(self) -> list[dict[str, Any]]:
        """What each stage alone would do for all images."""
        sums, windows = self.confusions.sum(dim=0, dtype=torch.float64), len(self.scores) / len(self)
        return [
            {**segmentation_measures(confusion), "gmacs": windows * macs / 1e9, "gmacs_per_window": macs / 1e9}
            for confusion, macs in zip(sums, self.macs)
        ]

    def results(self, thresholds: Sequence[Threshold]) -> dict[str, Any]:
        """All measurements as plain data, as [`StageAnswers.results`] gives them."""
        return {
            "dataset": public_name(self.dataset),
            "split": self.split,
            "images": len(self),
            "windows": len(self.scores),
            **({"dtype": self.conditions["dtype"]} if self.conditions else {}),
            **({"prepared": self.prepared} if self.prepared else {}),
            **{name: fact for name, fact in (self.conditions or {}).items() if name == "preprocessing"},
            "criterion": self.criterion,
            "stages": self.stage_rows(),
            "sweep": [self.row(threshold) for threshold in thresholds],
        }

    def losses(self, risk: str) -> torch.Tensor:
        """
        The loss of each window at each stage, float64 `(windows, stages)`: a share of its image's pixels, so that an
        image's loss, between 0 and 1, is the sum of those of its windows. `"pixels_lost"`: of pixels that are right at
        the last stage and wrong at this. `"pixel_error"`: of pixels that are wrong. 0 for images none of whose pixels
        counts.
        """
        pixels = self.confusions[:, 0].sum(dim=(1, 2)).double()
        of_image = torch.zeros(len(self), dtype=torch.float64).index_add_(0, self.image, pixels).clamp(min=1)
        wrong = self.confusions.sum(dim=(2, 3)) - self.confusions.diagonal(dim1=2, dim2=3).sum(dim=2)
        counts = {"pixels_lost": self.lost, "pixel_error": wrong}[risk]
        return counts.double() / of_image[self.image, None]

    def qualities(self, thresholds: Sequence[Threshold]) -> list[float]:
        """
        The mean IoU under each τ. From one τ to the next, only windows that leave elsewhere are read: over a grid in
        order, each is read at most twice per exit.
        """
        found, before, confusion = [], None, None
        together = max(1, 2**23 // self.scores.numel())  # about 100 MB
        for start in range(0, len(thresholds), together):
            for stages in self.exit_stages_of_each(thresholds[start : start + together]):
                if before is None:
                    confusion = self.sum_at(torch.arange(len(stages)), stages)
                else:
                    moved = (stages != before).nonzero()[:, 0]
                    confusion = confusion + self.sum_at(moved, stages) - self.sum_at(moved, before)
                before = stages
                found.append(segmentation_measures(confusion)["mean_iou"] or 0.0)
        return found

    def sum_at(self, windows: torch.Tensor, exit_stages: torch.Tensor) -> torch.Tensor:
        """The int64 confusion matrix of `windows` (indices) at their exits; copies those of a few at a time."""
        total = torch.zeros(self.num_labels, self.num_labels, dtype=torch.long)
        for some in windows.split(256):
            total += self.confusions[some, exit_stages[some]].sum(dim=0)
        return total


def collect_stage_confusions(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    accelerator: Accelerator | None = None,
    progress: bool = True,
    preprocessing: Mapping[str, Any] | None = None,
    **facts: Any,
) -> StageConfusions:
    """
    Run every stage once on every image. Every process calls it; each gets the confusion matrices of all images.

    Windows of [`~hf_thinkingvit.windows.window_batches`] are measured each by itself: logits are not averaged where
    windows overlap, as they are in `SlidingWindowSegmenter`; each pixel counts in one window.

    Args:
        model (`PreTrainedModel`): a segmentation model, on the accelerator's device; left in the mode it was in.
        batches: `pixel_values` and `labels` `(images, height, width)` of the same size in all batches, prepared by
            `accelerator` where there is one; of windows, with `image`.
        accelerator (`Accelerator`, *optional*): gathers what several processes compute.
        progress (`bool`): show a progress bar, on the main process.
        preprocessing (`dict`, *optional*): how the images were resized and cut, recorded as a condition.
        facts: `dataset`, `split`, `seen` and `prepared` of [`StageConfusions`].

    Raises:
        ValueError: for masks that do not fit the images or the classes; if there are no images.
    """

    def measure(answer: Answer, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        labels = batch["labels"]
        check_mask_size(labels, batch["pixel_values"])
        model.check_labels(labels, len(labels))
        return {"confusion": confusion_matrices(answer["logits"], labels, model.config)}

    def compare(answer: Answer, last: Answer, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"lost": lost_pixels(answer["logits"], last["logits"], batch["labels"], model.config)}

    measured = measure_stages(model, batches, measure, accelerator, progress, compare)
    if not len(measured):
        raise ValueError("There are no images to evaluate on.")
    return StageConfusions(
        scores=measured.scores,
        confusions=measured.measures["confusion"],
        lost=measured.measures["lost"],
        image=torch.arange(len(measured)) if measured.image is None else measured.image,
        num_labels=model.config.num_labels,
        conditions=model_conditions(model) | ({"preprocessing": dict(preprocessing)} if preprocessing else {}),
        **facts,
        macs=tuple(torch.tensor(stage_macs(model.config, measured.image_size)).cumsum(0).tolist()),
        criterion=model.config.exit_criterion,
        entropy_top_k=model.config.entropy_top_k,
        exit_at_threshold=model.config.exit_at_threshold,
    )
