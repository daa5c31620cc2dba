"""Top-1 and top-5 accuracy of every answer that a model gives."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import nn

from ..models.configuration_staged import thinks_in_stages
from .labels import check_single_label


def answers(model: nn.Module, pixel_values: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """
    Logits of each stage for every image, of models that think in stages; else the model's one answer. And per image
    what else the model measures of itself: `mean_depth`, `macs`.
    """
    outputs = model(pixel_values, **({"output_stage_logits": True} if thinks_in_stages(model) else {}))
    measured = {name: outputs[name] for name in ("mean_depth", "macs") if outputs.get(name) is not None}
    return outputs.get("stage_logits") or (outputs.logits,), measured


def _hits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Which of the best five classes is right, bool `(batch, up to 5)`; none where a logit is no finite number."""
    best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    return (best == labels[:, None]) & logits.isfinite().all(dim=-1, keepdim=True)


@torch.no_grad()
def evaluate_accuracy(
    accelerator: Accelerator, models: dict[str, nn.Module], batches: Iterable[dict[str, torch.Tensor]]
) -> dict[str, dict]:
    """
    Evaluate several models in one pass over the images. Every process calls it.

    Args:
        accelerator (`Accelerator`): which has prepared `batches`, so that images it repeats to fill a batch count once.
        models (`dict[str, nn.Module]`): not wrapped; put into evaluation mode, and left as they were.
        batches: `pixel_values` and `labels` (class indices).

    Returns:
        For each model `top1` and `top5`, a list of percentages with one entry per stage; `images`, how many they are
        of; and the mean of what the model measures of itself.

    Raises:
        ValueError: if there are no images, or a model is not for single-label classification.
    """
    for model in models.values():
        check_single_label(model.config)
    was_training = {name: model.training for name, model in models.items()}
    sums: dict[str, torch.Tensor] = {}
    names: dict[str, list[str]] = {}
    images = 0
    try:
        for model in models.values():
            model.eval()
        for batch in batches:
            labels = batch["labels"]
            for name, model in models.items():
                with accelerator.autocast():
                    logits, measured = answers(model, batch["pixel_values"])
                hits = [_hits(stage, labels) for stage in logits]
                columns = [hit[:, 0] for hit in hits] + [hit.any(dim=1) for hit in hits] + list(measured.values())
                names[name] = list(measured)
                rows = accelerator.gather_for_metrics(torch.stack([column.float() for column in columns], dim=1))
                sums[name] = sums.get(name, 0) + rows.cpu().double().sum(dim=0)
            images += len(rows)
    finally:
        for name, model in models.items():
            model.train(was_training[name])
    if not images:
        raise ValueError("There are no images to evaluate on.")
    results = {}
    for name, total in sums.items():
        means = (total / images).tolist()
        num_stages = (len(means) - len(names[name])) // 2
        results[name] = {
            "top1": [100 * value for value in means[:num_stages]],
            "top5": [100 * value for value in means[num_stages : 2 * num_stages]],
            "images": images,
            **dict(zip(names[name], means[2 * num_stages :])),
        }
    return results
