"""Distillation from a teacher (DeiT, arXiv 2012.12877, section 4), and the preprocessing and labels of the teacher."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Literal

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import ModelOutput

from ..models.configuration_staged import thinks_in_stages
from .labels import first_difference, label_names, match_labels
from .preprocessing import load_image_processor, read_preprocessing


if TYPE_CHECKING:
    from .config import TrainingConfig


def teacher_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, kind: Literal["hard", "soft"], temperature: float = 1.0
) -> torch.Tensor:
    """
    The distillation loss of `logits` and `teacher_logits`, both of shape `(batch_size, num_labels)`: a scalar.

    `"hard"`: cross-entropy with the teacher's most probable class. `"soft"`: Kullback-Leibler divergence from the
    teacher's distribution, both softened by `temperature`, times `temperature`², so that the size of the gradients does
    not depend on it.

    Raises:
        ValueError: for another `kind`.
    """
    if kind == "hard":
        return F.cross_entropy(logits, teacher_logits.argmax(dim=-1))
    if kind != "soft":
        raise ValueError(f'`kind` must be "hard" or "soft", got {kind!r}.')
    log_probabilities = F.log_softmax(logits.float() / temperature, dim=-1)
    target = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(log_probabilities, target, reduction="batchmean", log_target=True) * temperature**2


def token_distance(tokens: torch.Tensor, teacher_tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """
    The mean squared difference of tokens `(batch_size, tokens, width)` over the kept ones and all channels: a float32
    scalar, 0 where none is kept. `kept` `(batch_size, tokens)` is 1 for kept tokens and 0 for others; no gradient goes
    there.
    """
    squares = (tokens.float() - teacher_tokens.float()).square().mean(dim=-1)
    kept = kept.detach().round()
    return (squares * kept).sum() / kept.sum().clamp(min=1)


class Teacher(nn.Module):
    r"""
    A frozen image classifier in evaluation mode that takes the student's batches: it normalises and resizes pixels as
    its own image processor does, and orders its logits as the student's labels.

    Args:
        model (`PreTrainedModel`):
            Any Transformers image classifier.
        image_processor (`BaseImageProcessor`, *optional*):
            The teacher's, as `AutoImageProcessor` loads it. Without it, the teacher gets the student's pixels
            unchanged, which is right only if both models expect the same preprocessing.
        image_mean, image_std (`list[float]`, *optional*):
            The student's normalisation, for pixel values between 0 and 1. Needed with `image_processor`.
        image_size (`int` or `(height, width)`, *optional*):
            Size of the student's images in pixels. Needed with `image_processor`. The teacher gets the size that its
            processor makes of such images, by resizing (bilinear or bicubic, antialiased) without cropping: a training
            crop is not cropped again.
        id2label (`dict[int, str]`, *optional*):
            The student's labels. Without them, both models must have the same labels in the same order.
        label_map (`str`, *optional*, defaults to `"name"`):
            How labels are paired, by `"name"` or by `"index"`; see `match_labels`.

    Raises:
        ValueError: if the teacher has other labels, or its processor does more than resize, crop, scale and shift.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        image_processor: BaseImageProcessor | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        image_size: int | tuple[int, int] | None = None,
        id2label: Mapping[int, str] | None = None,
        label_map: str = "name",
    ):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.size: tuple[int, int] | None = None
        self.by_number = False
        order = None if id2label is None else self._order_of(label_names(id2label), label_map)
        self.register_buffer("order", order, persistent=False)
        scale = shift = None
        if image_processor is not None:
            if image_mean is None or image_std is None or image_size is None:
                raise ValueError(
                    "A teacher's `image_processor` needs the student's `image_mean`, `image_std`, `image_size`."
                )
            own = read_preprocessing(image_processor, image_size, model.name_or_path or type(model).__name__)
            self.size, self.resample = own.image_size, own.resample
            # (x · std + mean − own_mean) / own_std as one scale and one shift per channel.
            mean, std, own_mean, own_std = (
                torch.tensor(values, dtype=torch.float64)[:, None, None]
                for values in (image_mean, image_std, own.image_mean, own.image_std)
            )
            scale, shift = (std / own_std).float(), ((mean - own_mean) / own_std).float()
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def _order_of(self, names: list[str], label_map: str) -> torch.Tensor | None:
        """The teacher's class index of each label, int64 `(num_labels,)`; `None` if both orders are the same."""
        own = label_names(self.model.config.id2label)
        if len(own) != len(names):
            raise ValueError(f"The teacher has {len(own)} labels, the student {len(names)}: they must be the same.")
        match = match_labels(names, own, label_map)
        if match is None:
            index, name, other = first_difference(names, own)
            raise ValueError(
                f"The teacher's labels are not the student's: {index} is {other!r} there and {name!r} here. "
                'If both number the same classes under other names, `label_map` "index" pairs them by number.'
            )
        self.by_number = match.by_number
        return None if match.same_order else torch.tensor(match.order)

    def train(self, mode: bool = True) -> "Teacher":
        """Does nothing: a teacher stays in evaluation mode."""
        return self

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits `(batch_size, num_labels)` of the student's `pixel_values` `(batch_size, channels, height, width)`."""
        logits = self.model(self.preprocess(pixel_values)).logits
        return logits if self.order is None else logits[:, self.order]

    @torch.no_grad()
    def answer_and_tokens(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Logits as of `forward`, and the final tokens `(batch_size, tokens, width)`, of a teacher whose classifier reads
        the class token of its bare model, such as ThinkingViT.
        """
        stages = {"max_stages": self.model.config.num_stages} if thinks_in_stages(self.model) else {}
        tokens = self.model.base_model(self.preprocess(pixel_values), **stages).last_hidden_state
        logits = self.model.classifier(tokens[:, 0])
        return logits if self.order is None else logits[:, self.order], tokens

    @torch.no_grad()
    def answer_and_hidden_states(
        self, pixel_values: torch.Tensor, sub_networks: Sequence[int]
    ) -> list[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
        """
        Of an elastic ViT, for each of its `sub_networks`, which have the full width and run all layers: logits as of
        `forward`, and the input of the first layer and the output of each, `(batch_size, tokens, width)`.
        """
        arguments = {"sub_network": list(sub_networks), "output_hidden_states": True}
        outputs = self.model(self.preprocess(pixel_values), **arguments)
        embeddings, *states = outputs.hidden_states
        logits = [each if self.order is None else each[:, self.order] for each in outputs.sub_network_logits]
        states, count = iter(states), self.model.config.num_hidden_layers
        return [(each, (embeddings, *islice(states, count))) for each in logits]

    def preprocess(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalise and resize the student's pixels as the teacher expects them, and cast them to its dtype."""
        if self.scale is not None:
            pixel_values = pixel_values.float() * self.scale + self.shift
            if pixel_values.shape[-2:] != self.size:
                mode = "bilinear" if self.resample == Image.Resampling.BILINEAR else "bicubic"
                pixel_values = F.interpolate(pixel_values, size=self.size, mode=mode, antialias=True)
        return pixel_values.to(self.model.dtype)


def load_teacher(
    config: "TrainingConfig", model_config: PreTrainedConfig, device: torch.device, report: Callable[[str], None]
) -> Teacher | None:
    """
    Load `config.teacher` to `device`; `None` if the run has no teacher.

    Args:
        config (`TrainingConfig`): of the run, with the student's normalisation.
        model_config (`PreTrainedConfig`): of the student.
        report (`Callable`): called with a message if labels are paired by number or reordered.

    Raises:
        ValueError: if the teacher has other labels, or no image processor.
    """
    if config.teacher is None:
        return None
    processor = load_image_processor(config.teacher)
    if processor is None:
        raise ValueError(
            f"The teacher `{config.teacher}` has no image processor (preprocessor_config.json), so nothing says which "
            "normalisation and size it expects: save one with it, for instance "
            "`evaluation_image_processor(224).save_pretrained(folder)`."
        )
    model = AutoModelForImageClassification.from_pretrained(config.teacher, dtype=torch.float32)
    teacher = Teacher(
        model,
        processor,
        config.image_mean,
        config.image_std,
        model_config.image_size,
        id2label=model_config.id2label,
        label_map=config.label_map,
    )
    if teacher.by_number:
        report(f"the labels of the teacher `{config.teacher}` are taken by number")
    elif teacher.order is not None:
        report(f"the teacher `{config.teacher}` has the same labels in another order: its answers are reordered")
    return teacher.to(device)


def as_teacher(teacher: PreTrainedModel | Teacher) -> Teacher:
    """`teacher` as a `Teacher`; a bare model gets the student's pixels and must have its labels in the same order."""
    return teacher if isinstance(teacher, Teacher) else Teacher(teacher)


class DistillationLoss(nn.Module):
    r"""
    The training loss of a distilled model with a teacher: the class head learns from the labels, the distillation head
    from the teacher. Other terms of the model's own loss (A-ViT's ponder and prior losses) are added unchanged.

    Args:
        teacher (`Teacher` or `PreTrainedModel`):
            Any Transformers image classifier, in a `Teacher` that knows its image processor and its labels. A bare
            model gets the student's pixels unchanged, and must have the same labels in the same order, of which only
            the number can be checked here. It is put into evaluation mode and frozen.
        kind (`"hard"` or `"soft"`, *optional*, defaults to `"hard"`):
            See `teacher_loss`.
        weight (`float`, *optional*, defaults to 0.5):
            Weight of the teacher's loss in the task loss, from 0 to 1; that of the labels' loss is 1 - `weight`.
        temperature (`float`, *optional*, defaults to 3.0):
            Temperature of soft distillation.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Label smoothing of the labels' loss.

    Example:

    ```python
    >>> teacher = Teacher(
    ...     AutoModelForImageClassification.from_pretrained("microsoft/resnet-50"),
    ...     AutoImageProcessor.from_pretrained("microsoft/resnet-50"),
    ...     image_mean=processor.image_mean,  # the student's
    ...     image_std=processor.image_std,
    ...     image_size=student.config.image_size,
    ...     id2label=student.config.id2label,
    ... )
    >>> distillation = DistillationLoss(teacher)
    >>> outputs = student(pixel_values, labels=labels)  # in training mode
    >>> distillation(outputs, pixel_values, labels).backward()
    ```"""

    def __init__(
        self,
        teacher: Teacher | PreTrainedModel,
        kind: Literal["hard", "soft"] = "hard",
        weight: float = 0.5,
        temperature: float = 3.0,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        if kind not in ("hard", "soft"):
            raise ValueError(f'`kind` must be "hard" or "soft", got {kind!r}.')
        if not 0.0 <= weight <= 1.0:
            raise ValueError(f"`weight` must be between 0 and 1, got {weight!r}.")
        if not temperature > 0.0:
            raise ValueError(f"`temperature` must be above 0, got {temperature!r}.")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"`label_smoothing` must be between 0 and 1, got {label_smoothing!r}.")
        self.teacher = as_teacher(teacher)
        self.kind, self.weight, self.temperature = kind, weight, temperature
        self.label_smoothing = label_smoothing

    def train(self, mode: bool = True) -> "DistillationLoss":
        """The teacher stays in evaluation mode."""
        self.training = mode
        return self

    def forward(self, outputs: ModelOutput, pixel_values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        The model's own loss with `task_loss` in place of its task loss, a scalar.

        Args:
            outputs (`ModelOutput`): the student's, called with `labels` in training mode.
            pixel_values (`torch.Tensor`): the images, for the teacher.
            labels (`torch.LongTensor` of shape `(batch_size,)`): class indices.

        Raises:
            ValueError: if the student has no distillation head, or other labels than the teacher.
        """
        task_loss = self.task_loss(outputs, pixel_values, labels)
        return outputs.loss - outputs.task_loss + task_loss

    def task_loss(self, outputs: ModelOutput, pixel_values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The weighted mean of the class head's loss and the distillation head's. Arguments as of `forward`."""
        if outputs.get("distillation_logits") is None or outputs.get("task_loss") is None:
            raise ValueError("`outputs` must be of a distilled model, called with `labels` in training mode.")
        teacher_logits = self.teacher(pixel_values)
        if teacher_logits.shape != outputs.distillation_logits.shape:
            raise ValueError(
                f"The teacher has {teacher_logits.shape[-1]} labels, the student "
                f"{outputs.distillation_logits.shape[-1]}: they must be the same."
            )
        from_labels = F.cross_entropy(outputs.cls_logits, labels, label_smoothing=self.label_smoothing)
        from_teacher = teacher_loss(outputs.distillation_logits, teacher_logits, self.kind, self.temperature)
        return (1.0 - self.weight) * from_labels + self.weight * from_teacher
