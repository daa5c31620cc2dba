"""
Full batches at every stage: each stage has a queue of images, and runs when the queue holds a full batch.

Within one batch, early exit leaves ever fewer images to later stages, and small batches waste the hardware. The engine
takes a stream instead, and batches the images that go on from many batches. It knows stages and exits, but no layers or
families. A model that does not think in stages runs as one stage.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..models.configuration_staged import thinks_in_stages
from ..models.exit_rules import Verdict, answer_entropy
from ..models.staged_arguments import resolve_stages
from ..models.staged_loop import step_stage
from ..models.staged_run import Answer, Memory, State, select_rows
from ..models.tasks import Task
from .runtimes import ExportedModel, with_runtime
from .stream import EngineResult, EngineStats, Stream


class _WholeModel(Task):
    """Wraps a model that does not think in stages as one stage, with an exit rule by which every image exits."""

    def __init__(self, model: PreTrainedModel, **kwargs):
        self.model, self.kwargs = model, kwargs

    def begin(self, pixel_values: torch.Tensor, **kwargs) -> State:
        return {"pixel_values": pixel_values}

    def run_stage(self, stage_index: int, state: State, is_last: bool) -> State:
        return state

    def answer(self, stage_index: int, state: State) -> Answer:
        return {"logits": self.model(state["pixel_values"], **self.kwargs).logits}

    def first_memory(self, count: int, generator: None = None) -> Memory:
        return {}

    def judge(self, stage_index: int, answer: Answer, memory: Memory) -> Verdict:
        entropies = answer_entropy(answer["logits"], self.model.config)
        return Verdict(entropies, torch.ones_like(entropies, dtype=torch.bool), entropies, {})


# Bytes of an image's answer up to which the answers to all images of a batch are copied with the decision.
SMALL_ANSWER = 2**16


def _to_host(exits: torch.Tensor, answer: Answer) -> tuple[torch.Tensor, Answer]:
    """
    Which images exit, and the answers to those, on the CPU, float32 where they are floating-point. One copy for both,
    and so one synchronisation, unless answers are large: then the decision first, and after it only those answers.
    """
    answer = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in answer.items()}
    if sum(tensor.nbytes for tensor in answer.values()) > SMALL_ANSWER * len(exits):
        on_host = exits.cpu()
        rows = _rows(on_host).to(exits.device)
        return on_host, {name: tensor.index_select(0, rows).cpu() for name, tensor in answer.items()}
    tensors = [exits, *answer.values()]
    columns = [tensor.contiguous().view(len(exits), -1).view(torch.uint8) for tensor in tensors]
    parts = torch.cat(columns, dim=1).cpu().split([column.shape[1] for column in columns], dim=1)
    on_host, *entries = (
        part.clone(memory_format=torch.contiguous_format).view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(parts, tensors)
    )
    rows = _rows(on_host)
    return on_host, {name: entry.index_select(0, rows) for name, entry in zip(answer, entries)}


def _rows(mask: torch.Tensor) -> torch.Tensor:
    return torch.tensor([row for row, chosen in enumerate(mask.tolist()) if chosen], dtype=torch.long)


class AdaptiveEngine:
    r"""
    Classifies a stream of images with full batches at every stage.

    Args:
        model (`PreTrainedModel`, or what `from_exported` returned):
            A classifier of this package, on the device to run on. The engine puts it into evaluation mode. Several
            engines may share it, each in its own thread.
        processor (`BaseImageProcessor`, *optional*):
            Preprocesses images and paths. Without it, inputs must be tensors `(channels, height, width)`.
        batch_size (`int`, *optional*, defaults to 64):
            Images in a full batch, at every stage. If a batch runs out of memory, its size is halved for the rest of
            the stream, with a warning. If a single image runs out of memory, the error is raised.
        threshold, max_stages, interpolate_pos_encoding (*optional*):
            As in the model's `forward`. Images whose answer is broken (NaN, or no softmax) never exit early, and their
            entropy is NaN.
        keep_rate (`float` or `list[float]`, *optional*):
            Of a model with pruning layers: the share of patches that remain, instead of `config.pruning_keep_rate`.
        generator (`torch.Generator`, *optional*):
            As in the model's `forward`, of models whose answers are random: each image that enters the first stage gets
            the next number, in input order, so that a generator of the same seed gives the same answers with any
            `batch_size`. It goes on from stream to stream; `generator.manual_seed(seed)` starts it again.
        in_order (`bool`, *optional*, defaults to `True`):
            Yield results in input order; otherwise as soon as they are computed.
        max_wait (`float`, *optional*):
            Longest time in seconds that an image waits for a batch to fill up; unlimited by default. For services,
            whose images do not come at once.
        max_pending (`int`, *optional*):
            With `in_order`, how many results may wait for an earlier image; beyond that, its stage runs on a partial
            batch. By default 16 batches. The queue of each stage and the images read ahead hold at most two batches, so
            memory is bounded however long the stream is.
        on_error (`"raise"` or `"return"`, *optional*, defaults to `"raise"`):
            Whether an image that cannot be read raises an exception or yields a result with `error`.
        num_workers (`int`, *optional*, defaults to 0):
            Processes that decode and preprocess images, in chunks; with 0 it is done in the reader's thread. For
            folders and data sets, not for live streams: the images must be picklable, and `max_wait` must be `None`.
        runtime (`str`, *optional*):
            What runs the stages: `"torch"` (the default, the model as it is), `"compiled"`, `"openvino"` or
            `"onnxruntime"`, see `with_runtime`. The last two export a copy of the model here and now, which takes a
            while: `export_model` and `from_exported` do it once.
        precision (`"fp32"`, `"bf16"`, `"fp16"`, *optional*, defaults to `"fp32"`):
            Of `"openvino"` and `"onnxruntime"`. A PyTorch model computes in its dtype.

    Attributes:
        stats (`EngineStats`): counts of the current or the latest stream.

    Example:

    ```python
    >>> engine = AdaptiveEngine(model, processor, batch_size=128)
    >>> for result in engine(paths):
    ...     print(paths[result.index], result.logits.argmax().item(), result.exit_stage)
    ```"""

    def __init__(
        self,
        model: PreTrainedModel | ExportedModel,
        processor: BaseImageProcessor | None = None,
        *,
        batch_size: int = 64,
        threshold: float | Sequence[float] | None = None,
        max_stages: int | None = None,
        keep_rate: float | Sequence[float] | None = None,
        interpolate_pos_encoding: bool | None = None,
        generator: torch.Generator | None = None,
        in_order: bool = True,
        max_wait: float | None = None,
        max_pending: int | None = None,
        on_error: Literal["raise", "return"] = "raise",
        num_workers: int = 0,
        runtime: str | None = None,
        precision: str | None = None,
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}.")
        if max_wait is not None and not max_wait >= 0:
            raise ValueError(f"`max_wait` must be at least 0 seconds, got {max_wait!r}.")
        if max_pending is not None and max_pending < 1:
            raise ValueError(f"`max_pending` must be at least 1, got {max_pending!r}.")
        if on_error not in ("raise", "return"):
            raise ValueError(f'`on_error` must be "raise" or "return", got {on_error!r}.')
        if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 0:
            raise ValueError(f"`num_workers` must be an integer of at least 0, got {num_workers!r}.")
        if num_workers and max_wait is not None:
            raise ValueError(
                "`num_workers` must be 0 with `max_wait`: workers of a DataLoader hand nothing over while the input "
                "keeps them waiting, so that images of a live stream would wait longer."
            )
        self.num_workers = num_workers
        model = with_runtime(model, runtime, precision)
        self.model, self.processor, self.batch_size = model.eval(), processor, batch_size
        self.in_order, self.max_wait, self.on_error = in_order, max_wait, on_error
        self.max_pending = 16 * batch_size if max_pending is None else max_pending
        self.generator = generator
        if thinks_in_stages(model):
            self.steps, self.rule = model, model.exit_rule(threshold)
            self.stages = resolve_stages(model.config.num_stages, max_stages)
            self.rule.first_memory(0, generator)  # refuses a generator that nothing would draw from
        else:
            if any(argument is not None for argument in (threshold, max_stages, generator)):
                raise ValueError(
                    f"{type(model).__name__} does not think in stages: no `threshold`, no `max_stages`, no `generator`."
                )
            sizes = {} if interpolate_pos_encoding is None else {"interpolate_pos_encoding": interpolate_pos_encoding}
            self.steps = self.rule = _WholeModel(model, **sizes)
            self.stages = range(1)
        # Of every step.
        self.arguments = {
            "interpolate_pos_encoding": interpolate_pos_encoding,
            **self.steps.token_arguments(keep_rate),
        }
        self.stats = self.no_stats()

    def no_stats(self) -> EngineStats:
        return EngineStats(*([0] * len(self.stages) for _ in range(3)))

    def __call__(self, inputs: Iterable[Any]) -> Iterator[EngineResult]:
        """
        Args:
            inputs (`Iterable`): images (paths, URLs, PIL images, arrays, or functions that return one) or preprocessed
                tensors `(channels, height, width)`: a list, a generator, a dataset, a `DataLoader` whose batches are
                images, or a tensor or array of four dimensions. A single image is a stream of one. An exception in
                place of an image marks one that could not be read; [`WithThreshold`] gives an image its own τ.
                Separate threads read and preprocess the input, at most two batches ahead; `num_workers` read at most
                two chunks of 32 images each ahead.

        Yields:
            [`EngineResult`], one per image.

        Raises:
            ValueError: immediately, if `inputs` is a folder, a dict or otherwise not a stream of images; after the
                results of all earlier images, if an image cannot be read.
            BaseException: whatever iterating over `inputs` raises, including `KeyboardInterrupt` and `SystemExit`;
                after the results of all earlier images.
        """
        self.model.eval()  # it may have been trained since the engine was created
        stream = Stream(self, inputs)
        return stream.in_order() if self.in_order else stream.as_they_finish()

    def resolve_threshold(self, threshold: float | Sequence[float]) -> tuple[float, ...]:
        """One τ per exit of the model; `ValueError` if it is invalid, or the model does not think in stages."""
        if isinstance(self.rule, _WholeModel):
            raise ValueError(f"{type(self.model).__name__} does not think in stages: an image has no `threshold`.")
        return self.model.exit_rule(threshold).thresholds

    @torch.no_grad()
    def step(
        self, stage: int, state: State, thresholds: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Answer, State]:
        """
        Run a stage on a batch of its queue.

        Args:
            stage (`int`): which.
            state (`dict[str, torch.Tensor]`): of the images of the batch.
            thresholds (`torch.Tensor` of shape `(images, exits)`, *optional*): τ of each image, instead of that of the
                engine.

        Returns:
            `exits` (bool `(images,)`) and the answers to all images (floating-point entries as float32), both on the
            CPU; and the state of the images that go on.
        """
        if stage == 0:
            state, device = dict(state), self.model.device
            pixel_values = state.pop("pixel_values")
            if device.type == "cuda":
                pixel_values = pixel_values.pin_memory()
            drawn = {name: tensor.to(device, non_blocking=True) for name, tensor in state.items()}
            state = {**drawn, "pixel_values": pixel_values.to(device, self.model.dtype, non_blocking=True)}
        rule = self.rule
        if thresholds is not None:
            thresholds = thresholds.to(self.model.device, non_blocking=True)
            rule = replace(rule, thresholds=tuple(thresholds.unbind(dim=1)))
        step = step_stage(self.steps, rule, self.stages, stage, state, **self.arguments)
        exits, answer = _to_host(step.exits, step.answer)
        going_on, state = (~exits).nonzero().squeeze(1), step.state
        if 0 < len(going_on) < len(exits):
            state = select_rows(state, going_on.to(step.exits.device, non_blocking=True))
        return exits, answer, state
