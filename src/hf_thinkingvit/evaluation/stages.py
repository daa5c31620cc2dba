"""One pass over images that runs every stage on every image, and records the score and measurements of each answer."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import PreTrainedModel

from ..models.configuration_checks import as_pair
from ..models.configuration_staged import thinks_in_stages
from ..models.exit_rules import ExitRule
from ..models.staged_arguments import resolve_thresholds
from ..models.staged_loop import run_stages
from ..models.staged_run import Answer


# (answer of one stage, batch) → measurements: tensors whose first dimension is the image.
Measure = Callable[[Answer, dict[str, torch.Tensor]], dict[str, torch.Tensor]]
# The same of an answer beside that of the last stage: (answer, last answer, batch) → measurements.
Comparison = Callable[[Answer, Answer, dict[str, torch.Tensor]], dict[str, torch.Tensor]]

Threshold = float | Sequence[float]


class StageScores:
    """
    The exit criterion's scores of every stage's answer to every image, from which the exits under any τ follow.

    Attributes:
        scores (`torch.FloatTensor` of shape `(images, stages)`): float32.
        criterion (`str`), entropy_top_k (`int`), exit_at_threshold (`bool`): as in the model's configuration.
        prepared (`str`, *optional*): how images were resized and cut, in words, where the image processor does not say
            it.
    """

    scores: torch.Tensor
    criterion: str
    entropy_top_k: int
    exit_at_threshold: bool
    prepared = None

    def __len__(self) -> int:
        return len(self.scores)

    def judged(self) -> Any:
        """What is recorded of the images whose answers can be right or wrong."""
        return self

    @property
    def num_stages(self) -> int:
        return self.scores.shape[1]

    def exit_stages(self, threshold: Threshold) -> torch.Tensor:
        """
        The stage at which each image exits under τ (one, or one per exit): int64 `(images,)`. `ValueError` if τ is
        invalid.
        """
        return self.exit_stages_of_each([threshold])[0]

    def exit_stages_of_each(self, thresholds: Sequence[Threshold]) -> torch.Tensor:
        """`exit_stages` under several τ at once: int64 `(thresholds, images)`."""
        resolved = [resolve_thresholds(threshold, self.num_stages - 1) for threshold in thresholds]
        # One column per exit, one row per τ; float32 like the scores, to which torch rounds a scalar τ as well.
        columns = torch.tensor(resolved, dtype=self.scores.dtype).unbind(dim=1)
        rule = ExitRule(
            self.criterion,
            tuple(column[:, None] for column in columns),
            self.entropy_top_k,
            exit_at_threshold=self.exit_at_threshold,
        )
        goes_on = torch.ones(len(resolved), len(self.scores), dtype=torch.bool)
        stages = torch.zeros(len(resolved), len(self.scores), dtype=torch.long)
        for stage in range(self.num_stages - 1):
            goes_on &= ~rule.exits(stage, self.scores[:, stage])
            stages += goes_on
        return stages

    def means(self, thresholds: Sequence[Threshold], values: torch.Tensor) -> torch.Tensor:
        """
        For every τ, the mean over the images of `values` `(rows, stages)` at their exits, summed over the rows of an
        image: float64 `(thresholds,)`.
        """
        together = max(1, 2**23 // self.scores.numel())  # about 100 MB
        means = []
        for start in range(0, len(thresholds), together):
            stages = self.exit_stages_of_each(thresholds[start : start + together])
            means.append(values.T.expand(self.num_stages, -1).gather(0, stages).double().sum(dim=1) / len(self))
        return torch.cat(means)

    def at(self, values: torch.Tensor, exit_stages: torch.Tensor) -> torch.Tensor:
        """Each image's entry of `values` `(images, stages, ...)` at its exit."""
        return values[torch.arange(len(values)), exit_stages]


@dataclass(frozen=True)
class StageMeasurements(StageScores):
    """
    Scores, and what was measured of every stage's answer to every image, whatever the task.

    Attributes:
        scores, criterion, entropy_top_k, exit_at_threshold: as in [`StageScores`].
        measures (`dict[str, torch.Tensor]`): on the CPU, each of shape `(images, stages, ...)`, in its dtype (bool as
            uint8, half precision as float32); empty if there were no images.
        image (`torch.LongTensor` of shape `(rows,)`, *optional*): the image that each row is of, where the batches are
            windows of images.
        image_size (`tuple[int, int]`, *optional*): (height, width) of the last batch; `None` if there was none.
    """

    scores: torch.Tensor
    criterion: str
    entropy_top_k: int
    exit_at_threshold: bool
    measures: dict[str, torch.Tensor]
    image_size: tuple[int, int] | None = None
    image: torch.Tensor | None = None

    def measures_at(self, threshold: Threshold) -> dict[str, torch.Tensor]:
        """What was measured of each image's accepted answer under τ: `(images, ...)`."""
        stages = self.exit_stages(threshold)
        return {name: self.at(values, stages) for name, values in self.measures.items()}


