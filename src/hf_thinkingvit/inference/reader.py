"""
Threads that read and preprocess images while the model computes.

One thread does nothing but iterate over the input, so that what has arrived is known; a second one prepares it, in
chunks as large as what has arrived, up to a limit: a live stream is not kept waiting, and a full one is prepared many
images at a time. With workers, the chunks are prepared in processes of a `DataLoader`, and the second thread only hands
them over.
"""

import itertools
import pickle
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers.image_processing_utils import BaseImageProcessor

from .preparation import Preparation, Reading


CHUNK = 32  # images that are prepared together, at most


class Reader:
    """
    Reads `inputs` in separate threads, at most `ahead` images ahead of `get`.

    Args:
        inputs (`Iterable`): images, paths, functions that return one, tensors `(channels, height, width)`, or
            exceptions in place of images that could not be read.
        processor (`BaseImageProcessor`, *optional*): preprocesses inputs that are not tensors.
        ahead (`int`): how many images may wait to be returned by `get`.
        tolerant (`bool`): go on after an image that cannot be read.
        num_workers (`int`): processes that decode and preprocess; 0 for the reader's own thread.

    Attributes:
        finished: whether `get` has nothing more to return.
    """

    def __init__(
        self,
        inputs: Iterable[Any],
        processor: BaseImageProcessor | None,
        ahead: int,
        tolerant: bool,
        num_workers: int = 0,
    ):
        self.tolerant, self.finished = tolerant, False
        self._prepare, self._num_workers = Preparation(processor), num_workers
        self._ahead = max(ahead, 2 * num_workers * CHUNK)
        self._chunk = max(min(CHUNK, ahead // 2), 1)
        self._arrived: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        self._out: queue.SimpleQueue[Reading | None] = queue.SimpleQueue()
        self._stop, self._room = threading.Event(), threading.Condition()
        self._taken = 0  # images that `get` has returned
        self._failure: BaseException | None = None
        # Daemon threads, because an input that blocks for ever must not prevent the program from exiting.
        self._threads = [
            threading.Thread(target=target, args=arguments, name="hf-thinkingvit-reader", daemon=True)
            for target, arguments in ((self._iterate, (inputs,)), (self._read, ()))
        ]
        for thread in self._threads:
            thread.start()

    def get(self, patience: float | None) -> Reading | None:
        """The next images; `None` if there are none within `patience` seconds, or at the end."""
        try:
            reading = self._out.get(timeout=patience)
        except queue.Empty:
            return None
        self.finished = reading is None
        if reading is not None:
            with self._room:
                self._taken += len(reading.indices)
                self._room.notify()
        return reading

    def close(self) -> None:
        """Stop reading. Returns once the threads have ended, or after a second if the input itself is blocked."""
        self._stop.set()
        self.finished = True
        with self._room:
            self._room.notify()
        self._arrived.put(None)
        for thread in self._threads:
            thread.join(timeout=1.0)

    def _iterate(self, inputs: Iterable[Any]) -> None:
        """Puts what arrives, with its place in the input, into a queue."""
        try:
            images = iter(inputs)
            for count in itertools.count():
                if count - self._taken >= self._ahead:
                    with self._room:
                        while count - self._taken >= self._ahead and not self._stop.is_set():
                            self._room.wait()
                if self._stop.is_set():
                    break
                try:
                    image = next(images)
                except StopIteration:
                    break
                self._arrived.put((count, image))
        except BaseException as error:  # passed on to the caller of `get`: exceptions do not leave a thread
            self._failure = error
        finally:
            self._arrived.put(None)

    def _chunks(self) -> Iterator[list[tuple[int, Any]]]:
        """What has arrived, at least one image at a time."""
        ended = False
        while not ended and not self._stop.is_set():
            chunk: list[tuple[int, Any]] = []
            with suppress(queue.Empty):
                while len(chunk) < self._chunk:
                    entry = self._arrived.get(block=not chunk)
                    if entry is None:
                        ended = True
                        break
                    chunk.append(entry)
            if chunk:
                yield chunk

    def _read(self) -> None:
        try:
            prepared = map(self._prepare, self._chunks()) if self._num_workers == 0 else self._in_workers()
            for readings in prepared:
                for reading in readings:
                    if self._stop.is_set():
                        return
                    self._out.put(reading)
                    if reading.error is not None and not self.tolerant:
                        return
            if self._failure is not None:
                self._out.put(Reading(error=self._failure))
        except BaseException as error:
            self._out.put(Reading(error=error))
        finally:
            self._out.put(None)

    def _in_workers(self) -> Iterator[list[Reading]]:
        """
        The chunks, prepared by worker processes, in order. Tensors and the caller's exceptions need no worker, and do
        not travel.
        """
        waiting: deque[dict[int, Any]] = deque()

        def to_workers() -> Iterator[list[bytes]]:
            for chunk in self._chunks():
                ready = {index: image for index, image in chunk if isinstance(image, (torch.Tensor, Exception))}
                pickled = []
                for index, image in chunk:
                    if index not in ready:
                        try:  # here, because multiprocessing would drop what it cannot pickle
                            pickled.append(pickle.dumps((index, image)))
                        except Exception as error:
                            ready[index] = ValueError(
                                f"Input {index} ({type(image).__name__}) cannot be sent to a worker, since it cannot "
                                f"be pickled ({error}): use `num_workers=0`."
                            )
                waiting.append(ready)
                yield pickled

        loader = DataLoader(
            _Chunks(self._prepare),
            batch_sampler=_Once(to_workers()),
            num_workers=self._num_workers,
            collate_fn=_unchanged,
        )
        for readings in loader:
            ready = waiting.popleft()
            if ready:
                readings = sorted([*readings, *self._prepare(list(ready.items()))], key=lambda one: one.indices[0])
            yield readings


class _Chunks:
    """A dataset whose indices are the images themselves, pickled, and whose batches are chunks."""

    def __init__(self, prepare: Preparation):
        self.prepare = prepare

    def __getitems__(self, pickled: list[bytes]) -> list[Reading]:
        return self.prepare([pickle.loads(entry) for entry in pickled])


class _Once:
    """The batches of a sampler, for one epoch."""

    def __init__(self, batches: Iterator[list]):
        self._batches = batches

    def __iter__(self) -> Iterator[list]:
        return self._batches


def _unchanged(readings: list[Reading]) -> list[Reading]:
    return readings
