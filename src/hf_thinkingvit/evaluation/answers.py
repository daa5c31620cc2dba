"""All answers of a model in one call: those of its stages, of its sub-networks, or the one that it has."""

from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..models.configuration_staged import thinks_in_stages


def arguments_for_all(model: nn.Module, every_sub_network: bool = True) -> dict[str, Any]:
    """Arguments with which a classifier in evaluation mode gives the answers of all stages, or of all sub-networks."""
    if thinks_in_stages(model):
        return {"output_stage_logits": True}
    networks = getattr(model.config, "sub_networks", None) if every_sub_network else None
    return {"sub_network": list(range(len(networks)))} if networks else {}


def all_logits(outputs: ModelOutput) -> tuple[torch.Tensor, ...]:
    """The logits `(batch, num_labels)` of each answer in what such a call returned."""
    return outputs.get("stage_logits") or outputs.get("sub_network_logits") or (outputs.logits,)


__all__ = ["all_logits", "arguments_for_all"]
