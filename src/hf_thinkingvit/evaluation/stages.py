"""One pass over the images in which every stage answers every image, and each answer is scored and measured."""

from collections.abc import Callable, Iterable, Sequence

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import PreTrainedModel

from ..models.configuration_checks import as_pair
from ..models.configuration_staged import thinks_in_stages
from ..models.exit_rules import ExitRule, resolve_thresholds
from ..models.staged_loop import run_stages
from ..models.staged_run import Answer


# Of one stage's answers to a batch: tensors whose first dimension is the image.
Measure = Callable[[Answer, dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@torch.no_grad()
def measure_stages(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    measure: Measure,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> tuple[dict[str, torch.Tensor], tuple[int, int] | None]:
    """
    Run every stage once on every image. Every process calls it; each gets the measurements of all images.

    Args:
        model (`PreTrainedModel`): that thinks in stages, on the accelerator's device; left in the mode it was in.
        batches: with `pixel_values` and what `measure` reads, prepared by `accelerator` where there is one.
        measure (`Callable`): `(answer, batch) -> dict` of what to record of a stage's answers, tensors whose first
            dimension is the image.
        accelerator (`Accelerator`, *optional*): gathers what several processes compute.
        progress (`bool`): show a progress bar, on the main process.

    Returns:
        For each entry of `measure` a float32 tensor `(images, stages, ...)` on the CPU, and `score`, the exit
        criterion's `(images, stages)`; empty if there are no batches. And the (height, width) of the last batch, `None`
        if there are none.

    Raises:
        ValueError: if the model does not think in stages.
    """
    if not thinks_in_stages(model):
        raise ValueError(f"{type(model).__name__} does not think in stages: there is no τ to evaluate.")
    config, rule, stages = model.config, model.exit_rule(), range(model.config.num_stages)
    columns: dict[str, list[torch.Tensor]] = {}
    image_size = None
    show = progress and (accelerator is None or accelerator.is_main_process)
    was_training = model.training
    model.eval()
    try:
        for batch in tqdm(batches, desc="evaluating", unit="batch", disable=not show):
            batch = {name: entry.to(model.device) for name, entry in batch.items() if torch.is_tensor(entry)}
            pixel_values = batch["pixel_values"].to(model.dtype)
            image_size = tuple(pixel_values.shape[-2:])
            sizes = {} if image_size == as_pair(config.image_size) else {"interpolate_pos_encoding": True}
            run = run_stages(model, rule, stages, pixel_values, run_all=True, **sizes)
            measured = [{"score": step.score, **measure(step.answer, batch)} for step in run.steps]
            rows = {name: torch.stack([entry[name].float() for entry in measured], dim=1) for name in measured[0]}
            if accelerator is not None:
                rows = accelerator.gather_for_metrics(rows)
            for name, tensor in rows.items():
                columns.setdefault(name, []).append(tensor.cpu())
    finally:
        model.train(was_training)
    return {name: torch.cat(parts) for name, parts in columns.items()}, image_size


def exit_stages_of_each(
    scores: torch.Tensor, thresholds: Sequence[float | Sequence[float]], criterion: str, entropy_top_k: int
) -> torch.Tensor:
    """
    Where each image leaves under several τ at once.

    Args:
        scores (`torch.FloatTensor` of shape `(images, stages)`): of the exit criterion.
        thresholds (`list`): each one τ, or a list with one per exit.
        criterion (`str`), entropy_top_k (`int`): as in the model's configuration.

    Returns:
        `torch.LongTensor` of shape `(thresholds, images)`.

    Raises:
        ValueError: for a τ that is none.
    """
    num_images, num_stages = scores.shape
    resolved = [resolve_thresholds(threshold, num_stages - 1) for threshold in thresholds]
    # Of each exit, one τ per row; float32 as the scores, to which torch rounds a single τ as well.
    columns = torch.tensor(resolved, dtype=scores.dtype).unbind(dim=1)
    rule = ExitRule(criterion, tuple(column[:, None] for column in columns), entropy_top_k)
    goes_on = torch.ones(len(resolved), num_images, dtype=torch.bool)
    stages = torch.zeros(len(resolved), num_images, dtype=torch.long)
    for stage in range(num_stages - 1):
        goes_on &= ~rule.exits(stage, scores[:, stage])
        stages += goes_on
    return stages
