"""DynaBERT's distillation: sub-networks of an elastic ViT learn answers and hidden states of a trained one."""

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig

from ..evaluation.labels import check_single_label
from .answer_losses import TrainingBatch
from .distillation import Teacher


if TYPE_CHECKING:
    from .config import TrainingConfig


def soft_cross_entropy(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """
    Cross-entropy of `logits` with the teacher's distribution, both `(batch_size, num_labels)` and softened by
    `temperature`, times `temperature`²: a float32 scalar.
    """
    target = (teacher_logits.float() / temperature).softmax(dim=-1)
    return F.cross_entropy(logits.float() / temperature, target) * temperature**2


def hidden_states_distance(states: Sequence[torch.Tensor], teacher_states: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum over the pairs of their mean squared difference, a float32 scalar. All are `(batch, tokens, width)`."""
    pairs = zip(states, teacher_states, strict=True)
    return sum(F.mse_loss(state.float(), target.float()) for state, target in pairs)


class SubNetworkDistillation:
    """
    The loss of each sub-network without labels (DynaBERT, arXiv 2004.04037, section 2): `distillation_weight` times the
    soft cross-entropy with the teacher's answer, plus `hidden_states_weight` times the summed squared differences from
    its hidden states, which are the embeddings and the output of each layer that the sub-network runs. A layer is
    compared with the teacher's layer of the same number, since their weights began as the same.

    The teacher is an elastic ViT of the same size, of which `teacher_sub_network` says what a sub-network learns from:
    `"whole"`, the whole model, is the first phase, in which widths are trained; `"same_width"`, the sub-network as wide
    with all layers, is the second, in which widths and depths are.

    Raises:
        ValueError: without such a teacher, or if it lacks a sub-network to learn from.
    """

    def __init__(self, config: "TrainingConfig", model_config: PreTrainedConfig, teacher: Teacher | None):
        check_single_label(model_config)
        if teacher is None:
            raise ValueError('`distillation` "hidden_states" needs a `teacher`: an elastic ViT of the same size.')
        source = teacher.model.config
        for name in ("model_type", "num_hidden_layers", "hidden_size", "patch_grid"):
            theirs, ours = getattr(source, name, None), getattr(model_config, name)
            if theirs != ours:
                raise ValueError(
                    '`distillation` "hidden_states" compares the layers of models of one size, but the teacher\'s '
                    f"`{name}` is {theirs}, and the model's {ours}."
                )
        self.teacher, self.temperature = teacher, config.distillation_temperature
        self.answer_weight, self.states_weight = config.distillation_weight, config.hidden_states_weight
        num_layers, networks = model_config.num_hidden_layers, model_config.networks
        for index, network in enumerate(networks):
            if network.hidden_size != model_config.hidden_size:
                raise ValueError(
                    '`distillation` "hidden_states" compares hidden states of the full width, but `sub_networks'
                    f"[{index}]` has {network.hidden_size} channels of {model_config.hidden_size}."
                )
        self.layers = [tuple(network.layer_numbers(num_layers)) for network in networks]
        if config.teacher_sub_network == "whole":
            self.sources = [source.whole_sub_network] * len(networks)
        else:
            name = "teacher's of the same width as `sub_networks[{}]`"
            self.sources = [source.find_sub_network(each, name.format(index)) for index, each in enumerate(networks)]

    def __call__(self, drawn: Sequence[int], batch: TrainingBatch) -> list[torch.Tensor]:
        """The losses, scalars, of the sub-networks `drawn`, of which `batch.outputs` has answers and hidden states."""
        needed = sorted({self.sources[index] for index in drawn})
        targets = dict(zip(needed, self.teacher.answer_and_hidden_states(batch.pixel_values, needed)))
        embeddings, *states = batch.outputs.hidden_states  # all have the full width: the embeddings are the same
        losses, states = [], iter(states)
        for index, logits in zip(drawn, batch.outputs.sub_network_logits, strict=True):
            answer, teacher_states = targets[self.sources[index]]
            own = [embeddings, *islice(states, len(self.layers[index]))]
            matched = [teacher_states[0], *(teacher_states[layer + 1] for layer in self.layers[index])]
            loss = self.answer_weight * soft_cross_entropy(logits, answer, self.temperature)
            losses.append(loss + self.states_weight * hidden_states_distance(own, matched))
        return losses


__all__ = ["SubNetworkDistillation", "hidden_states_distance", "soft_cross_entropy"]
