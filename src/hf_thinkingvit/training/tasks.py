"""
What a run is trained for: the data it reads, how images and labels are augmented, the loss of an answer, and what is
measured. A task is a `TrainingTask` here; the loop knows none of them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from ..data import ImageSplit, Rows, as_image_split, evaluation_batches, load_splits
from ..evaluation.accuracy import evaluate_accuracy
from ..evaluation.segmentation import evaluate_segmentation
from ..families.record import IMAGE_CLASSIFICATION, IMAGE_SEGMENTATION
from ..masks import MaskLabels, as_mask_split, load_mask_folders, read_label_names, read_mask_values
from ..models.configuration_checks import as_pair
from ..windows import WindowPlan, window_batches


if TYPE_CHECKING:
    from .config import TrainingConfig


class TrainingTask:
    """
    Attributes:
        name (`str`): that of the families' `heads`.
        decisive (`str`): the measure whose entry of the last stage, or of the default sub-network, chooses the best
            epoch; greater is better.
        measures (`dict[str, str]`): the measures of every stage that are printed and tracked, with their words.
        percent (`float`): what the measures are multiplied by for percentages.
        model_gets_labels (`bool`): whether the model is called with labels in training. Its own loss is not used, but
            some families add terms to it that the run reads.
        heads (`tuple[str, ...]`): modules that depend on the labels.
        reorders_heads (`bool`): whether rows of the parameters of `heads` are classes.
        resizes (`frozenset[str]`): fields that may differ from those of a plain model that the run starts from.
        keeps_source_labels (`bool`): whether a model that starts from a plain one has its labels at first.
    """

    name: str
    decisive: str
    measures: Mapping[str, str]
    percent: float = 1.0
    model_gets_labels = True
    heads: tuple[str, ...]
    reorders_heads = True
    resizes: frozenset[str] = frozenset()
    keeps_source_labels = True

    def constructor_from(self, config: PreTrainedConfig) -> str | None:
        """For the configuration of a model for another task: the constructor that takes such a model."""
        return None

    def load_splits(self, config: "TrainingConfig") -> dict[str, Rows]:
        """All splits of the data set; errors of `hf_thinkingvit.data.load_splits`."""
        return load_splits(config.dataset, config.streaming)

    def as_split(self, rows: Rows, config: "TrainingConfig") -> ImageSplit:
        """A split with its columns and labels; `ValueError` if they cannot be found."""
        raise NotImplementedError

    def image_processor(
        self, config: "TrainingConfig", model_config: PreTrainedConfig, report: Callable[[str], None]
    ) -> tuple[BaseImageProcessor, "TrainingConfig"]:
        """The image processor that is saved with the models, and `config` with its settings filled in."""
        raise NotImplementedError

    def augmentation(self, config: "TrainingConfig", model_config: PreTrainedConfig) -> Any:
        """What `labels.transformed` of a training split calls."""
        raise NotImplementedError

    def evaluation_batches(
        self, split: ImageSplit, processor: Any, config: "TrainingConfig", model_config: PreTrainedConfig
    ) -> DataLoader:
        """The batches that `evaluate` reads."""
        raise NotImplementedError

    def evaluate(
        self, accelerator: Accelerator, models: dict[str, nn.Module], batches: Iterable[dict[str, torch.Tensor]]
    ) -> dict[str, dict]:
        """Measures of each model, by name, with one entry per stage or sub-network, as `main_measure` reads them."""
        raise NotImplementedError

    def record(self, config: "TrainingConfig") -> dict[str, Any]:
        """What saved models record of how their images were prepared, beside the image processor."""
        return {}

    def label_loss(self, config: "TrainingConfig", model_config: PreTrainedConfig) -> Any:
        """The loss of answers from the labels: see `answer_losses.py`."""
        raise NotImplementedError


class ClassificationTask(TrainingTask):
    name = IMAGE_CLASSIFICATION
    decisive = "top1"
    measures = {"top1": "top-1", "top5": "top-5"}
    heads = ("classifier", "distillation_classifier", "exit_classifiers")

    def as_split(self, rows, config):
        return as_image_split(rows, config.dataset, config.image_column, config.label_column)

    def image_processor(self, config, model_config, report):
        from .preprocessing import run_image_processor

        return run_image_processor(config, model_config, report)

    def augmentation(self, config, model_config):
        from .batch_augmentation import BatchAugmentation
        from .recipe import train_transform

        augmentation = BatchAugmentation if config.in_memory else train_transform
        return augmentation(config, model_config.image_size)

    def evaluation_batches(self, split, processor, config, model_config):
        return evaluation_batches(split, processor, config.eval_batch_size, config.num_workers)

    def evaluate(self, accelerator, models, batches):
        return evaluate_accuracy(accelerator, models, batches, every_sub_network=True)

    def label_loss(self, config, model_config):
        from .answer_losses import LabelLoss

        return LabelLoss(config, model_config)


class SegmentationTask(TrainingTask):
    name = IMAGE_SEGMENTATION
    decisive = "mean_iou"
    measures = {"mean_iou": "mean IoU", "overall_accuracy": "pixel accuracy"}
    percent = 100.0
    model_gets_labels = False
    heads = ("decoder",)
    reorders_heads = False
    resizes = frozenset({"image_size", "layer_norm_eps"})  # the published models have another epsilon than their start
    keeps_source_labels = False

    def constructor_from(self, config):
        return "from_thinkingvit" if config.decoder_type is None else None

    def load_splits(self, config):
        if config.image_files is None:
            return super().load_splits(config)
        return load_mask_folders(config.dataset, config.image_files, config.mask_files)

    def as_split(self, rows, config):
        names, values = read_label_names(config.label_names), read_mask_values(config.mask_values)
        if not names and not values:
            raise ValueError("Masks do not say what their classes are: set `label_names` (or `mask_values`).")
        names = names or tuple(f"LABEL_{index}" for index in range(len(values)))
        labels = MaskLabels(
            names=names,
            values=values or tuple(range(len(names))),
            ignored=read_mask_values(config.ignored_mask_values),
            ignore_index=config.model.get("semantic_loss_ignore_index", 255),
        )
        return as_mask_split(rows, config.dataset, labels, config.image_column, config.label_column)

    def image_processor(self, config, model_config, report):
        from .preprocessing import segmentation_run_processor

        return segmentation_run_processor(config, model_config, report)

    def augmentation(self, config, model_config):
        from .augmentation import SegmentationAugmentation

        if config.in_memory:
            raise ValueError("`in_memory` augments batches of images without masks: leave it out.")
        ignore_index = config.model.get("semantic_loss_ignore_index", 255)
        if model_config.semantic_loss_ignore_index != ignore_index:
            raise ValueError(
                f"The model ignores label {model_config.semantic_loss_ignore_index}: say so in "
                "`model.semantic_loss_ignore_index`, by which masks are read."
            )
        return SegmentationAugmentation(config, as_pair(model_config.image_size), ignore_index)

    def evaluation_batches(self, split, processor, config, model_config):
        plan = WindowPlan(as_pair(model_config.image_size), config.short_side, config.long_side)
        return window_batches(split, processor, plan, config.eval_batch_size, config.num_workers)

    def evaluate(self, accelerator, models, batches):
        return evaluate_segmentation(accelerator, models, batches)

    def record(self, config):
        return {"preprocessing": {"short_side": config.short_side, "long_side": config.long_side}}

    def label_loss(self, config, model_config):
        from .answer_losses import MaskLoss

        return MaskLoss(config, model_config)


TRAINING_TASKS: dict[str, TrainingTask] = {task.name: task for task in (ClassificationTask(), SegmentationTask())}


def training_task(name: str) -> TrainingTask:
    """The task called `name`; `ValueError` if there is none."""
    if name not in TRAINING_TASKS:
        raise ValueError(f"`task` must be one of {list(TRAINING_TASKS)}, got {name!r}.")
    return TRAINING_TASKS[name]
