"""
What may happen to tokens between the layers of a plain ViT: nothing, halting (A-ViT), pruning.

A policy is an object for one run of the layers and holds that run's tensors, so a model that runs on several threads or
is copied shares none. `nested_vit.run_layers` calls it around each layer; without a policy it calls nothing.
"""

from typing import Any

import torch


class TokenPolicy:
    """
    The interface of `run_layers`. This one leaves all tokens as they are.

    Attributes:
        is_done (`bool`): whether no further layer needs to run. Read before each layer.
    """

    is_done: bool = False

    def before_layer(
        self, layer: int, hidden_states: torch.Tensor, is_last: bool
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """
        Args:
            layer (`int`): number of the layer, from 0.
            is_last (`bool`): whether it is the last layer that runs.
            hidden_states (`torch.Tensor` of shape `(batch, tokens, width)`): the tokens so far.

        Returns:
            The layer's input, with fewer tokens where some are removed, and further arguments of its `forward`:
            `active` and `attention_mask`, `query_lengths` and `key_lengths` of packed tokens, `queries` or `kept_keys`.
        """
        return hidden_states, {}

    def after_layer(self, layer: int, output: Any, is_last: bool) -> torch.Tensor:
        """The tokens for the next layer, from the output of this one (a tuple if it was called with `queries`)."""
        return output


LAYER_PREFIX = "layer_outputs."


class LayerOutputs(TokenPolicy):
    """Keeps the output of every layer, for the state that the stage leaves."""

    def __init__(self):
        self.outputs: list[torch.Tensor] = []

    def after_layer(self, layer: int, output: torch.Tensor, is_last: bool) -> torch.Tensor:
        self.outputs.append(output)
        return output

    def entries(self) -> dict[str, torch.Tensor]:
        """`layer_outputs.0` and so on, one for each layer that ran."""
        return layer_entries(self.outputs)


def layer_entries(outputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{LAYER_PREFIX}{index}": output for index, output in enumerate(outputs)}


def layer_outputs(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of the layers in a state, in order."""
    return [state[f"{LAYER_PREFIX}{index}"] for index in range(sum(name.startswith(LAYER_PREFIX) for name in state))]


__all__ = ["LayerOutputs", "TokenPolicy", "layer_entries", "layer_outputs"]
