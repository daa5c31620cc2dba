"""One pass of an engine over an input: which stage runs next, and the order of the results."""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ..models.image_inputs import each_image
from ..models.staged_loop import first_state
from .reader import Reader
from .stage_queue import StageQueue


if TYPE_CHECKING:
    from .engine import AdaptiveEngine


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineResult:
    """
    The answer to one image.

    Attributes:
        index: index of the image in the input, from 0.
        logits: of a classifier `(num_labels,)`, float32, on the CPU; `None` if the image could not be read.
        exit_stage: stage at which the image exited, from 0; `None` if it could not be read.
        entropy: of the answer, in nats; `None` if the image could not be read.
        error: why the image could not be read, with `on_error="return"`.
        others: further entries of the answer, which tasks other than classification may have, on the CPU.
    """

    index: int
    logits: torch.Tensor | None = None
    exit_stage: int | None = None
    entropy: float | None = None
    error: Exception | None = None
    others: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class WithThreshold:
    """
    An input of an engine with τ of its own.

    Attributes:
        image: any input of an engine.
        threshold: τ, one or one per exit, instead of the engine's; an invalid one is an error of this image.
    """

    image: Any
    threshold: float | Sequence[float]


@dataclass
class EngineStats:
    """
    Counts of the work done.

    Attributes:
        rows: images that ran each stage.
        batches: forward passes of each stage.
        exits: images that exited at each stage.
        failures: images that could not be read.
        seconds: in which the stages ran, with the copies to and from the device; the rest of the time, the engine
            waited for images or for whoever takes the results.
    """

    rows: list[int]
    batches: list[int]
    exits: list[int]
    failures: int = 0
    seconds: float = 0.0


def _is_out_of_memory(error: RuntimeError) -> bool:
    # Only accelerators raise a dedicated exception; Accelerate recognises the messages of other devices.
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


class _RefusedImages(Exception):
    """The first stage raises `error` for the images `indices`."""

    def __init__(self, indices: list[int], error: ValueError):
        self.indices, self.error = indices, error


