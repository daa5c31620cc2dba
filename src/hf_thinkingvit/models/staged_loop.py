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

from .exit_rules import ExitRule
from .module_arguments import check_arguments, warn_of_outside_loss
from .staged_compilation import CompiledStagesMixin
from .task_classification import check_labels, classification_loss, loss_arguments, weights_of_stages


State = dict[str, torch.Tensor]

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


class StagedImageClassifierMixin(CompiledStagesMixin):
    """
    `forward` of an image classifier that thinks in stages, for a `PreTrainedModel` with `begin`, `run_stage` and
    `recycle` (see this module's opening), which `compilable_step` marks as steps that `compile_stages` compiles.
    """

    _loss_function = staticmethod(classification_loss)  # behind `loss_function`, which users may set

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
                Class indices, of which -100 is ignored. With one label (`config.num_labels == 1`) a float target for
                regression; with `config.problem_type = "multi_label_classification"` a float tensor
                `(batch_size, num_labels)`. In training mode without labels a warning says, once, that a loss computed
                outside should be one of `stage_logits`; `output_stage_logits=True` says that it is.
            threshold (`float` or `list[float]`, *optional*):
                τ for this call, instead of `config.threshold`: Python's or NumPy's numbers, an array or a tensor.
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
            TypeError: for arguments that neither the model nor Transformers knows.
        """
        check_arguments(self, kwargs)
        rule = ExitRule.from_config(self.config, threshold)
        num_stages = resolve_max_stages(max_stages, self.config.num_stages)
        # Every stage for every image, with the accepted answer picked afterwards, where all answers are wanted.
        run_all = self.training or bool(output_stage_logits)
        if labels is None and num_stages > 1 and not output_stage_logits:
            warn_of_outside_loss(self, OUTSIDE_LOSS)

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
            loss = self.loss_function(labels, logits, self.config, **loss_arguments(self, kwargs))
        return StagedImageClassifierOutput(
            loss=loss,
            logits=logits,
            exit_stage=exit_stage,
            entropy=entropy,
            stage_logits=tuple(stage_logits) if run_all else None,
        )

    def _training_loss(self, labels: torch.Tensor, stage_logits: Sequence[torch.Tensor], **kwargs) -> torch.Tensor:
        """Weighted sum of the stages' losses (ThinkingViT paper, training objective)."""
        weights = weights_of_stages(self.config.stage_loss_weights, len(stage_logits))
        kwargs = loss_arguments(self, kwargs)
        losses = [self.loss_function(labels, logits, self.config, **kwargs) for logits in stage_logits]
        return sum(weight * loss for weight, loss in zip(weights, losses))
