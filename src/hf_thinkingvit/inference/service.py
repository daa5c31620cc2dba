"""
An engine behind requests that come one by one, from many threads: a bounded number of them, each with its own τ, and
an end that answers all of them. It knows no network; `examples/serve.py` puts HTTP in front of it.
"""

import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from .engine import AdaptiveEngine
from .stream import EngineResult, WithThreshold


logger = logging.getLogger(__name__)


class ServiceFull(RuntimeError):
    """As many requests wait as may wait."""


class ServiceClosed(RuntimeError):
    """The service has been closed, or its engine has failed."""


class EngineService:
    r"""
    Answers images in the order in which they are done, in full batches where requests come fast enough.

    Args:
        engine (`AdaptiveEngine`):
            Made with `in_order=False`, `on_error="return"` and a `max_wait`, which is how long a request waits for
            others to fill a batch with. The service is its only user.
        max_requests (`int`): how many requests may wait for their answers.

    Attributes:
        failure (`BaseException`, *optional*): by which the engine stopped; every request after it is refused.

    Example:

    ```python
    >>> engine = AdaptiveEngine(model, processor, in_order=False, on_error="return", max_wait=0.01)
    >>> with EngineService(engine) as service:
    ...     result = service.submit(image, threshold=0.9).result()
    ```"""

    def __init__(self, engine: AdaptiveEngine, max_requests: int = 256):
        if engine.in_order or engine.on_error != "return" or engine.max_wait is None:
            raise ValueError(
                "The engine of a service needs `in_order=False`, `on_error='return'` and a `max_wait` in seconds: a "
                "request must wait neither for others, nor fail with them."
            )
        if isinstance(max_requests, bool) or not isinstance(max_requests, int) or max_requests < 1:
            raise ValueError(f"`max_requests` must be an integer of at least 1, got {max_requests!r}.")
        self.engine, self.max_requests, self.failure = engine, max_requests, None
        self._arriving: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._futures: dict[int, Future[EngineResult]] = {}
        self._count, self._closed, self._lock = 0, False, threading.Lock()
        self._thread = threading.Thread(target=self._run, name="hf-thinkingvit-service", daemon=True)
        self._thread.start()

    def __enter__(self) -> "EngineService":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @property
    def waiting(self) -> int:
        """Requests without an answer."""
        return len(self._futures)

    def submit(self, image: Any, threshold: float | Sequence[float] | None = None) -> "Future[EngineResult]":
        """
        Args:
            image: any input of an engine. A function that decodes an image is called in the reader's thread.
            threshold (`float` or `list[float]`, *optional*): τ of this request, instead of the engine's.

        Returns:
            A future of the [`EngineResult`], which has an `error` where the image cannot be read. Its `index` counts
            the requests.

        Raises:
            ServiceFull: if `max_requests` wait already.
            ServiceClosed: after `close`, or after the engine has failed.
            ValueError: for an invalid τ.
        """
        if threshold is not None:
            self.engine.resolve_threshold(threshold)
            image = WithThreshold(image, threshold)
        with self._lock:
            if self._closed or self.failure is not None:
                raise ServiceClosed("The service is closed.") from self.failure
            if len(self._futures) >= self.max_requests:
                raise ServiceFull(f"{self.max_requests} requests wait already.")
            future: Future[EngineResult] = Future()
            future.set_running_or_notify_cancel()  # a request that is in a batch cannot be taken out again
            self._futures[self._count] = future
            self._count += 1
            self._arriving.put(image)  # within the lock, so that the order is that of the numbers
        return future

    def close(self, timeout: float | None = None) -> None:
        """Refuse further requests, and return when those that wait have their answers. Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._arriving.put(_END)
        self._thread.join(timeout)

    def _images(self) -> Iterator[Any]:
        while (image := self._arriving.get()) is not _END:
            yield image

    def _run(self) -> None:
        try:
            for result in self.engine(self._images()):
                with self._lock:
                    future = self._futures.pop(result.index)
                future.set_result(result)
        except BaseException as error:  # nobody else sees what ends a thread
            logger.exception("the engine of the service failed")
            with self._lock:
                self.failure = error
        finally:
            with self._lock:
                left, self._futures = list(self._futures.values()), {}
                self._closed = True
            self._arriving.put(_END)  # the engine's reader may still wait for images
            for future in left:
                refusal = ServiceClosed("The engine failed before it could answer.")
                refusal.__cause__ = self.failure
                future.set_exception(refusal)


_END = object()
