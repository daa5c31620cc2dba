"""
The decoders of Segmenter (arXiv 2105.05633), one for all stages: a stage's patch tokens to a class for each patch.

Only a decoder's first layer depends on the width of the stage. It is a `NestedLinear`, of which narrower stages use the
leading columns.
"""

import torch
from torch import nn

from .configuration_thinkingvit import ThinkingViTConfig
from .nested_layers import NestedLinear, ResidualDropout
from .nested_projection import project
from .nested_vit import NestedViTLayer, run_layers


class SegmenterLinearDecoder(nn.Module):
    """A linear classifier of patches."""

    def __init__(self, config: ThinkingViTConfig):
        super().__init__()
        self.head = NestedLinear(config.hidden_size, config.num_labels)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`patches` (images, patches, width of the stage) → logits (images, patches, num_labels)."""
        return project(self.head, patches)


class SegmenterMaskTransformer(nn.Module):
    """
    Transformer layers over patches and one embedding per class. A patch's logit for a class is the cosine of their
    projections, normalised over the classes.
    """

    def __init__(self, config: ThinkingViTConfig):
        super().__init__()
        self.sizes = sizes = config.decoder_sizes
        self.projection = NestedLinear(config.hidden_size, sizes.hidden_size)
        self.class_embeddings = nn.Parameter(torch.zeros(1, config.num_labels, sizes.hidden_size))
        self.layers = nn.ModuleList(
            [NestedViTLayer(config, sizes=sizes) for _ in range(config.decoder_num_hidden_layers)]
        )
        for layer in self.layers:  # the backbone's rates are not the decoder's
            layer.dropout = ResidualDropout(config.decoder_dropout_prob)
            layer.attention.attention_dropout = config.decoder_dropout_prob
        self.layernorm = nn.LayerNorm(sizes.hidden_size, eps=config.layer_norm_eps)
        self.patch_projection = nn.Linear(sizes.hidden_size, sizes.hidden_size, bias=False)
        self.class_projection = nn.Linear(sizes.hidden_size, sizes.hidden_size, bias=False)
        self.mask_norm = nn.LayerNorm(config.num_labels, eps=config.layer_norm_eps)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`patches` (images, patches, width of the stage) → logits (images, patches, num_labels)."""
        num_patches = patches.shape[1]
        hidden_states = project(self.projection, patches)
        class_embeddings = self.class_embeddings.expand(len(patches), -1, -1).to(hidden_states.dtype)
        hidden_states = torch.cat([hidden_states, class_embeddings], dim=1)
        hidden_states, _ = run_layers(self.layers, hidden_states, self.sizes)
        hidden_states = self.layernorm(hidden_states)
        patches = self.patch_projection(hidden_states[:, :num_patches])
        classes = self.class_projection(hidden_states[:, num_patches:])
        patches = patches / patches.norm(dim=-1, keepdim=True)
        classes = classes / classes.norm(dim=-1, keepdim=True)
        return self.mask_norm(patches @ classes.transpose(1, 2))


DECODERS = {"linear": SegmenterLinearDecoder, "mask_transformer": SegmenterMaskTransformer}


def build_decoder(config: ThinkingViTConfig) -> nn.Module:
    """
    The decoder that `config.decoder_type` names.

    Raises:
        ValueError: if the configuration has none.
    """
    if config.decoder_type not in DECODERS:
        raise ValueError(
            f"A segmentation model needs `decoder_type`, one of {sorted(DECODERS)}, got {config.decoder_type!r}. To "
            "start from a classifier, use `ThinkingViTForSemanticSegmentation.from_thinkingvit`."
        )
    return DECODERS[config.decoder_type](config)


__all__ = ["DECODERS", "SegmenterLinearDecoder", "SegmenterMaskTransformer", "build_decoder"]
