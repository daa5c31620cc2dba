"""
Full batches at every stage: images wait in one queue per stage until a batch of them has come together.

Inside one batch, early exit leaves later stages with the few images that go on, and small batches waste the hardware.
The engine takes a stream instead: what goes on from many batches is run together. It knows stages and exits, and
nothing of layers or families; a model that does not think in stages has one.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..models.early_exit import State, resolve_max_stages, select_rows
from ..models.exit_criteria import ExitRule, answer_entropy
from .reader import Reader


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineResult:
    """
    The answer to one image.

    Attributes:
        index: place of the image in the input, from 0.
        logits: `(num_labels,)`, float32, on the CPU; `None` if the image could not be read.
        exit_stage: where it left, from 0; `None` likewise.
        entropy: of that answer, in nats; `None` likewise.
        error: why the image could not be read, with `on_error="return"`.
    """

    index: int
    logits: torch.Tensor | None = None
    exit_stage: int | None = None
    entropy: float | None = None
    error: Exception | None = None


@dataclass
class EngineStats:
    """
    Work done, counted.

    Attributes:
        rows: images that ran each stage.
        batches: forward passes of each stage.
        exits: images that left at each stage.
        failures: images that could not be read.
    """

    rows: list[int]
    batches: list[int]
    exits: list[int]
    failures: int = 0


class _WholeModel:
    """A model that does not think in stages, as one that has a single stage."""

    num_stages = 1

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def begin(self, pixel_values: torch.Tensor, max_stages: int | None = None) -> State:
        return {"pixel_values": pixel_values}

    def run_stage(self, stage_index: int, state: State, is_last: bool) -> tuple[torch.Tensor, State]:
        return self.model(**state).logits, state


class AdaptiveEngine:
    r"""
    Classifies a stream of images with full batches at every stage.

    Args:
        model (`PreTrainedModel`):
            A classifier of this package, on its device; put into evaluation mode.
        processor (`BaseImageProcessor`, *optional*):
            For inputs that are images or paths. Without one they must be tensors `(channels, height, width)`.
        batch_size (`int`, *optional*, defaults to 64):
            Images of a full batch, at every stage. Where memory runs out, from then on half of the batch that failed,
            with a warning; the second time it is an error.
        threshold, max_stages (*optional*):
            As in the model's `forward`.
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
        self.max_stages = max_stages
        if hasattr(model, "run_stage"):
            self.stages, self.rule = model, ExitRule.from_config(model.config, threshold)
            self.num_stages = resolve_max_stages(max_stages, model.config.num_stages)
        else:
            if threshold is not None or max_stages is not None:
                raise ValueError(f"{type(model).__name__} does not think in stages: no `threshold`, no `max_stages`.")
            self.stages, self.rule, self.num_stages = _WholeModel(model), None, 1
        self.stats = self._no_stats()

    def _no_stats(self) -> EngineStats:
        return EngineStats([0] * self.num_stages, [0] * self.num_stages, [0] * self.num_stages)

    def __call__(self, inputs: Iterable[Any]) -> Iterator[EngineResult]:
        """
        Args:
            inputs (`Iterable`): images (paths, PIL images, arrays, or functions that return one) or tensors. It is read
                and preprocessed in a thread of its own, at most two batches ahead.

        Yields:
            [`EngineResult`], one per input.

        Raises:
            Whatever `inputs` raises, after the results of all images before it; likewise `ValueError` for an image that
            cannot be read.
        """
        stream = _Stream(self, inputs)
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
            state = self.stages.begin(pixel_values, max_stages=self.max_stages)
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


class _StageQueue:
    """Images that wait for a stage, oldest first."""

    def __init__(self):
        self.parts: list[tuple[State, torch.Tensor, float]] = []  # state, places in the input, since when

    def __len__(self) -> int:
        return sum(len(indices) for _, indices, _ in self.parts)

    @property
    def since(self) -> float:
        return min((since for *_, since in self.parts), default=math.inf)

    def holds(self, index: int) -> bool:
        return any(bool((indices == index).any()) for _, indices, _ in self.parts)

    def fits(self, state: State) -> bool:
        """Whether images of this size can be in one batch with those that wait."""
        return not self.parts or all(state[name].shape[1:] == part.shape[1:] for name, part in self.parts[0][0].items())

    def put(self, state: State, indices: torch.Tensor, since: float) -> None:
        self.parts.append((state, indices, since))

    def put_back(self, state: State, indices: torch.Tensor, since: float) -> None:
        """Images that were taken and could not run."""
        self.parts.insert(0, (state, indices, since))

    def take(self, count: int) -> tuple[State, torch.Tensor, float]:
        """The oldest images, at most `count`."""
        states, indices, since = zip(*self.parts)
        # One part that is a batch already, as where every image goes on, is not copied.
        state = states[0] if len(states) == 1 else {name: torch.cat([s[name] for s in states]) for name in states[0]}
        indices = torch.cat(indices)
        self.parts = []
        if len(indices) > count:
            self.put({name: tensor[count:] for name, tensor in state.items()}, indices[count:], since[-1])
        return {name: tensor[:count] for name, tensor in state.items()}, indices[:count], min(since)


