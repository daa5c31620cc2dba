"""ThinkingViT as a backbone for other models' heads: feature maps of the layers of one stage."""

import torch

from .configuration_thinkingvit import ThinkingViTConfig
from .modeling_thinkingvit import ThinkingViTModel, ThinkingViTPreTrainedModel
from .nested_vit import NestedViTAttention
from .staged_backbone import StagedBackboneMixin


class ThinkingViTBackbone(StagedBackboneMixin, ThinkingViTPreTrainedModel):
    """
    ThinkingViT as an `AutoBackbone`. The feature map of a layer are the patch tokens of stage `config.out_stage` (by
    default the last) after that layer, after the final LayerNorm: those of the last layer are what a classifier or
    decoder of this stage reads. Earlier stages run too, and their tokens are recycled.

    Example:

    ```python
    >>> from transformers import UperNetConfig, UperNetForSemanticSegmentation

    >>> backbone = ThinkingViTConfig.from_pretrained("org/thinkingvit-3-6", out_indices=[3, 6, 9, 12])
    >>> model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, num_labels=150))
    ```"""

    reads_all_tokens = True
    _can_record_outputs = {"attentions": NestedViTAttention}

    def __init__(self, config: ThinkingViTConfig):
        super().__init__(config)
        self.thinkingvit = ThinkingViTModel(config)
        width = self.thinkingvit.stages[config.feature_stage].hidden_size
        self.num_features = [width] * len(self.stage_names)
        self.post_init()

    def check_image_size(self, image_size: tuple[int, int]) -> None:
        patch_size = self.thinkingvit.embeddings.patch_size
        if any(side % patch for side, patch in zip(image_size, patch_size)):
            raise ValueError(
                f"`pixel_values` of {image_size[0]}×{image_size[1]} pixels are not made of whole patches {patch_size}: "
                "heads resize feature maps to the size of the images, and would shift what they show. Resize or pad "
                "the images."
            )

    def feature_map(self, name: str, hidden_state: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        grid = [side // patch for side, patch in zip(image_size, self.thinkingvit.embeddings.patch_size)]
        patches = self.thinkingvit.layernorm(hidden_state)[:, self.config.num_prefix_tokens :]
        return patches.transpose(1, 2).unflatten(2, grid).contiguous()


__all__ = ["ThinkingViTBackbone"]
