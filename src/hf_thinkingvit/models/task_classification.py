"""
Image classification: the output of staged classifiers, the checks of labels, and the loss of one answer, of several
stages' answers, and of a part of a batch.

`Trainer` with gradient accumulation calls a model on parts of a batch, and passes the number of labels of the whole
batch (`num_items_in_batch`). It then sums the gradients without dividing them. So each part's loss, which is a mean,
must be scaled by the part's share of the batch, `share_of_batch`, as must any loss that a model adds to it.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.utils import ModelOutput

from .configuration_checks import configured_problem_type
from .exit_criteria import EXIT_CRITERIA
from .module_arguments import warn_of_outside_loss
from .tasks import Task


IGNORE_INDEX = -100

OUTSIDE_LOSS = (
    "A loss that is computed from `logits` trains the last stage only, which is what `Trainer` does with "
    "`label_smoothing_factor` or `compute_loss_func`. For label smoothing, set `label_smoothing` in the model's "
    "configuration instead. A loss of your own should be computed from every entry of `stage_logits`; call the model "
    "with `output_stage_logits=True` to say so."
)


@dataclass
class StagedImageClassifierOutput(ModelOutput):
    """
    Output of a classifier that answers in stages. Each image has its own exit: its *accepted* stage is the first whose
    answer passes τ, or the last one that may run.

    Args:
        loss (`torch.Tensor` of shape `(1,)`, *optional*, returned when `labels` are given):
            In training mode, the sum over the stages that run of `stage_loss_weights[i]` times the loss of stage i,
            with `label_smoothing`; with `max_stages`, the weights are scaled to keep their sum. In evaluation mode, the
            loss of the accepted logits, without smoothing.
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`):
            Logits of each image's accepted stage, before softmax. In training mode: of the last stage.
        exit_stage (`torch.LongTensor` of shape `(batch_size,)`):
            The accepted stage, counted from 0.
        entropy (`torch.FloatTensor` of shape `(batch_size,)`):
            Entropy in nats of the accepted stage's answer, float32 whatever the model's dtype: over all classes where
            `exit_criterion` is `"entropy"`, of each label averaged over the labels where it is `"mean_binary_entropy"`,
            over the `entropy_top_k` most probable classes otherwise.
        stage_logits (`tuple[torch.Tensor]`, *optional*, returned with `output_stage_logits=True` or in training mode):
            Logits `(batch_size, num_labels)` of every stage that may run (with `sub_network`, of this one alone) for
            every image, also of stages after its exit: asking for them makes all images run all stages. The other
            fields do not change.
        kept_tokens (`tuple[torch.LongTensor]`, *optional*, returned with `output_kept_tokens=True`):
            Of a model that prunes tokens, for each pruning layer the numbers of the patches that remain, counted from 0
            row by row, in descending order of their scores: `(images, kept)`, of the images that ran the last stage, in
            batch order.
        ratio_loss (`torch.Tensor` of shape `(1,)`, *optional*, returned in training mode):
            Of a model that prunes tokens, how far the shares of patches that the predictors keep are from
            `pruning_keep_rate`: a mean of squared differences, unweighted. Part of `loss`.
        keep_decisions (`tuple[torch.FloatTensor]`, *optional*, returned in training mode):
            Of a model that prunes tokens, for each pruning layer 1 where a patch is kept and 0 where it is left out:
            `(batch_size, patches)`, differentiable.
        patch_tokens (`torch.FloatTensor` of shape `(batch_size, patches, width)`, *optional*, in training mode):
            Of a model that prunes tokens, all patches of the last stage after the final LayerNorm.
        hidden_states (`tuple[torch.Tensor]`, *optional*, returned with `output_hidden_states=True`):
            The first stage's input, then each layer's output, stage after stage, for the stages that ran. Entries of
            stage i have the shape `(images, tokens, width of stage i)`, with only the images that ran it: those whose
            `exit_stage >= i`, in batch order. Layers after a pruning layer have fewer tokens. On
            Swin tokens and width are those of the layer of the hierarchy.
        attentions (`tuple[torch.Tensor]`, *optional*, returned with `output_attentions=True`):
            Attention probabilities `(images, heads of stage i, tokens, tokens)`, one per layer and stage that ran, for
            the same images as in `hidden_states`. On Swin one per block and stage: `(images * windows, heads,
            tokens of a window, tokens of a window)`, each image's windows side by side.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    exit_stage: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    stage_logits: tuple[torch.Tensor, ...] | None = None
    kept_tokens: tuple[torch.Tensor, ...] | None = None
    ratio_loss: torch.Tensor | None = None
    keep_decisions: tuple[torch.Tensor, ...] | None = None
    patch_tokens: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def problem_type_of(labels: torch.Tensor, config) -> str:
    """`config.problem_type`; if it is `None`, inferred from `num_labels` and the labels, as in Transformers."""
    problem_type = configured_problem_type(config)
    if problem_type is None:
        problem_type = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    return problem_type


def check_labels(labels: torch.Tensor, batch_size: int, config) -> None:
    """
    Refuse labels that do not fit the batch and `config`: class indices (int64) `(batch_size,)`; for multi-label
    classification floating-point targets `(batch_size, num_labels)` between 0 and 1; for regression floating-point
    targets `(batch_size, num_labels)`, or `(batch_size,)` with one label. Values are checked on the CPU only, because
    reading them from another device would synchronise with it. Class indices and multi-label targets of
    -100 are ignored.

    Raises:
        ValueError: if type, dtype, shape or values do not fit, or the exit criterion is for another kind of
            classification than the labels.
    """
    if not isinstance(labels, torch.Tensor) or not (labels.is_floating_point() or labels.dtype == torch.long):
        got = labels.dtype if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise ValueError(f"`labels` must be a tensor of class indices (torch.long) or of float targets, got {got}.")
    num_labels, problem_type = config.num_labels, problem_type_of(labels, config)
    single = problem_type == "single_label_classification"
    shapes = [(batch_size,)] if single else [(batch_size, num_labels)]
    if problem_type == "regression" and num_labels == 1:
        shapes.insert(0, (batch_size,))
    if tuple(labels.shape) not in shapes:
        raise ValueError(
            f"`labels` must have the shape {' or '.join(map(str, shapes))} for {problem_type} of a batch of "
            f"{batch_size} with {num_labels} labels, got {tuple(labels.shape)} of {labels.dtype}. Class indices are "
            "torch.long of one dimension; floating-point targets are for regression and multi-label classification."
        )
    if single == labels.is_floating_point():
        expected = "class indices (torch.long)" if single else "floating-point targets"
        raise ValueError(f"`labels` must be {expected} for {problem_type}, got {labels.dtype}.")
    criterion = EXIT_CRITERIA.get(getattr(config, "exit_criterion", None))
    if criterion is not None and problem_type != "regression" and criterion.multi_label == single:
        raise ValueError(
            f"`labels` are those of {problem_type}, but `exit_criterion` is {config.exit_criterion!r}, which judges "
            "another kind of answer. Set `problem_type` in the configuration, and with it an `exit_criterion` and a "
            '`threshold`: for multi-label classification `problem_type="multi_label_classification"`, '
            '`exit_criterion="mean_binary_entropy"`.'
        )
    if labels.device.type != "cpu" or problem_type == "regression" or torch.compiler.is_compiling():
        return
    counted = labels[labels != IGNORE_INDEX]
    limit = num_labels - 1 if single else 1
    unknown = counted[~((counted >= 0) & (counted <= limit))]
    if unknown.numel():
        raise ValueError(f"`labels` must lie between 0 and {limit}, got {unknown.unique().tolist()}.")


def share_of_batch(labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | float:
    """
    The share of `labels` in the whole batch of which they are a part; 1.0 if `num_items_in_batch` is `None`.

    Every entry but -100 counts, as in `Trainer`'s `num_items_in_batch`. Multi-label targets have one entry per label,
    so the share is that of the images. The shares of all parts, over accumulation steps and processes, sum to 1.
    """
    if num_items_in_batch is None:
        return 1.0
    items = torch.as_tensor(num_items_in_batch, device=labels.device)
    items = items.reshape(-1)[0]  # under DataParallel, `Trainer` repeats the number for each replica
    return labels.ne(IGNORE_INDEX).sum() / items.clamp(min=1)


def classification_loss(
    labels: torch.Tensor,
    logits: torch.Tensor,
    config,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
    **kwargs,
) -> torch.Tensor:
    r"""
    The loss of one answer, as a loss function of Transformers (`model.loss_function`): cross-entropy, binary
    cross-entropy of each label, or squared error. Unlike Transformers', it smooths labels, computes in float32 whatever
    the dtype of the logits, scales every problem's loss by `num_items_in_batch`, and leaves `config` as it is.

    Args:
        labels (`torch.Tensor`): as `check_labels` accepts them, on any device.
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`, any floating dtype): the answer.
        config (`PreTrainedConfig`): the model's, for `num_labels` and `problem_type`.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): number of labels of the whole batch, if this is a
            part of it; the losses of all parts then sum to the loss of the whole.
        label_smoothing (`float`, *optional*, defaults to 0.0): share of each target that is spread evenly over all
            classes. The models pass `config.label_smoothing` in training mode.
        kwargs: other arguments of a model's `forward`, ignored.

    Returns:
        `torch.Tensor`: a float32 scalar, the mean over the labels that are not -100 (0 if all are).

    Raises:
        ValueError: if `label_smoothing` is above 0 in multi-label classification or regression, which have no other
            classes to spread a target over.
    """
    logits, labels = logits.float(), labels.to(logits.device)
    problem_type = problem_type_of(labels, config)
    if label_smoothing and problem_type != "single_label_classification":
        raise ValueError(
            f"`label_smoothing` is of single-label classification, got {label_smoothing!r} for {problem_type}."
        )
    if problem_type == "regression":
        loss = F.mse_loss(logits.reshape(labels.shape), labels.float())
    else:
        counts = labels != IGNORE_INDEX
        if problem_type == "single_label_classification":
            losses = F.cross_entropy(
                logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing, reduction="sum"
            )
        else:
            losses = F.binary_cross_entropy_with_logits(logits, labels.float(), weight=counts.float(), reduction="sum")
        loss = losses / counts.sum().clamp(min=1)
    return loss * share_of_batch(labels, num_items_in_batch)


class ImageClassificationTask(Task):
    """
    One answer per image, `{"logits": (images, num_labels)}`, for single-label and multi-label classification and for
    regression. Models implement `answer`, which applies their classifier to their features.
    """

    output_class = StagedImageClassifierOutput
    _loss_function = staticmethod(classification_loss)  # the default of `loss_function`, which users may set

    def check_labels(self, labels: torch.Tensor, batch_size: int) -> None:
        check_labels(labels, batch_size, self.config)

    def outside_loss(self, stages: range) -> str | None:
        """What a loss of `logits` alone leaves out where `stages` are trained, and what to do; `None` if nothing."""
        return OUTSIDE_LOSS if len(stages) > 1 else None

    def check_call(
        self,
        pixel_values: torch.Tensor | None,
        labels: torch.Tensor | None,
        stages: range,
        output_stage_logits: bool | None,
    ) -> None:
        """
        `ValueError` for labels that do not fit, before anything is computed. And a warning, once, of training without
        labels, where the loss may leave out something (`outside_loss`).
        """
        if labels is None:
            message = self.outside_loss(stages)
            if message is not None and not output_stage_logits:
                warn_of_outside_loss(self, message)
        elif pixel_values is not None and pixel_values.dim() == 4:  # `begin` refuses other pixels
            self.check_labels(labels, len(pixel_values))


__all__ = [
    "ImageClassificationTask",
    "StagedImageClassifierOutput",
    "check_labels",
    "classification_loss",
    "problem_type_of",
    "share_of_batch",
]