@torch.no_grad()
def measure_stages(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    measure: Measure,
    accelerator: Accelerator | None = None,
    progress: bool = True,
    compare: Comparison | None = None,
    generator: torch.Generator | None = None,
) -> StageMeasurements:
    """
    Run every stage once on every image. Every process must call it, and gets the measurements of all images.

    Batches of [`~hf_thinkingvit.windows.window_batches`] have several rows for each image, as their entry `image` says.

    Args:
        model (`PreTrainedModel`): a model that thinks in stages, on the accelerator's device; its mode is restored.
        batches: with `pixel_values` and the entries that `measure` reads, prepared by `accelerator` if it is given.
        measure (`Callable`): `(answer, batch) -> dict` of the measurements of a stage's answers, tensors whose first
            dimension is the image.
        accelerator (`Accelerator`, *optional*): gathers the results of several processes.
        progress (`bool`): show a progress bar, on the main process.
        compare (`Callable`, *optional*): `(answer, last answer, batch) -> dict` of further measurements.
        generator (`torch.Generator`, *optional*): of a model whose answers are random; by default one with the seed 0,
            so that measuring again gives the same. An image's number does not depend on the size of the batches, nor on
            how many processes share them.

    Raises:
        ValueError: if the model does not think in stages.
    """
    if not thinks_in_stages(model):
        raise ValueError(f"{type(model).__name__} does not think in stages: there is no τ to evaluate.")
    config, rule, stages = model.config, model.exit_rule(), range(model.config.num_stages)
    columns: dict[str, list[torch.Tensor]] = {}
    image_size, num_images, image = None, 0, []
    show = progress and (accelerator is None or accelerator.is_main_process)
    processes, place = (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    if generator is None and rule.draws:
        generator = torch.Generator().manual_seed(0)
    was_training = model.training
    model.eval()
    try:
        for batch in tqdm(batches, desc="evaluating", unit="batch", disable=not show):
            batch = {name: entry.to(model.device) for name, entry in batch.items() if torch.is_tensor(entry)}
            image_size = tuple(batch["pixel_values"].shape[-2:])
            sizes = {} if image_size == as_pair(config.image_size) else {"interpolate_pos_encoding": True}
            measured_parts, count = [], len(batch["pixel_values"])
            # Processes read consecutive batches: each draws for all, so that the numbers are those of one process.
            rule.first_memory(count * place, generator)
            for part in parts_of(batch):
                pixel_values = part["pixel_values"].to(model.dtype)
                run = run_stages(model, rule, stages, pixel_values, run_all=True, generator=generator, **sizes)
                measured = [{"score": step.score, **measure(step.answer, part)} for step in run.steps]
                if compare is not None:
                    last = run.steps[-1].answer
                    pairs = zip(measured, run.steps)
                    measured = [{**entry, **compare(step.answer, last, part)} for entry, step in pairs]
                measured_parts.append(
                    {name: torch.stack([_plain(entry[name]) for entry in measured], dim=1) for name in measured[0]}
                )
            rule.first_memory(count * (processes - 1 - place), generator)
            rows = {name: torch.cat([part[name] for part in measured_parts]) for name in measured_parts[0]}
            if "image" in batch:
                rows, image_of_row = _gather_images(rows, batch["image"], accelerator)
                image.append(image_of_row + num_images)
                num_images = int(image[-1][-1]) + 1
            elif accelerator is not None:
                rows = accelerator.gather_for_metrics(rows)
            for name, tensor in rows.items():
                columns.setdefault(name, []).append(tensor.cpu())
    finally:
        model.train(was_training)
    measures = {name: torch.cat(parts) for name, parts in columns.items()}
    scores = measures.pop("score", torch.zeros(0, len(stages)))
    return StageMeasurements(
        scores,
        config.exit_criterion,
        config.entropy_top_k,
        config.exit_at_threshold,
        measures,
        image_size,
        torch.cat(image) if image else None,
    )


def parts_of(batch: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """
    A batch of windows in parts of at most as many windows as it has images (its entry `rows`), so that a forward pass
    does not grow with the size of the images. Other batches are one part.
    """
    count = len(batch["pixel_values"])
    together = int(batch["rows"]) if "rows" in batch else max(count, 1)
    for start in range(0, max(count, 1), together):
        yield {name: entry[start : start + together] if entry.ndim else entry for name, entry in batch.items()}


def _gather_images(
    rows: dict[str, torch.Tensor], image: torch.Tensor, accelerator: Accelerator | None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """
    The rows of all processes, and the image of each, from 0. As objects, one for each image: processes have the same
    number of images in a batch, but not of rows.
    """
    image = image.cpu()
    parts = [{name: tensor[image == index].cpu() for name, tensor in rows.items()} for index in image.unique()]
    if accelerator is not None:
        parts = accelerator.gather_for_metrics(parts, use_gather_object=True)
    counts = torch.tensor([len(part["score"]) for part in parts])
    gathered = {name: torch.cat([part[name] for part in parts]) for name in rows}
    return gathered, torch.arange(len(parts)).repeat_interleave(counts)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """In a dtype that every backend of `torch.distributed` gathers, without loss."""
    if tensor.dtype == torch.bool:
        return tensor.to(torch.uint8)
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
