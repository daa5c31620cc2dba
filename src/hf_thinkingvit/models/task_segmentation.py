"""
Semantic segmentation: logits for each patch, the output of staged segmentation models, the checks of masks, the loss.

As in Transformers' segmentation models, logits are at the patch grid; who needs pixels resizes them bilinearly. The
images are padded to whole patches, so the resized logits are cut to the size of the image.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.utils import ModelOutput

from .configuration_checks import as_pair
from .exit_scores import mean_pixel_entropy
from .staged_run import Answer
from .task_classification import share_of_batch
from .tasks import Task


@dataclass
class StagedSemanticSegmenterOutput(ModelOutput):
    """
    Output of a segmentation model that answers in stages. Each image has its own exit: its *accepted* stage is the
    first whose answer passes τ, or the last one that may run. `rows` and `columns` are those of the patches of the
    images, padded to whole patches.

    Args:
        loss (`torch.Tensor`, *optional*, returned when `labels` are given):
            In training mode, the sum over the stages that run of `stage_loss_weights[i]` times the loss of stage i,
            with `label_smoothing`; with `max_stages`, the weights are scaled to keep their sum. In evaluation mode, the
            loss of the accepted logits, without smoothing.
        logits (`torch.Tensor` of shape `(batch_size, num_labels, rows, columns)`):
            Of each image's accepted stage. In training mode, of the last stage that runs.
        exit_stage (`torch.LongTensor` of shape `(batch_size,)`):
            The accepted stage of each image, counted from 0. In training mode, the last one.
        entropy (`torch.Tensor` of shape `(batch_size,)`, float32):
            Mean entropy of the accepted answer, in nats, over pixels or patches as `config.exit_criterion` says. It
            carries no gradient where it is over pixels.
        stage_logits (`tuple[torch.Tensor]`, *optional*, in training mode or with `output_stage_logits=True`):
            Logits `(batch_size, num_labels, rows, columns)` of every stage that runs, for every image.
        hidden_states, attentions (*optional*): of the backbone, as in [`StagedImageClassifierOutput`].
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    exit_stage: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    stage_logits: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def pad_to_patches(pixel_values: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """Images `(batch_size, num_channels, height, width)` with zeros right and below, up to whole patches."""
    height, width = pixel_values.shape[2:]
    if height == 0 or width == 0:
        raise ValueError(f"`pixel_values` must have at least one pixel, got {height}×{width}.")
    below, right = -height % patch_size[0], -width % patch_size[1]
    return F.pad(pixel_values, (0, right, 0, below)) if below or right else pixel_values


def check_mask_size(labels: torch.Tensor, pixel_values: torch.Tensor) -> None:
    """`ValueError` unless `labels` are one mask for each image, of the image's own height and width."""
    expected = (pixel_values.shape[0], *pixel_values.shape[2:])
    if not isinstance(labels, torch.Tensor) or tuple(labels.shape) != expected:
        got = tuple(labels.shape) if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise ValueError(
            f"`labels` must have the shape (batch_size, height, width) = {expected} of `pixel_values`, a class index "
            f"for each pixel, got {got}. Resize masks with their images, by nearest neighbour; a mask with a dimension "
            "of colours must be read as indices."
        )


def check_masks(labels: torch.Tensor, config) -> None:
    """
    Refuse masks whose dtype or values do not fit `config`. Values are checked on the CPU only: reading them elsewhere
    would wait for the device.

    Raises:
        ValueError: for another dtype, or a value that is neither a class nor `config.semantic_loss_ignore_index`.
    """
    ignore_index, num_labels = config.semantic_loss_ignore_index, config.num_labels
    if labels.dtype != torch.long:
        raise ValueError(f"`labels` must be class indices (torch.long) for each pixel, got {labels.dtype}.")
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    unknown = ((labels < 0) | (labels >= num_labels)) & (labels != ignore_index)
    if unknown.any():
        image, row, column = unknown.nonzero()[0].tolist()
        values = labels[unknown].unique().tolist()
        more = f", and {len(values) - 10} other values" if len(values) > 10 else ""
        raise ValueError(
            f"`labels` must lie between 0 and {num_labels - 1}, or be {ignore_index} for pixels that do not count "
            f"(`semantic_loss_ignore_index`), got {values[:10]}{more} in {int(unknown.sum())} pixels, the first in "
            f"image {image} at row {row}, column {column}."
        )


def resize_logits(logits: torch.Tensor, patch_size: tuple[int, int], image_size: tuple[int, int]) -> torch.Tensor:
    """
    Logits of the patches, resized to pixels as the official code does.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_labels, rows, columns)`): of the padded images.
        patch_size (`tuple[int, int]`): (height, width) of a patch.
        image_size (`tuple[int, int]`): (height, width) of the images before they were padded.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_labels, height, width)`.
    """
    padded_size = tuple(count * side for count, side in zip(logits.shape[2:], patch_size))
    resized = F.interpolate(logits, size=padded_size, mode="bilinear", align_corners=False)
    return resized[..., : image_size[0], : image_size[1]]


def semantic_segmentation_loss(
    labels: torch.Tensor,
    logits: torch.Tensor,
    config,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
    **kwargs,
) -> torch.Tensor:
    r"""
    The loss of one answer, as a loss function of Transformers (`model.loss_function`): cross-entropy of the logits
    resized to pixels, in float32, averaged over the pixels that count.

    Args:
        labels (`torch.LongTensor` of shape `(batch_size, height, width)`): class indices, on any device.
        logits (`torch.Tensor` of shape `(batch_size, num_labels, rows, columns)`, any floating dtype): of the patches.
        config (`PreTrainedConfig`): of the model, for `patch_size` and `semantic_loss_ignore_index`.
        num_items_in_batch, label_smoothing (*optional*): as in `classification_loss`. `Trainer` counts pixels that do
            not count as well, so that accumulated parts weigh as their sizes, not as their pixels that count.
        kwargs: other arguments of a model's `forward`, ignored.

    Returns:
        `torch.Tensor`: a float32 scalar, 0 where no pixel counts.
    """
    labels, ignore_index = labels.to(logits.device), config.semantic_loss_ignore_index
    logits = resize_logits(logits.float(), as_pair(config.patch_size), labels.shape[1:])
    losses = F.cross_entropy(
        logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum"
    )
    loss = losses / (labels != ignore_index).sum().clamp(min=1)
    return loss * share_of_batch(labels, num_items_in_batch)


class SemanticSegmentationTask(Task):
    """
    A class for each patch, `{"logits": (images, num_labels, rows, columns)}`. Models say in `answer` how their decoder
    reads it, and end with `dense_answer`.
    """

    reads_all_tokens = True
    output_class = StagedSemanticSegmenterOutput
    _loss_function = staticmethod(semantic_segmentation_loss)  # behind `loss_function`, which users may set

    def dense_answer(self, logits: torch.Tensor) -> Answer:
        """The answer with these logits, with its `entropy` where the exit criterion is one over pixels."""
        if self.config.exit_criterion != "mean_pixel_entropy":
            return {"logits": logits}
        return {"logits": logits, "entropy": mean_pixel_entropy(logits, as_pair(self.config.patch_size))}

    def check_labels(self, labels: torch.Tensor, batch_size: int) -> None:
        check_masks(labels, self.config)


__all__ = [
    "SemanticSegmentationTask",
    "StagedSemanticSegmenterOutput",
    "check_mask_size",
    "check_masks",
    "pad_to_patches",
    "resize_logits",
    "semantic_segmentation_loss",
]
