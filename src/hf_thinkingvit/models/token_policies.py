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
            `active` and `attention_mask`, `query_lengths` and `key_lengths` of packed tokens, or `queries`.
        """
        return hidden_states, {}

    def after_layer(self, layer: int, output: Any, is_last: bool) -> torch.Tensor:
        """The tokens for the next layer, from the output of this one (a tuple if it was called with `queries`)."""
        return output


__all__ = ["TokenPolicy"]
