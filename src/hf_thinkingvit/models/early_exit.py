"""
Run a stage, decide, go on: the one loop of every model that thinks in stages.

A staged classifier provides three steps, each on a *state*, a dict of tensors whose first dimension is the image:

* `begin(pixel_values)`: what is computed once per image; it refuses images that the stages to run cannot take;
* `run_stage(index, state)`: the stage's logits, and the state as the stage leaves it;
* `recycle(index, state)`: for the images that go on, the state with which stage `index + 1` starts.

The loop here knows nothing of layers or heads; the steps know nothing of thresholds. Whoever schedules stages in
another way (one batch at a time here, queues per stage elsewhere) uses the same three steps and the same `ExitRule`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .compiled_stages import CompiledStagesMixin
from .exit_criteria import ExitRule


State = dict[str, torch.Tensor]


@dataclass
class StagedImageClassifierOutput(ModelOutput):
    """
    Output of a classifier that answers in stages. Each image has its own exit: its *accepted* stage is the first whose
    answer passes τ, or the last one that may run.

    Args:
        loss (`torch.Tensor` of shape `(1,)`, *optional*, returned when `labels` are given):
            In training mode, the sum over all stages of `stage_loss_weights[i]` times the loss of stage i. In
            evaluation mode, the loss of the accepted logits.
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`):
            Logits of each image's accepted stage, before softmax. In training mode: of the last stage.
        exit_stage (`torch.LongTensor` of shape `(batch_size,)`):
            The accepted stage, counted from 0.
        entropy (`torch.FloatTensor` of shape `(batch_size,)`):
            Entropy in nats of the accepted stage's answer, float32 whatever the model's dtype: over all classes where
            `exit_criterion` is `"entropy"`, over the `entropy_top_k` most probable otherwise.
        stage_logits (`tuple[torch.Tensor]`, *optional*, returned with `output_stage_logits=True` or in training mode):
            Logits `(batch_size, num_labels)` of every stage for every image, also of stages after its exit: asking for
            them makes all images run all stages. The other fields do not change.
        hidden_states (`tuple[torch.Tensor]`, *optional*, returned with `output_hidden_states=True`):
            The first stage's input, then each layer's output, stage after stage, for the stages that ran. Entries of
            stage i have the shape `(images, tokens, width of stage i)`, with only the images that ran it: those whose
            `exit_stage >= i`, in batch order. On Swin tokens and width are those of the layer of the hierarchy.
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
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def select_rows(state: State, rows: torch.Tensor) -> State:
    """The state of the images `rows` (int64 indices), as a smaller batch."""
    return {name: tensor.index_select(0, rows) for name, tensor in state.items()}


def resolve_max_stages(max_stages: int | None, num_stages: int) -> int:
    """How many of `num_stages` may run; `ValueError` for what is no integer from 1 to that."""
    if max_stages is None:
        return num_stages
    if isinstance(max_stages, bool) or not isinstance(max_stages, int) or not 1 <= max_stages <= num_stages:
        raise ValueError(
            f"`max_stages` must be an integer from 1 to {num_stages}, the number of stages of this model, "
            f"got {max_stages!r}."
        )
    return max_stages


def check_labels(labels: torch.Tensor, batch_size: int, config) -> None:
    """`ValueError` for labels of a shape, or class indices on the CPU, that do not fit the batch and `config`."""
    num_labels, problem_type = config.num_labels, config.problem_type
    if not isinstance(labels, torch.Tensor) or not (labels.is_floating_point() or labels.dtype == torch.long):
        got = labels.dtype if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise ValueError(f"`labels` must be a tensor of class indices (torch.long) or of float targets, got {got}.")
    is_index = not labels.is_floating_point()
    if problem_type is None and num_labels > 1:
        problem_type = "single_label_classification" if is_index else "multi_label_classification"
    shapes = [(batch_size,)]
    if problem_type == "multi_label_classification" or (num_labels > 1 and problem_type == "regression"):
        shapes = [(batch_size, num_labels)]
    elif num_labels == 1:
        shapes = [(batch_size,), (batch_size, 1)]
    if tuple(labels.shape) not in shapes:
        raise ValueError(
            f"`labels` must have the shape {' or '.join(map(str, shapes))} for a batch of {batch_size} and "
            f"{num_labels} labels, got {tuple(labels.shape)} of {labels.dtype}."
        )
    # Only on the CPU: elsewhere reading the values would wait for the device.
    if problem_type == "single_label_classification" and labels.device.type == "cpu":
        unknown = labels[(labels != -100) & ((labels < 0) | (labels >= num_labels))]
        if unknown.numel():
            raise ValueError(f"`labels` must lie between 0 and {num_labels - 1}, got {unknown.unique().tolist()}.")


class StagedImageClassifierMixin(CompiledStagesMixin):
    """
    `forward` of an image classifier that thinks in stages, for a `PreTrainedModel` with `begin`, `run_stage` and
    `recycle` (see this module's opening), which `compilable_step` marks as steps that `compile_stages` compiles.
    """

    def begin(self, pixel_values: torch.Tensor, **kwargs) -> State:
        raise NotImplementedError

    def run_stage(self, stage_index: int, state: State, is_last: bool = False, **kwargs) -> tuple[torch.Tensor, State]:
        raise NotImplementedError

    def recycle(self, stage_index: int, state: State, **kwargs) -> State:
        raise NotImplementedError

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        threshold: float | Sequence[float] | None = None,
        max_stages: int | None = None,
        output_stage_logits: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> StagedImageClassifierOutput:
        r"""
        In evaluation mode an image leaves after the first stage whose answer passes τ, and only the others are computed
        further. In training mode every image runs every stage.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Images, as the image processor returns them.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Class indices. With one label (`config.num_labels == 1`) a float target for regression; a float tensor
                `(batch_size, num_labels)` for multi-label classification.
            threshold (`float` or `list[float]`, *optional*):
                τ for this call, instead of `config.threshold`.
            max_stages (`int`, *optional*):
                Run at most this many stages, from 1 to the number that the model has; the last of them always answers.
            output_stage_logits (`bool`, *optional*):
                Return every stage's logits for every image, which makes all of them run.
            interpolate_pos_encoding (`bool`, *optional*):
                Accept images of another size than `config.image_size`, and interpolate the position embeddings. Where
                there are none (Swin, unless `config.use_absolute_embeddings`), other sizes are accepted anyway.

        Returns:
            [`StagedImageClassifierOutput`]

        Raises:
            ValueError: for pixel values, labels, `threshold` or `max_stages` that do not fit the model.
        """
        rule = ExitRule.from_config(self.config, threshold)
        num_stages = resolve_max_stages(max_stages, self.config.num_stages)
        # Every stage for every image, with the accepted answer picked afterwards, where all answers are wanted.
        run_all = self.training or bool(output_stage_logits)

        state = self.begin(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, max_stages=max_stages, **kwargs
        )
        if labels is not None:
            check_labels(labels, pixel_values.shape[0], self.config)
        logits = exit_stage = entropy = None
        stage_logits: list[torch.Tensor] = []
        rows = None  # indices in the batch of the images still running; None: all of them
        undecided = None  # for run_all: images whose answer has not been accepted yet

        for index in range(num_stages):
            is_last = index == num_stages - 1
            answer, state = self.run_stage(index, state, is_last=is_last, **kwargs)
            answer_entropy, exits = rule.judge(index, answer)
            stage_logits.append(answer)

            if index == 0:
                logits, entropy = answer, answer_entropy
                exit_stage = torch.zeros(answer.shape[0], dtype=torch.long, device=answer.device)
                undecided = torch.ones_like(exit_stage, dtype=torch.bool)
            elif run_all:
                logits = torch.where(undecided[:, None], answer, logits)
                entropy = torch.where(undecided, answer_entropy, entropy)
                exit_stage = torch.where(undecided, index, exit_stage)
            elif rows is None:
                logits, entropy = answer, answer_entropy
                exit_stage = torch.full_like(exit_stage, index)
            else:
                logits = logits.index_copy(0, rows, answer)
                entropy = entropy.index_copy(0, rows, answer_entropy)
                exit_stage = exit_stage.index_fill(0, rows, index)

            if is_last:
                break
            if run_all:
                if not self.training:
                    undecided = undecided & ~exits
            else:
                going_on = (~exits).nonzero().squeeze(1)  # the one host synchronisation per exit
                if going_on.numel() == 0:
                    break
                if going_on.numel() < answer.shape[0]:
                    state = select_rows(state, going_on)
                    rows = going_on if rows is None else rows[going_on]
            state = self.recycle(index, state, **kwargs)

        loss = None
        if labels is not None and self.training:
            loss = self._training_loss(labels, stage_logits, **kwargs)
        elif labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        return StagedImageClassifierOutput(
            loss=loss,
            logits=logits,
            exit_stage=exit_stage,
            entropy=entropy,
            stage_logits=tuple(stage_logits) if run_all else None,
        )

    def _training_loss(self, labels: torch.Tensor, stage_logits: Sequence[torch.Tensor], **kwargs) -> torch.Tensor:
        """Weighted sum of the stages' losses (ThinkingViT paper, training objective)."""
        losses = [self.loss_function(labels, logits, self.config, **kwargs) for logits in stage_logits]
        weights = self.config.stage_loss_weights or [1.0 / len(losses)] * len(losses)
        return sum(weight * loss for weight, loss in zip(weights, losses))
