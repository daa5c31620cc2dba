"""Heads and MLP channels of a ViT in the order of their importance, so that leading ones make the best sub-networks."""

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from .nested_vit import NestedViTLayer


def sort_by_importance(model: PreTrainedModel, pixel_values: torch.Tensor, labels: torch.Tensor) -> None:
    """
    Sort the heads and MLP channels of every layer by importance, greatest first: by |gradient × parameter|, summed over
    what the head, or the channel, adds to its output (DynaBERT, arXiv 2004.04037, section 2.1). Leaves the outputs of
    the whole model as they were, up to rounding, and its gradients and mode.

    Args:
        model (`ElasticViTForImageClassification`): the model, changed in place; all of its layers run.
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): images like those to come.
        labels (`torch.LongTensor` of shape `(batch_size,)`): their class indices.

    Raises:
        ValueError: for images without as many labels, or if no sub-network is the whole model.
    """
    if pixel_values is None or labels is None or len(pixel_values) != len(labels) or not len(labels):
        raise ValueError("Importance is measured on images and their labels: give as many labels as images.")
    layers: list[NestedViTLayer] = list(model.base_model.layers)
    outputs = [weight for layer in layers for weight in (layer.attention.o_proj.weight, layer.mlp.fc2.weight)]
    required = [weight.requires_grad for weight in outputs]
    was_training = model.training
    model.eval()
    try:
        for weight in outputs:
            weight.requires_grad_(True)
        with torch.enable_grad():
            logits = model(pixel_values.to(model.device), sub_network=model.config.whole_sub_network).logits
            loss = F.cross_entropy(logits.float(), labels.to(logits.device))
            gradients = torch.autograd.grad(loss, outputs)
    finally:
        model.train(was_training)
        for weight, requires_grad in zip(outputs, required):
            weight.requires_grad_(requires_grad)
    with torch.no_grad():
        shares = [(weight * gradient).sum(dim=0).float() for weight, gradient in zip(outputs, gradients)]
        for layer, of_attention, of_mlp in zip(layers, shares[::2], shares[1::2]):
            head_dim = layer.attention.head_dim
            heads = of_attention.unflatten(0, (-1, head_dim)).sum(dim=1).abs().argsort(descending=True, stable=True)
            channels = torch.arange(len(of_attention), device=heads.device).unflatten(0, (-1, head_dim))[heads]
            attention = layer.attention
            _reorder(attention.o_proj, channels.flatten(), attention.q_proj, attention.k_proj, attention.v_proj)
            _reorder(layer.mlp.fc2, of_mlp.abs().argsort(descending=True, stable=True), layer.mlp.fc1)


def _reorder(output: torch.nn.Linear, order: torch.Tensor, *inputs: torch.nn.Linear) -> None:
    output.weight.copy_(output.weight[:, order])
    for layer in inputs:
        layer.weight.copy_(layer.weight[order])
        if layer.bias is not None:
            layer.bias.copy_(layer.bias[order])


__all__ = ["sort_by_importance"]
