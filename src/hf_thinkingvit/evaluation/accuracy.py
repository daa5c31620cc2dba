"""Top-1 and top-5 accuracy of every stage or sub-network of a model."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from .answers import all_logits, arguments_for_all
from .labels import check_single_label


DEFAULT = "default_sub_network"  # in what is measured of several sub-networks, the number of the model's default one


def main_measure(measured: Mapping[str, Any], name: str) -> float:
    """
    Of an entry of `evaluate_accuracy` (or of segmentation), the measure `name` of the answer that decides: that of the
    last stage, or of the default sub-network.
    """
    return measured[name][measured.get(DEFAULT, -1)]


def kind_of_answers(measured: Mapping[str, Any]) -> str:
    """What the lists of such an entry have one number for: `"stage"` or `"sub-network"`."""
    return "sub-network" if DEFAULT in measured else "stage"


def _every_logits(
    model: nn.Module, pixel_values: torch.Tensor, every_sub_network: bool
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """All answers to every image, and the measurements per image in the model's output: `mean_depth`, `macs`."""
    outputs = model(pixel_values, **arguments_for_all(model, every_sub_network))
    measured = {name: outputs[name] for name in ("mean_depth", "macs") if outputs.get(name) is not None}
    return all_logits(outputs), measured


def _hits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Which of the five best classes is right, bool `(batch, up to 5)`; none of them if any logit is not finite."""
    best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    return (best == labels[:, None]) & logits.isfinite().all(dim=-1, keepdim=True)


@torch.no_grad()
def evaluate_accuracy(
    accelerator: Accelerator,
    models: dict[str, nn.Module],
    batches: Iterable[dict[str, torch.Tensor]],
    every_sub_network: bool = False,
) -> dict[str, dict]:
    """
    Evaluate several models in one pass over the images. Every process must call it.

    Args:
        accelerator (`Accelerator`): has prepared `batches`; images that it repeats to fill a batch count once.
        models (`dict[str, nn.Module]`): unwrapped models, run in evaluation mode; their modes are restored.
        batches: `pixel_values` and `labels` (class indices).
        every_sub_network (`bool`): of an elastic ViT, evaluate all sub-networks instead of the default one.

    Returns:
        For each model `top1` and `top5`, lists of percentages with one entry per stage (or sub-network); `images`, the
        number of images; the means of `mean_depth` and `macs`, if the model returns them; and of several sub-networks
        `default_sub_network`, the number of the default one.

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
                    logits, measured = _every_logits(model, batch["pixel_values"], every_sub_network)
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
        if every_sub_network and getattr(models[name].config, "sub_networks", None):
            results[name][DEFAULT] = models[name].config.default_sub_network
    return results
