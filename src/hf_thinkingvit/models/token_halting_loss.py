"""A-ViT's training loss (arXiv 2112.07658, section 3): the task loss, the ponder loss and the distributional prior."""

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .task_classification import share_of_batch
from .tasks import loss_arguments


OUTSIDE_LOSS = (
    "A loss that is computed from `logits` leaves out the ponder and prior losses, so that nothing teaches tokens to "
    "halt; `Trainer` does that with `label_smoothing_factor` or `compute_loss_func`. For label smoothing, set "
    "`label_smoothing` in the model's configuration instead. A loss of your own should add `ponder_loss` and "
    "`prior_loss` of the outputs, times their weights in the configuration; call the model with "
    "`output_halting_losses=True` to say so."
)


def depth_prior(num_layers: int, target_depth: float, std: float, mass: float = 0.98) -> torch.Tensor:
    """
    The target of the distributional prior: a Gaussian density over the layer indices 0 to `num_layers` - 1, centred at
    `target_depth`, scaled so that its first `target_depth` entries sum to `mass`. Float32 `(num_layers,)`.
    """
    density = torch.exp(-0.5 * ((torch.arange(num_layers, dtype=torch.float64) - target_depth) / std) ** 2)
    before = density[: max(int(target_depth), 1)].sum()
    return (density * (mass / before)).float()


def prior_loss(mean_scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    Divergence of the layers' share of halting from `target`: Σ target · (log target - log share) / layers.

    Args:
        mean_scores (`torch.Tensor` of shape `(layers,)`): halting scores, averaged over tokens and images.
        target (`torch.Tensor` of shape `(layers,)`): from `depth_prior`.
    """
    # Scores may all underflow to 0: then every share is 0, not NaN, and nothing is learnt from the prior yet.
    share = (mean_scores / mean_scores.sum().clamp(min=1e-20)).clamp(0.01, 0.99)
    return torch.nn.functional.kl_div(share.log(), target, reduction="sum") / len(target)


def halting_losses(halting_scores: torch.Tensor, ponder: torch.Tensor, config) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The ponder loss (the mean of ρ over all tokens) and the loss of the distributional prior: unweighted
    float32 scalars.

    Args:
        halting_scores (`torch.Tensor` of shape `(layers, batch_size, tokens)`): of every layer's output.
        ponder (`torch.Tensor` of shape `(batch_size, tokens)`): ρ of each token.
        config (`AViTConfig`): `target_depth` and `prior_std`.
    """
    target = depth_prior(len(halting_scores), config.target_depth, config.prior_std).to(halting_scores.device)
    return ponder.mean(), prior_loss(halting_scores.mean(dim=(1, 2)), target)


def add_loss(model: PreTrainedModel, outputs: ModelOutput, labels: torch.Tensor, **kwargs) -> None:
    """
    Set `task_loss` and `loss` of a classifier's outputs: in training mode `loss` has the ponder and prior losses in it.

    With `num_items_in_batch` the labels are of a part of a batch. The ponder loss is a mean over images, so that the
    parts' losses, each times its share of the batch, sum to the whole batch's (where some labels are -100, as far as
    these are spread evenly: the share counts labels, the mean all images). The prior is not linear in the images:
    it compares scores that are averaged over the images at hand. Its share makes a part count as much as its images do,
    but the sum is that of the parts' priors, not the prior of the whole batch (as under `DistributedDataParallel`).
    `ponder_loss` and `prior_loss` are scaled as well, so that they remain parts of `loss`.

    Args:
        model (`AViTForImageClassification`): whose outputs they are.
        outputs (`AViTImageClassifierOutput`): with logits, and the halting losses where they were computed.
        labels (`torch.Tensor`): checked.
        kwargs: of the model's `forward`.
    """
    config, heads = model.config, [outputs.logits]
    if model.training and config.use_distillation_token:  # without a teacher, both heads learn from the labels
        heads = [outputs.cls_logits, outputs.distillation_logits]
    arguments = loss_arguments(model, kwargs)
    losses = [model.loss_function(labels, logits, config, **arguments) for logits in heads]
    outputs.task_loss = outputs.loss = sum(losses) / len(losses)
    if outputs.ponder_loss is None:
        return
    share = share_of_batch(labels.to(outputs.logits.device), kwargs.get("num_items_in_batch"))
    outputs.ponder_loss, outputs.prior_loss = outputs.ponder_loss * share, outputs.prior_loss * share
    if model.training:
        ponder = config.ponder_loss_weight * outputs.ponder_loss
        outputs.loss = outputs.task_loss + ponder + config.prior_loss_weight * outputs.prior_loss
