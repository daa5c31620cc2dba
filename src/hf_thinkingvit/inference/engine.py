"""
Full batches at every stage: images wait in one queue per stage until a batch of them has come together.

Inside one batch, early exit leaves later stages with the few images that go on, and small batches waste the hardware.
The engine takes a stream instead: what goes on from many batches is run together. It knows stages and exits, and
nothing of layers or families; a model that does not think in stages has one.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..models.exit_rules import ExitRule, answer_entropy
from ..models.staged_loop import State, resolve_max_stages, select_rows
from .stream import EngineResult, EngineStats, Stream


class _WholeModel:
    """A model that does not think in stages, as one that has a single stage."""

    num_stages = 1

    def __init__(self, model: PreTrainedModel, **kwargs):
        self.model, self.kwargs = model, kwargs

    def begin(self, pixel_values: torch.Tensor, **kwargs) -> State:
        return {"pixel_values": pixel_values}

    def run_stage(self, stage_index: int, state: State, is_last: bool) -> tuple[torch.Tensor, State]:
        return self.model(**state, **self.kwargs).logits, state


class AdaptiveEngine:
    r"""
    Classifies a stream of images with full batches at every stage.

    Args:
        model (`PreTrainedModel`):
            A classifier of this package, on its device; put into evaluation mode. Several engines may share it, each in
            a thread of its own.
        processor (`BaseImageProcessor`, *optional*):
            For inputs that are images or paths. Without one they must be tensors `(channels, height, width)`.
        batch_size (`int`, *optional*, defaults to 64):
            Images of a full batch, at every stage. Where memory runs out, the rest of the stream runs in halves of the
            batch that failed, with a warning, and so on down to single images; then it is an error.
        threshold, max_stages, interpolate_pos_encoding (*optional*):
            As in the model's `forward`. Answers that are not finite (from pixels that are not) pass no τ: such images
            run every stage, and their entropy is NaN.
        in_order (`bool`, *optional*, defaults to `True`):
            Yield results in input order; else as they finish.
        max_wait (`float`, *optional*):
            Seconds after which an image no longer waits for a batch to fill up. By default it waits.
        max_pending (`int`, *optional*):
            With `in_order`, how many finished images may wait for one before them; then stages run with what they have.
            By default 16 batches. What waits for a stage is always below two batches, as is what is read ahead: memory
            is bounded, however long the stream.
        on_error (`"raise"` or `"return"`, *optional*, defaults to `"raise"`):
            What becomes of an image that cannot be read.

    Attributes:
        stats (`EngineStats`): of the stream that runs or ran last.

    Example:

    ```python
    >>> engine = AdaptiveEngine(model, processor, batch_size=128)
    >>> for result in engine(paths):
    ...     print(paths[result.index], result.logits.argmax().item(), result.exit_stage)
    ```"""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: BaseImageProcessor | None = None,
        *,
        batch_size: int = 64,
        threshold: float | Sequence[float] | None = None,
        max_stages: int | None = None,
        interpolate_pos_encoding: bool | None = None,
        in_order: bool = True,
        max_wait: float | None = None,
        max_pending: int | None = None,
        on_error: Literal["raise", "return"] = "raise",
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")
        if max_wait is not None and not max_wait >= 0:
            raise ValueError(f"`max_wait` must be at least 0 seconds, got {max_wait!r}.")
        if max_pending is not None and max_pending < 1:
            raise ValueError(f"`max_pending` must be at least 1, got {max_pending!r}.")
        if on_error not in ("raise", "return"):
            raise ValueError(f'`on_error` must be "raise" or "return", got {on_error!r}.')
        self.model, self.processor, self.batch_size = model.eval(), processor, batch_size
        self.in_order, self.max_wait, self.on_error = in_order, max_wait, on_error
        self.max_pending = 16 * batch_size if max_pending is None else max_pending
        self.max_stages, self.interpolate_pos_encoding = max_stages, interpolate_pos_encoding
        if hasattr(model, "run_stage"):
            self.stages, self.rule = model, ExitRule.from_config(model.config, threshold)
            self.num_stages = resolve_max_stages(max_stages, model.config.num_stages)
        else:
            if threshold is not None or max_stages is not None:
                raise ValueError(f"{type(model).__name__} does not think in stages: no `threshold`, no `max_stages`.")
            sizes = {} if interpolate_pos_encoding is None else {"interpolate_pos_encoding": interpolate_pos_encoding}
            self.stages, self.rule, self.num_stages = _WholeModel(model, **sizes), None, 1
        self.stats = self.no_stats()

    def no_stats(self) -> EngineStats:
        return EngineStats([0] * self.num_stages, [0] * self.num_stages, [0] * self.num_stages)

    def __call__(self, inputs: Iterable[Any]) -> Iterator[EngineResult]:
        """
        Args:
            inputs (`Iterable`): images (paths, URLs, PIL images, arrays, or functions that return one) or preprocessed
                tensors `(channels, height, width)`: a list, a generator, a dataset, a `DataLoader` whose batches are
                images, or a tensor or array of four dimensions. A single image is a stream of one. An exception in
                place of an image stands for one that could not be read. The input is read and preprocessed in a thread
                of its own, at most two batches ahead.

        Yields:
            [`EngineResult`], one per image.

        Raises:
            ValueError: at once for a folder, a dict and what else is no stream of images; later, after the results of
                all images before it, for an image that cannot be read.
            BaseException: whatever `inputs` raises, `KeyboardInterrupt` and `SystemExit` included, likewise.
        """
        self.model.eval()  # again: it may have been trained since
        stream = Stream(self, inputs)
        return stream.in_order() if self.in_order else stream.as_they_finish()

    @torch.no_grad()
    def step(self, stage: int, state: State) -> tuple[torch.Tensor, State, torch.Tensor]:
        """
        Run a stage on waiting images.

        Returns:
            Whether each image exits (1 or 0), its entropy and its logits, `(images, 2 + num_labels)` float32 on the
            CPU; the state of those that go on; and which these are.
        """
        if stage == 0:
            pixel_values = state["pixel_values"]
            if self.model.device.type == "cuda":
                pixel_values = pixel_values.pin_memory()
            pixel_values = pixel_values.to(self.model.device, self.model.dtype, non_blocking=True)
            state = self.stages.begin(
                pixel_values, interpolate_pos_encoding=self.interpolate_pos_encoding, max_stages=self.max_stages
            )
        else:
            state = self.stages.recycle(stage - 1, state)
        is_last = stage == self.num_stages - 1
        logits, state = self.stages.run_stage(stage, state, is_last=is_last)
        if self.rule is None:
            entropies = answer_entropy(logits, self.model.config)
            exits = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        else:
            entropies, exits = self.rule.judge(stage, logits)
        # One copy to the host, and so one synchronisation, for the decision and everything else.
        answers = torch.cat([(exits | is_last)[:, None], entropies[:, None], logits.float()], dim=1).cpu()
        going_on = (answers[:, 0] == 0).nonzero().squeeze(1)
        if 0 < len(going_on) < len(answers):
            state = select_rows(state, going_on.to(logits.device, non_blocking=True))
        return answers, state, going_on
