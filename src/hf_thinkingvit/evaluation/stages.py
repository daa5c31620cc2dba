"""One pass over images that runs every stage on every image, and records the score and measurements of each answer."""

from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import PreTrainedModel

from ..models.configuration_checks import as_pair
from ..models.configuration_staged import thinks_in_stages
from ..models.staged_loop import run_stages
from ..models.staged_run import Answer


# (answer of one stage, batch) → measurements: tensors whose first dimension is the image.
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
    Run every stage once on every image. Every process must call it, and gets the measurements of all images.

    Args:
        model (`PreTrainedModel`): a model that thinks in stages, on the accelerator's device; its mode is restored.
        batches: with `pixel_values` and the entries that `measure` reads, prepared by `accelerator` if it is given.
        measure (`Callable`): `(answer, batch) -> dict` of the measurements of a stage's answers, tensors whose first
            dimension is the image.
        accelerator (`Accelerator`, *optional*): gathers the results of several processes.
        progress (`bool`): show a progress bar, on the main process.

    Returns:
        For each entry of `measure` a tensor `(images, stages, ...)` on the CPU, in its dtype (booleans as uint8, half
        precision as float32), and `score`, the exit criterion's `(images, stages)`; empty if there are no batches. And
        the (height, width) of the last batch, `None` if there are none.

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
            rows = {name: torch.stack([_plain(entry[name]) for entry in measured], dim=1) for name in measured[0]}
            if accelerator is not None:
                rows = accelerator.gather_for_metrics(rows)
            for name, tensor in rows.items():
                columns.setdefault(name, []).append(tensor.cpu())
    finally:
        model.train(was_training)
    return {name: torch.cat(parts) for name, parts in columns.items()}, image_size


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """In a dtype that every backend of `torch.distributed` gathers, without loss."""
    if tensor.dtype == torch.bool:
        return tensor.to(torch.uint8)
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
