"""A thread that reads and preprocesses images while the model computes."""

import queue
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from ..models.image_files import read_image
from ..models.image_inputs import NO_DICT, as_8_bits, check_one_image


@dataclass(frozen=True)
class Reading:
    """
    An image that was read, or the reason why it could not be read.

    Attributes:
        index: its index in the input; `None` if iterating over the input raised.
        pixel_values: `(channels, height, width)`, on the CPU; `None` if it could not be read.
        error: the reason; any `BaseException` if iterating over the input raised.
    """

    index: int | None
    pixel_values: torch.Tensor | None = None
    error: BaseException | None = None


class Reader:
    """
    Reads `inputs` in a separate thread, at most `ahead` images ahead of `get`.

    Args:
        inputs (`Iterable`): images, paths, functions that return one, tensors `(channels, height, width)`, or
            exceptions in place of images that could not be read.
        processor (`BaseImageProcessor`, *optional*): preprocesses inputs that are not tensors.
        ahead (`int`): how many images may wait to be returned by `get`.
        tolerant (`bool`): go on after an image that cannot be read.

    Attributes:
        finished: whether `get` has nothing more to return.
    """

    def __init__(self, inputs: Iterable[Any], processor: BaseImageProcessor | None, ahead: int, tolerant: bool):
        self.processor, self.tolerant = processor, tolerant
        self._out: queue.Queue[Reading | None] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self.finished = False
        # A daemon thread, because an input that blocks for ever must not prevent the program from exiting.
        self._thread = threading.Thread(target=self._read, args=(inputs,), name="hf-thinkingvit-reader", daemon=True)
        self._thread.start()

    def get(self, patience: float | None) -> Reading | None:
        """The next image; `None` if there is none within `patience` seconds, or at the end."""
        try:
            reading = self._out.get(timeout=patience)
        except queue.Empty:
            return None
        self.finished = reading is None
        return reading

    def close(self) -> None:
        """Stop reading. Returns once the thread has ended, or after a second if the input itself is blocked."""
        self._stop.set()
        self.finished = True
        with suppress(queue.Empty):
            while True:
                self._out.get_nowait()
        self._thread.join(timeout=1.0)

    def _put(self, reading: Reading | None) -> None:
        while not self._stop.is_set():
            with suppress(queue.Full):
                self._out.put(reading, timeout=0.1)
                return

    def _read(self, inputs: Iterable[Any]) -> None:
        try:
            for index, image in enumerate(inputs):
                reading = self._preprocess(index, image)
                self._put(reading)
                if self._stop.is_set() or (reading.error is not None and not self.tolerant):
                    return
        except BaseException as error:  # passed on to the caller of `get`: exceptions do not leave a thread
            self._put(Reading(None, error=error))
        finally:
            self._put(None)

    def _preprocess(self, index: int, image: Any) -> Reading:
        if isinstance(image, Exception):  # the caller could not read this image
            return Reading(index, error=image)
        if isinstance(image, torch.Tensor):
            if image.dim() == 3 and image.is_floating_point():
                return Reading(index, image)
            problem = (
                f"Input {index} must be a tensor (channels, height, width) of floats, preprocessed, got "
                f"{tuple(image.shape)} of {image.dtype}."
            )
            return Reading(index, error=ValueError(problem))
        if isinstance(image, Mapping):
            return Reading(index, error=ValueError(f"Input {index} is not an image. {NO_DICT}"))
        if self.processor is None:
            return Reading(
                index, error=ValueError(f"Input {index} is a {type(image).__name__}, which needs a `processor`.")
            )
        name = f"at place {index}"
        try:
            if callable(image):
                image = image()
            elif not isinstance(image, Image.Image):
                name = str(image)
            if isinstance(image, (str, Image.Image)) or hasattr(image, "__fspath__"):
                image = read_image(image)
            check_one_image(image)
            return Reading(index, self.processor(as_8_bits(image), return_tensors="pt")["pixel_values"][0])
        except Exception as error:  # decoders raise many types, without the name of the image
            failure = ValueError(f"Cannot read the image {name[:200]}: {type(error).__name__}: {error}")
            failure.__cause__ = error
            return Reading(index, error=failure)
