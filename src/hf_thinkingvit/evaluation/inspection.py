"""
One image, looked at closely: what every stage answers, computed once, from which the decision under any τ follows
without running the model again. The decision is that of the exit rule (`StageScores.exit_stages`).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..families import family_of, task_of
from ..families.record import IMAGE_SEGMENTATION
from ..image_sizes import recorded_sides
from ..inference.class_scores import class_scores
from ..inference.sliding import (
    ImageViews,
    SlidingResult,
    SlidingWindowSegmenter,
    ViewWindows,
    merge_windows,
    scaled_views,
)
from ..inference.stream import EngineResult
from ..models.configuration_avit import AViTConfig
from ..models.configuration_checks import configured_problem_type
from ..models.configuration_staged import thinks_in_stages
from ..models.exit_rules import answer_entropy
from ..models.image_files import as_rgb
from ..models.staged_run import Answer
from .answers import all_logits, arguments_for_all
from .macs import halting_macs, stage_macs, sub_network_macs
from .stages import StageMeasurements, Threshold, measure_stages
from .token_depths import token_depths
from .token_pictures import undo_normalisation


@dataclass(frozen=True)
class ImageInspection:
    """
    Every answer of a model to one image, without the model.

    Attributes:
        config (`PreTrainedConfig`): the model's.
        entropies (`torch.FloatTensor` of shape `(rows, answers)`): of each answer, in nats. The rows are the windows of
            a segmentation model; a classifier has one row. The answers are those of the stages, or of the sub-networks
            of an elastic model; other models have one.
        macs (`tuple[int]`): multiply-accumulates of a row that ends with each answer.
        full_macs (`int`): of a row without any saving: all stages, the largest sub-network, all tokens in all layers.
        pixels (`np.ndarray` of shape `(height, width, channels)`): the image as the model sees it, 8 bits a channel.
        probabilities (`torch.FloatTensor` of shape `(answers, num_labels)`, *optional*): of a classifier. Of a
            regression, which has none, the predicted values.
        depth (`np.ndarray` of shape `(rows, columns)`, *optional*): layers that each patch runs, where patches leave:
            until an A-ViT halts it, or in the last stage of a model that prunes tokens.
        scores (`StageMeasurements`, *optional*): of the exit criterion, for a model that thinks in stages.
        chosen (`int`): the answer that counts, for other models.
        windows (*optional*): of a segmentation model, the image without its pixels, and its windows.
    """

    config: PreTrainedConfig
    entropies: torch.Tensor
    macs: tuple[int, ...]
    full_macs: int
    pixels: np.ndarray
    probabilities: torch.Tensor | None = None
    depth: np.ndarray | None = None
    scores: StageMeasurements | None = None
    chosen: int = 0
    windows: tuple[ImageViews, list[ViewWindows]] | None = None

    @property
    def num_answers(self) -> int:
        return len(self.macs)

    def exit_stages(self, threshold: Threshold | None = None) -> torch.Tensor:
        """
        The accepted answer of each row under τ (the model's own by default), int64 `(rows,)`. Models that do not think
        in stages have no τ: it is `chosen`. `ValueError` if τ is invalid.
        """
        if self.scores is None:
            return torch.full((len(self.entropies),), self.chosen)
        return self.scores.exit_stages(self.config.threshold if threshold is None else threshold)

    def spent(self, threshold: Threshold | None = None) -> tuple[int, int]:
        """Multiply-accumulates of the image under τ, and those without any saving."""
        stages = self.exit_stages(threshold)
        return sum(self.macs[stage] for stage in stages.tolist()), self.full_macs * len(stages)

    def best(self, answer: int, count: int) -> list[tuple[str, float]]:
        """The labels of the `count` greatest probabilities of an answer, with these. Of a regression, each value."""
        values = self.probabilities[answer]
        if configured_problem_type(self.config) == "regression":
            return [(self.config.id2label[index], value) for index, value in enumerate(values.tolist()[:count])]
        greatest, indices = values.topk(min(count, len(values)))
        return [(self.config.id2label[index], value) for index, value in zip(indices.tolist(), greatest.tolist())]

    def segmented(self, stages: torch.Tensor | Sequence[int]) -> SlidingResult:
        """The merged answer of a segmentation model, for which each window is accepted at one of `stages`."""
        image, views = self.windows
        results = [
            EngineResult(row, logits[stage].float(), stage, entropies[stage])
            for row, (stage, logits, entropies) in enumerate(
                zip(torch.as_tensor(stages).tolist(), self.scores.measures["logits"], self.entropies.tolist())
            )
        ]
        return merge_windows(0, image, views, results, return_probabilities=False)


@torch.no_grad()
def inspect_image(model: PreTrainedModel, processor: BaseImageProcessor, image: Image.Image) -> ImageInspection:
    """
    Compute every answer of a model to an image.

    Args:
        model (`PreTrainedModel`): of this package, with a head; put into evaluation mode.
        processor (`BaseImageProcessor`): its image processor. A segmentation model sees the image in sliding windows,
            resized as it was calibrated or trained where its configuration records that.
        image (`PIL.Image.Image`): of any mode and size.

    Raises:
        ValueError: if the image cannot be read, or the model is not of this package.
    """
    model.eval()
    image = as_rgb(image)
    if task_of(model) == IMAGE_SEGMENTATION:
        return _inspect_windows(model, processor, image)
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    pixels, config = undo_normalisation(pixel_values[0], processor), model.config
    if thinks_in_stages(model):
        measured = measure_stages(model, [{"pixel_values": pixel_values}], _answers, progress=False)
        macs = torch.tensor(stage_macs(config, measured.image_size)).cumsum(0).tolist()
        return ImageInspection(
            config,
            measured.measures["entropy"],
            tuple(macs),
            macs[-1],
            pixels,
            _probabilities(measured.measures["logits"][0], config),
            _depth(model, pixel_values) if getattr(config, "pruning_layers", None) else None,
            measured,
        )
    pixel_values = pixel_values.to(model.device, model.dtype)
    if isinstance(config, AViTConfig):
        outputs = model(pixel_values, output_token_depth=True)
        depth = outputs.token_depth.cpu()
        full = halting_macs(config, torch.full_like(depth, config.num_hidden_layers))
        logits, macs, full_macs, chosen = outputs.logits, (int(outputs.macs[0]),), int(full[0]), 0
        depths = depth[0, config.num_prefix_tokens :].view(config.patch_grid).numpy()
    elif family_of(config).costs.sub_networks is not None:
        outputs = model(pixel_values, **arguments_for_all(model))
        logits, macs, depths = torch.cat(all_logits(outputs)), tuple(sub_network_macs(config)), None
        full_macs, chosen = max(macs), config.default_sub_network
    else:
        raise ValueError(f"{type(model).__name__} has answers that cannot be told apart by their compute.")
    logits = logits.float().cpu()
    entropies, probabilities = answer_entropy(logits, config)[None], _probabilities(logits, config)
    return ImageInspection(config, entropies, macs, full_macs, pixels, probabilities, depths, chosen=chosen)


def _answers(answer: Answer, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"logits": answer["logits"], "entropy": answer["entropy"]}


def _probabilities(logits: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Logits as probabilities: of each label by itself in multi-label classification. Those of a regression as is."""
    return logits.float() if configured_problem_type(config) == "regression" else class_scores(logits, config)


def _depth(model: PreTrainedModel, pixel_values: torch.Tensor) -> np.ndarray:
    return token_depths(model, pixel_values.to(model.device, model.dtype)).depth[0].cpu().numpy()


def _inspect_windows(model: PreTrainedModel, processor: BaseImageProcessor, image: Image.Image) -> ImageInspection:
    """Of a segmentation model: every stage's answer to every window."""
    pixel_values = processor(image, do_resize=False, return_tensors="pt")["pixel_values"][0]
    short_side, long_side = recorded_sides(model.config)
    segmenter, planned = SlidingWindowSegmenter(model), deque()
    views = scaled_views(pixel_values, short_side, long_side=long_side)
    windows = torch.stack(list(segmenter.windows([views], planned)))
    # In parts, so that a large photograph takes no more memory than one batch at a time.
    batches = [{"pixel_values": part} for part in windows.split(segmenter.engine.batch_size)]
    measured = measure_stages(model, batches, _answers, progress=False)
    macs = torch.tensor(stage_macs(model.config, measured.image_size)).cumsum(0).tolist()
    return ImageInspection(
        model.config,
        measured.measures["entropy"],
        tuple(macs),
        macs[-1],
        undo_normalisation(pixel_values, processor),
        scores=measured,
        windows=planned.popleft(),
    )
