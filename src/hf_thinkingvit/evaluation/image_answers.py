"""Every answer of a classifier to each image of a data set, for tables by class, histograms and grids of images."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedModel

from ..data import ImageSplit, as_image_split, decode, evaluation_batches
from ..models.configuration_elastic_vit import ElasticViTConfig
from ..models.configuration_staged import thinks_in_stages
from ..models.exit_rules import answer_entropy
from ..models.staged_run import Answer
from ..public_names import public_name
from .answers import all_logits, arguments_for_all
from .labels import LabelMap
from .splits import evaluation_rows, warn_if_not_new
from .stages import StageMeasurements, Threshold, measure_stages


@dataclass(frozen=True)
class ImageAnswers:
    """
    Every answer to each image that has a label. The answers are those of the stages, or of the sub-networks of an
    elastic model; other models have one.

    Attributes:
        labels (`torch.LongTensor` of shape `(images,)`): into `label_names`.
        predicted (`torch.LongTensor` of shape `(images, answers)`): classes of the model.
        right (`torch.BoolTensor` of shape `(images, answers)`): whether they are the label.
        confidences, entropies (`torch.FloatTensor` of shape `(images, answers)`): the probability of the predicted
            class, and the entropy of the answer in nats.
        depths (`torch.FloatTensor` of shape `(images,)`, *optional*): of an A-ViT, mean layers of an image's tokens.
        stages (`StageMeasurements`, *optional*): the exit scores, of a model that thinks in stages.
        chosen (`int`): the answer that counts, for other models.
        label_names (`list[str]`): of the data set; the model's classes where it has none.
        class_names (`list[str]`): of the model.
        images (`ImageSplit`), rows (`torch.LongTensor` of shape `(images,)`): where the images are.
        dataset, split (`str`): their names.
    """

    labels: torch.Tensor
    predicted: torch.Tensor
    right: torch.Tensor
    confidences: torch.Tensor
    entropies: torch.Tensor
    depths: torch.Tensor | None
    stages: StageMeasurements | None
    chosen: int
    label_names: list[str]
    class_names: list[str]
    images: ImageSplit
    rows: torch.Tensor
    dataset: str
    split: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_answers(self) -> int:
        return self.right.shape[1]

    @property
    def kind(self) -> str:
        """What answers are of: `"stage"`, `"sub-network"`, or `"model"` where there is one."""
        if self.stages is not None:
            return "stage"
        return "sub-network" if self.num_answers > 1 else "model"

    def accepted(self, threshold: Threshold | None = None) -> torch.Tensor:
        """The answer that counts of each image under τ (needed if, and only if, the model thinks in stages)."""
        if self.stages is None:
            return torch.full((len(self),), self.chosen)
        return self.stages.exit_stages(threshold)

    def image(self, index: int) -> Image.Image:
        """The image at `index`, as RGB."""
        return decode(self.images.rows[int(self.rows[index])][self.images.image_column])


@torch.no_grad()
def collect_image_answers(
    model: PreTrainedModel,
    dataset: Any,
    processor: Any,
    *,
    split: str | None = None,
    label_map: Any = None,
    max_samples: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
) -> ImageAnswers:
    """
    Run every answer of a classifier once on every image, in one process.

    Args:
        model (`PreTrainedModel`): a single-label classifier, of this package or of Transformers; its mode is restored.
        dataset, processor, split, label_map, max_samples, batch_size, num_workers, progress: as in
            [`evaluate_thresholds`].

    Raises:
        ValueError: as [`evaluate_thresholds`]; also for images with several labels.
    """
    name = dataset if isinstance(dataset, str) else "the dataset"
    trained_on = getattr(model.config, "training_data", None)
    rows, split = evaluation_rows(dataset, split, False, trained_on)
    warn_if_not_new(trained_on, dataset, split)
    images = as_image_split(rows, name).sample(max_samples)
    labels = LabelMap(model.config, images.label_names, label_map, None, name)
    batches = evaluation_batches(images, processor, batch_size, num_workers)
    class_names = [model.config.id2label[index] for index in range(model.config.num_labels)]

    def measure(logits: torch.Tensor, entropies: torch.Tensor, truth: torch.Tensor) -> dict[str, torch.Tensor]:
        if truth.dim() > 1:
            raise ValueError(f"{name} has images with several labels, which belong to no one class.")
        confidences, predicted = logits.float().softmax(dim=-1).max(dim=-1)
        right = labels.hits(logits, truth, 1)
        return {
            "labels": truth,
            "predicted": predicted,
            "right": right,
            "confidences": confidences,
            "entropies": entropies,
        }

    stages, depths, chosen = None, None, 0
    if thinks_in_stages(model):

        def of_stage(answer: Answer, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return measure(answer["logits"], answer["entropy"], batch["labels"])

        stages = measure_stages(model, batches, of_stage, progress=progress)
        columns = stages.measures
    else:
        columns = _measure_others(model, tqdm(batches, desc="evaluating", unit="batch", disable=not progress), measure)
        depths = columns.pop("depths", None)
        if isinstance(model.config, ElasticViTConfig):
            chosen = model.config.default_sub_network
    counted = columns["labels"][:, 0] >= 0 if columns else torch.zeros(0, dtype=torch.bool)
    if not counted.any():
        raise ValueError(f"{name} has no images with labels to evaluate on.")
    if stages is not None:
        stages = replace(stages, scores=stages.scores[counted], measures={})
    return ImageAnswers(
        labels=columns["labels"][counted, 0],
        predicted=columns["predicted"][counted],
        right=columns["right"][counted] > 0,
        confidences=columns["confidences"][counted],
        entropies=columns["entropies"][counted],
        depths=None if depths is None else depths[counted],
        stages=stages,
        chosen=chosen,
        label_names=list(images.label_names or class_names),
        class_names=class_names,
        images=images,
        rows=counted.nonzero()[:, 0],
        dataset=public_name(name),
        split=split,
    )


def _measure_others(model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]], measure: Any) -> dict[str, Any]:
    """The measurements of every answer of a model that does not think in stages, and an A-ViT's `depths`."""
    arguments = arguments_for_all(model)
    columns: dict[str, list[torch.Tensor]] = {}
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            outputs = model(batch["pixel_values"].to(model.device, model.dtype), **arguments)
            answers = [logits.float().cpu() for logits in all_logits(outputs)]
            measured = [measure(logits, answer_entropy(logits, model.config), batch["labels"]) for logits in answers]
            for name in measured[0]:
                columns.setdefault(name, []).append(torch.stack([entry[name] for entry in measured], dim=1))
            if outputs.get("mean_depth") is not None:
                columns.setdefault("depths", []).append(outputs.mean_depth.float().cpu())
    finally:
        model.train(was_training)
    return {name: torch.cat(parts) for name, parts in columns.items()}
