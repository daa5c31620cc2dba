"""
Whole images by sliding windows, as the segmentation papers evaluate: windows of many images go through the engine
together, and each leaves at its own stage.

A window's logits are kept at its patches, and become pixels in bands of the result: the logits of all pixels of a
photograph would be thousands of times larger than the photograph.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..image_sizes import fitted_size
from ..models.configuration_checks import as_pair, check_integer
from .engine import AdaptiveEngine
from .stream import EngineResult, EngineStats


OVERLAP = 32  # of windows in the official evaluation, in pixels
BAND_BYTES = 2**26  # of the logits of a band


@dataclass(frozen=True)
class ImageView:
    """
    An image as the model sees it.

    Attributes:
        pixel_values (`torch.Tensor` of shape `(channels, height, width)`): preprocessed, at the scale of this view.
        is_flipped (`bool`): whether it is mirrored left to right; its answer is mirrored back.
    """

    pixel_values: torch.Tensor
    is_flipped: bool = False

    def oriented(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps `(..., height, width)` of this view, mirrored back where it is mirrored."""
        return maps.flip(-1) if self.is_flipped else maps


@dataclass(frozen=True)
class ImageViews:
    """
    Views of one image, whose probabilities are averaged.

    Attributes:
        views (`Sequence[ImageView]`): at least one.
        size (`tuple[int, int]`): (height, width) of the answer.
    """

    views: Sequence[ImageView]
    size: tuple[int, int]


@dataclass(frozen=True)
class WindowExit:
    """Where a window lies in its view (after small views are enlarged), and where it left: stage from 0, entropy."""

    view: int
    top: int
    left: int
    exit_stage: int
    entropy: float


@dataclass(frozen=True)
class SlidingResult:
    """
    The answer to one image.

    Attributes:
        index (`int`): place of the image in the input, from 0.
        labels (`torch.LongTensor` of shape `(height, width)`): the most probable class of each pixel.
        windows (`list[WindowExit]`): view by view, row by row.
        probabilities (`torch.Tensor` of shape `(num_labels, height, width)`, *optional*): if asked for, float32.
    """

    index: int
    labels: torch.Tensor
    windows: list[WindowExit]
    probabilities: torch.Tensor | None = None


def scaled_views(
    pixel_values: torch.Tensor,
    short_side: int | None,
    ratios: Sequence[float] = (1.0,),
    flip: bool = False,
    long_side: int | None = None,
) -> ImageViews:
    """
    Views of an image `(channels, height, width)`, preprocessed: for each of `ratios`, resized bilinearly so that the
    shorter side has `ratio * short_side` pixels (see [`~hf_thinkingvit.image_sizes.fitted_size`]); with `flip`, each of
    them mirrored as well. The answer has the size of the image. Ratios of 0.5, 0.75, 1, 1.25, 1.5 and 1.75 with `flip`
    are the papers' multi-scale evaluation.
    """
    size, views = tuple(pixel_values.shape[1:]), []
    for ratio in ratios:
        scaled = fitted_size(size, short_side, long_side, ratio)
        resized = F.interpolate(pixel_values[None], size=scaled, mode="bilinear", align_corners=False)[0]
        views += [ImageView(resized)] + ([ImageView(resized.flip(-1), True)] if flip else [])
    return ImageViews(views, size)