class Stream:
    """One pass of an engine over an input."""

    def __init__(self, engine: "AdaptiveEngine", inputs: Iterable[Any]):
        self.engine, self.batch_size = engine, engine.batch_size
        self.thresholds: dict[int, tuple[float, ...]] = {}  # of images that have τ of their own, while they are here
        self.inputs = self._images(each_image(inputs))
        self.stats = engine.stats = engine.no_stats()
        self.queues = [StageQueue() for _ in engine.stages]

    def _images(self, inputs: Iterable[Any]) -> Iterator[Any]:
        """The images of the input, whose own τ are put aside. What is wrong with one takes the place of the image."""
        for index, image in enumerate(inputs):
            if isinstance(image, WithThreshold):
                try:
                    self.thresholds[index] = self.engine.resolve_threshold(image.threshold)
                    image = image.image
                except ValueError as error:
                    image = error
            yield image

    def as_they_finish(self) -> Iterator[EngineResult]:
        """Results as soon as they are computed."""
        for results in self._run():
            yield from results

    def in_order(self) -> Iterator[EngineResult]:
        """Results in input order. If more than `max_pending` wait for one image, its stage runs on a partial batch."""
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
                    late = next((stage for stage, queue in enumerate(self.queues) if queue.first == following), None)
                    if late is None:
                        break
                    results = self._run_queue(late)
                    waiting.update((result.index, result) for result in results)
        finally:
            runs.close()

    def _run(self) -> Iterator[list[EngineResult]]:
        engine, queues = self.engine, self.queues
        tolerant = engine.on_error == "return"
        reader = Reader(self.inputs, engine.processor, 2 * self.batch_size, tolerant, engine.num_workers)
        failure: BaseException | None = None
        try:
            while True:
                # The latest stage first: its images are nearest to leaving memory.
                ready = [s for s, queue in enumerate(queues) if len(queue) >= self.batch_size or self._overdue(queue)]
                if ready:
                    yield self._run_queue(ready[-1])
                elif not reader.finished:
                    reading = reader.get(self._patience())
                    if reading is None:
                        continue
                    if reading.error is None:
                        state = first_state(engine.rule, reading.pixel_values, engine.generator)
                        while not queues[0].fits(state):
                            yield self._run_queue(0)
                        queues[0].put(state, reading.indices, time.monotonic())
                    elif not reading.indices or not tolerant:
                        failure = reading.error
                        reader.close()
                    else:
                        yield [self._failed(reading.indices[0], reading.error)]
                elif any(map(len, queues)):
                    # At the end of the input, the earliest stage first, so that its images fill up later batches.
                    yield self._run_queue(next(s for s, queue in enumerate(queues) if len(queue)))
                else:
                    break
            if failure is not None:
                raise failure
        finally:
            reader.close()

    def _overdue(self, queue: StageQueue) -> bool:
        max_wait = self.engine.max_wait
        return max_wait is not None and time.monotonic() - queue.since >= max_wait

    def _patience(self) -> float | None:
        """Seconds until the first waiting image is overdue; `None` if no image ever is."""
        since = min(queue.since for queue in self.queues)
        if self.engine.max_wait is None or since == math.inf:
            return None
        return max(0.0, since + self.engine.max_wait - time.monotonic())

    def _run_queue(self, stage: int) -> list[EngineResult]:
        """Run a stage on a batch of its queue, and return the results of the images that exit."""
        try:
            indices, since, (exits, answer, state) = self._step(stage)
        except _RefusedImages as refused:
            return [self._failed(index, refused.error) for index in refused.indices]
        exits = exits.tolist()
        going_on = [index for index, exit_ in zip(indices, exits) if not exit_]
        self.stats.rows[stage] += len(indices)
        self.stats.batches[stage] += 1
        self.stats.exits[stage] += len(indices) - len(going_on)
        for index, exit_ in zip(indices, exits) if self.thresholds else ():
            if exit_:
                self.thresholds.pop(index, None)
        results = []
        if going_on:
            following = self.queues[stage + 1]
            while not following.fits(state):
                results += self._run_queue(stage + 1)
            following.put(state, going_on, since)
        entropies, logits = answer.pop("entropy").tolist(), answer.pop("logits").unbind()
        others = {name: rows.unbind() for name, rows in answer.items()}
        # Copies, because a view would hold (and pickle) the answers to the whole batch.
        for row, index in enumerate(index for index, exit_ in zip(indices, exits) if exit_):
            own = {name: rows[row].clone() for name, rows in others.items()} if others else {}
            results.append(EngineResult(index, logits[row].clone(), stage, entropies[row], others=own))
        return results

    def _failed(self, index: int, error: BaseException) -> EngineResult:
        self.thresholds.pop(index, None)
        self.stats.failures += 1
        return EngineResult(index, error=error)

    def _thresholds_of(self, indices: list[int]) -> torch.Tensor | None:
        """τ of each image and exit, `(images, exits)`, where any of these images has its own; else `None`."""
        if not self.thresholds or self.thresholds.keys().isdisjoint(indices):
            return None
        usual = self.engine.rule.thresholds
        return torch.tensor([self.thresholds.get(index, usual) for index in indices], dtype=torch.float32)

    def _step(self, stage: int) -> tuple[list[int], float, tuple]:
        """Run a stage, with a smaller batch if memory runs out: indices, arrival time and result of `engine.step`."""
        while True:
            state, indices, since = self.queues[stage].take(self.batch_size)
            started = time.perf_counter()
            try:
                return indices, since, self.engine.step(stage, state, self._thresholds_of(indices))
            except ValueError as error:
                # The images of a batch have one shape, so that the model takes none of them.
                if stage > 0 or self.engine.on_error != "return":
                    raise
                raise _RefusedImages(indices, error) from error
            except RuntimeError as error:
                if len(indices) < 2 or not _is_out_of_memory(error):
                    raise
            finally:
                self.stats.seconds += time.perf_counter() - started
            # Outside of the handler, because its traceback references the tensors of the failed step.
            if self.engine.model.device.type != "cpu":
                clear_device_cache(garbage_collection=True)
            self.batch_size = math.ceil(len(indices) / 2)
            logger.warning("out of memory at stage %d: going on with batches of %d images", stage, self.batch_size)
            self.queues[stage].put_back(state, indices, since)
