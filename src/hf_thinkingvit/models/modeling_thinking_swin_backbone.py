"""ThinkingSwin as a backbone for other models' heads: the pyramid of one round."""

import torch
from torch import nn

from .configuration_thinking_swin import ThinkingSwinConfig
from .modeling_thinking_swin import ThinkingSwinModel, ThinkingSwinPreTrainedModel
from .module_recording import record
from .nested_swin import NestedSwinAttention
from .staged_backbone import StagedBackboneMixin


class ThinkingSwinBackbone(StagedBackboneMixin, ThinkingSwinPreTrainedModel):
    """
    ThinkingSwin as an `AutoBackbone`. The feature map of a layer is its output in round `config.out_stage` (by default
    the last), before the next layer merges patches. Earlier rounds run too, and their tokens are recycled.

    The map of the last layer goes through the model's own final LayerNorm: it is what a classifier of this round reads.
    Each other one has a LayerNorm of its own (`hidden_states_norms`), which is freshly initialised and has to be
    trained with the head, as in Transformers' `SwinBackbone`.

    Several rounds need images whose patches fill whole positions of the last layer: sides that are multiples of 32
    pixels in the published model.

    Example:

    ```python
    >>> from transformers import UperNetConfig, UperNetForSemanticSegmentation

    >>> backbone = ThinkingSwinConfig.from_pretrained(
    ...     "org/thinking-swin-s", out_features=["stage1", "stage2", "stage3", "stage4"]
    ... )
    >>> model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, num_labels=150))
    ```"""

    _can_record_outputs = {"attentions": record(NestedSwinAttention, 1)}

    def __init__(self, config: ThinkingSwinConfig):
        super().__init__(config)
        self.thinking_swin = ThinkingSwinModel(config)
        widths = [layer.hidden_size for layer in self.thinking_swin.stages[config.feature_stage].layers]
        self.num_features = [widths[0], *widths]
        self.hidden_states_norms = nn.ModuleDict(
            {
                name: nn.LayerNorm(channels, eps=config.layer_norm_eps)
                for name, channels in zip(self.out_features, self.channels)
                if name != self.stage_names[-1]
            }
        )
        self.post_init()

    def feature_map(self, name: str, hidden_state: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        norm = self.thinking_swin.layernorm if name == self.stage_names[-1] else self.hidden_states_norms[name]
        return norm(hidden_state).permute(0, 3, 1, 2).contiguous()


__all__ = ["ThinkingSwinBackbone"]