def window_anchors(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along an axis of `length` pixels: every `stride`, and the last one at the end."""
    return [*range(0, length - window, stride), length - window]


def default_stride(window: int) -> int:
    """From window to window: `OVERLAP` pixels less than a window, or half of windows of 64 pixels or fewer."""
    return window - OVERLAP if window > 2 * OVERLAP else max(window // 2, 1)


class SlidingWindowSegmenter:
    r"""
    Segments images of any size in square windows.

    Args:
        model (`PreTrainedModel`):
            A segmentation model of this package, on its device; put into evaluation mode.
        window_size (`int`, *optional*):
            Side of the windows in pixels, a multiple of the patch size; by default the shorter side of
            `config.image_size`. Views with a shorter side below it are enlarged bilinearly.
        stride (`int`, *optional*):
            From 1 to `window_size`; by default `window_size - 32`, as in the official evaluation, or half of windows of
            64 pixels or fewer.
        return_probabilities (`bool`, *optional*, defaults to `False`):
            Whether results have the probabilities of every class, `num_labels` numbers for each pixel.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar over images.
        batch_size (`int`, *optional*, defaults to 16):
            Windows of a full batch, at every stage.
        threshold, max_stages (*optional*):
            As in the model's `forward`.

    Example:

    ```python
    >>> segment = SlidingWindowSegmenter(model, threshold=0.5)
    >>> for result in segment(scaled_views(image, short_side=512) for image in images):
    ...     print(result.labels.shape, [window.exit_stage for window in result.windows])
    ```"""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        window_size: int | None = None,
        stride: int | None = None,
        return_probabilities: bool = False,
        progress: bool = False,
        batch_size: int = 16,
        threshold: float | Sequence[float] | None = None,
        max_stages: int | None = None,
    ):
        if getattr(model.config, "decoder_type", None) is None:
            raise ValueError(f"Expected a segmentation model, with a decoder, got {type(model).__name__}.")
        self.patch_size = as_pair(model.config.patch_size)
        window_size = min(as_pair(model.config.image_size)) if window_size is None else window_size
        check_integer("window_size", window_size, minimum=1)
        if any(window_size % side for side in self.patch_size):
            raise ValueError(
                f"`window_size` must be a multiple of the patch size {self.patch_size}, got {window_size}."
            )
        if stride is None:
            stride = default_stride(window_size)
        check_integer("stride", stride, minimum=1)
        if stride > window_size:
            raise ValueError(
                f"`stride` ({stride}) must not exceed `window_size` ({window_size}): pixels would be left out."
            )
        self.window_size, self.stride = window_size, stride
        self.return_probabilities, self.progress = return_probabilities, progress
        self.num_channels = model.config.num_channels
        self.engine = AdaptiveEngine(model, batch_size=batch_size, threshold=threshold, max_stages=max_stages)

    @property
    def stats(self) -> EngineStats:
        """Of the windows of the stream that runs or ran last."""
        return self.engine.stats

    def __call__(self, images: Iterable[ImageViews | torch.Tensor]) -> Iterator[SlidingResult]:
        """
        Args:
            images (`Iterable`): [`ImageViews`], or tensors `(channels, height, width)`, preprocessed, which are one
                view each. Read in a thread of its own, ahead of the windows that run.

        Yields:
            [`SlidingResult`], one per image, in input order.

        Raises:
            ValueError: for what is no image, later, after the results of all images before it.
        """
        planned: deque[tuple[ImageViews, list[ViewWindows]]] = deque()
        total = len(images) if self.progress and hasattr(images, "__len__") else None
        with tqdm(total=total, disable=not self.progress, unit="image") as bar:
            index, results = 0, []
            for result in self.engine(self.windows(images, planned)):
                results.append(result)
                image, views = planned[0]
                if len(results) == sum(view.num_windows for view in views):
                    planned.popleft()
                    yield merge_windows(index, image, views, results, self.return_probabilities)
                    index, results = index + 1, []
                    bar.update()

    def windows(self, images: Iterable[ImageViews | torch.Tensor], planned: deque) -> Iterator[torch.Tensor]:
        """The windows of all images; what they belong to is put into `planned`, before the first of them."""
        for index, image in enumerate(images):
            if isinstance(image, torch.Tensor):
                image = ImageViews([ImageView(image)], tuple(image.shape[1:]))
            if not isinstance(image, ImageViews) or not image.views or min(image.size, default=0) < 1:
                raise ValueError(f"Input {index} must be `ImageViews` or a tensor (channels, height, width).")
            scaled = []
            for view in image.views:
                shape = tuple(view.pixel_values.shape)
                if len(shape) != 3 or shape[0] != self.num_channels or min(shape) < 1:
                    raise ValueError(
                        f"Input {index} must have views of the shape ({self.num_channels}, height, width), got {shape}."
                    )
                scaled.append(self._enlarged(view.pixel_values))
            views = [ViewWindows.plan(pixels.shape[1:], self.window_size, self.stride) for pixels in scaled]
            # Without the pixels, which the windows hold as long as they wait.
            outline = ImageViews([ImageView(torch.empty(0), view.is_flipped) for view in image.views], image.size)
            planned.append((outline, views))
            for pixels, view in zip(scaled, views):
                for top in view.tops:
                    for left in view.lefts:
                        yield pixels[:, top : top + self.window_size, left : left + self.window_size]

    def _enlarged(self, pixels: torch.Tensor) -> torch.Tensor:
        height, width = pixels.shape[1:]
        if min(height, width) >= self.window_size:
            return pixels
        scale = self.window_size / min(height, width)
        size = [max(int(side * scale + 1e-6), self.window_size) for side in (height, width)]
        return F.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False)[0]


@dataclass(frozen=True)
class ViewWindows:
    """The windows of a view: its size, where rows and columns of windows begin, and the side of a window."""

    size: tuple[int, int]
    tops: list[int]
    lefts: list[int]
    window: int

    @classmethod
    def plan(cls, size: Sequence[int], window: int, stride: int) -> "ViewWindows":
        tops, lefts = (window_anchors(side, window, stride) for side in size)
        return cls(tuple(size), tops, lefts, window)

    @property
    def num_windows(self) -> int:
        return len(self.tops) * len(self.lefts)

    def rows(self, windows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """
        Rows `start` to `stop` of the view's logits, averaged where windows overlap: `(num_labels, rows, width)`.

        Args:
            windows (`torch.Tensor` of shape `(rows of windows, columns of windows, num_labels, patch rows, patch
                columns)`): logits of all windows.
        """
        width = self.size[1]
        total = windows.new_zeros(windows.shape[2], stop - start, width)
        cover = windows.new_zeros(stop - start, width)
        for top, row in zip(self.tops, windows):
            first, last = max(start, top), min(stop, top + self.window)
            if first >= last:
                continue
            into = slice(first - start, last - start)
            for left, logits in zip(self.lefts, row):
                columns = slice(left, left + self.window)
                total[:, into, columns] += _resized_rows(
                    logits, first - top, last - top, (self.window, self.window), (0, logits.shape[1])
                )
                cover[into, columns] += 1
        return total / cover

    def resized_rows(self, windows: torch.Tensor, start: int, stop: int, size: tuple[int, int]) -> torch.Tensor:
        """The same of the view resized to `size` (height, width): `(num_labels, stop - start, width)`."""
        if size == self.size:
            return self.rows(windows, start, stop)
        above, below, _ = _neighbours(start, stop, self.size[0], size[0])
        first, last = int(above[0]), int(below[-1]) + 1
        return _resized_rows(self.rows(windows, first, last), start, stop, size, (first, self.size[0]))


def merge_windows(
    index: int, image: ImageViews, views: list[ViewWindows], results: list[EngineResult], return_probabilities: bool
) -> SlidingResult:
    """The answer to the image at `index` from those of its windows, view by view, row by row."""
    logits, exits, start = [], [], 0
    for number, view in enumerate(views):
        parts = results[start : start + view.num_windows]
        start += view.num_windows
        logits.append(torch.stack([part.logits for part in parts]).unflatten(0, (len(view.tops), -1)))
        places = [(top, left) for top in view.tops for left in view.lefts]
        exits += [WindowExit(number, *place, part.exit_stage, part.entropy) for place, part in zip(places, parts)]
    height, width = image.size
    num_labels = logits[0].shape[2]
    labels = torch.empty(height, width, dtype=torch.long)
    probabilities = torch.empty(num_labels, height, width) if return_probabilities else None
    widest = max(width, *(view.size[1] for view in views))
    band = max(BAND_BYTES // (4 * num_labels * widest), 1)
    for start in range(0, height, band):
        stop = min(start + band, height)
        maps = (
            outline.oriented(view.resized_rows(windows, start, stop, image.size))
            for outline, view, windows in zip(image.views, views, logits)
        )
        if len(views) == 1 and probabilities is None:  # the order of logits is that of probabilities
            mean = next(maps)
        else:
            mean = sum(resized.softmax(dim=0) for resized in maps) / len(views)
        labels[start:stop] = mean.argmax(dim=0)
        if probabilities is not None:
            probabilities[:, start:stop] = mean
    return SlidingResult(index, labels, exits, probabilities)


def _neighbours(start: int, stop: int, source: int, target: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For rows `start` to `stop` of `target`: the two of `source` that each lies between, and the second's share."""
    places = ((torch.arange(start, stop, dtype=torch.float64) + 0.5) * (source / target) - 0.5).clamp(0, source - 1)
    above = places.floor().long()
    return above, (above + 1).clamp(max=source - 1), (places - above).float()


def _resized_rows(
    rows: torch.Tensor, start: int, stop: int, size: tuple[int, int], held: tuple[int, int]
) -> torch.Tensor:
    """
    Rows `start` to `stop` of a map resized bilinearly (`align_corners=False`) to `size` (height, width).

    Args:
        rows (`torch.Tensor` of shape `(num_labels, some rows, width)`): those of the map that are needed.
        held (`tuple[int, int]`): the number of the first of `rows`, and the height of the map.
    """
    above, below, share = _neighbours(start, stop, held[1], size[0])
    share = share[:, None].to(rows.dtype)
    between = torch.lerp(rows[:, above - held[0]], rows[:, below - held[0]], share)
    return F.interpolate(between[None], size=(stop - start, size[1]), mode="bilinear", align_corners=False)[0]