def _is_out_of_memory(error: RuntimeError) -> bool:
    # Only accelerators have an exception of their own for it; Accelerate knows what the others say.
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


class _Stream:
    """One pass of an engine over an input."""

    def __init__(self, engine: AdaptiveEngine, inputs: Iterable[Any]):
        self.engine, self.inputs = engine, inputs
        self.batch_size, self.halved = engine.batch_size, False
        self.stats = engine.stats = engine._no_stats()
        self.queues = [_StageQueue() for _ in range(engine.num_stages)]

    def as_they_finish(self) -> Iterator[EngineResult]:
        """Every result as soon as it is there."""
        for results in self._run():
            yield from results

    def in_order(self) -> Iterator[EngineResult]:
        """Results in input order. Where too many wait for one image, its stage runs with what it has."""
        waiting: dict[int, EngineResult] = {}
        following = 0
        runs = self._run()
        try:
            for results in runs:
                waiting.update((result.index, result) for result in results)
                while True:
                    while following in waiting:
                        yield waiting.pop(following)
                        following += 1
                    if len(waiting) <= self.engine.max_pending:
                        break
                    late = next((stage for stage, queue in enumerate(self.queues) if queue.holds(following)), None)
                    if late is None:
                        break
                    results = self._run_queue(late)
                    waiting.update((result.index, result) for result in results)
        finally:
            runs.close()

    def _run(self) -> Iterator[list[EngineResult]]:
        engine, queues = self.engine, self.queues
        reader = Reader(self.inputs, engine.processor, 2 * self.batch_size, engine.on_error == "return")
        failure: Exception | None = None
        try:
            while True:
                # The deepest first: what is nearly done makes room.
                ready = [s for s, queue in enumerate(queues) if len(queue) >= self.batch_size or self._overdue(queue)]
                if ready:
                    yield self._run_queue(ready[-1])
                elif not reader.finished:
                    reading = reader.get(self._patience())
                    if reading is None:
                        continue
                    if reading.error is None:
                        state = {"pixel_values": reading.pixel_values[None]}
                        while not queues[0].fits(state):
                            yield self._run_queue(0)
                        queues[0].put(state, torch.tensor([reading.index]), time.monotonic())
                    elif reading.index is None or engine.on_error == "raise":
                        failure = reading.error
                        reader.close()
                    else:
                        self.stats.failures += 1
                        yield [EngineResult(reading.index, error=reading.error)]
                elif any(map(len, queues)):
                    # At the end the first stage first, so that what goes on from it fills up the later ones.
                    yield self._run_queue(next(s for s, queue in enumerate(queues) if len(queue)))
                else:
                    break
            if failure is not None:
                raise failure
        finally:
            reader.close()

    def _overdue(self, queue: _StageQueue) -> bool:
        max_wait = self.engine.max_wait
        return max_wait is not None and time.monotonic() - queue.since >= max_wait

    def _patience(self) -> float | None:
        """Seconds until an image has waited long enough; `None` for ever."""
        since = min(queue.since for queue in self.queues)
        if self.engine.max_wait is None or since == math.inf:
            return None
        return max(0.0, since + self.engine.max_wait - time.monotonic())

    def _run_queue(self, stage: int) -> list[EngineResult]:
        """Run a stage on a batch of those that wait for it; the results of those that leave."""
        batch = self.queues[stage].take(self.batch_size)
        try:
            return self._run_stage(stage, *batch)
        except RuntimeError as error:
            if self.halved or len(batch[1]) < 2 or not _is_out_of_memory(error):
                raise
        self.halved, self.batch_size = True, math.ceil(len(batch[1]) / 2)
        logger.warning("out of memory at stage %d: going on with batches of %d images", stage, self.batch_size)
        self.queues[stage].put_back(*batch)
        return self._run_queue(stage)

    def _run_stage(self, stage: int, state: State, indices: torch.Tensor, since: float) -> list[EngineResult]:
        answers, state, going_on = self.engine.step(stage, state)
        self.stats.rows[stage] += len(indices)
        self.stats.batches[stage] += 1
        self.stats.exits[stage] += len(indices) - len(going_on)
        results = []
        if len(going_on):
            following = self.queues[stage + 1]
            while not following.fits(state):
                results += self._run_queue(stage + 1)
            following.put(state, indices[going_on], since)
        for index, answer in zip(indices.tolist(), answers):
            if answer[0]:
                results.append(EngineResult(index, answer[2:], stage, float(answer[1])))
        return results
