"""
The transformer block and embeddings of every plain-ViT family here, on their leading channels and heads.

A `SubNetwork` gives their numbers. At full width this is Transformers' ViT (with a distillation token: DeiT), name by
name. In the order in which pixels flow: embeddings, attention, layer, and `run_layers`, which runs the layers of a
sub-network.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import eager_attention_forward

from .configuration_checks import as_pair
from .configuration_nested_vit import NestedViTConfig
from .module_quantization import QuantizablePreTrainedModel
from .nested_layers import (
    NestedConv2d,
    NestedLayerNorm,
    NestedLinear,
    NestedMLP,
    ResidualDropout,
    add_residual,
    owns_output,
)
from .nested_projection import project, project_patches
from .sub_networks import SubNetwork
from .token_policies import TokenPolicy
from .weights_from_official import OfficialSourcesMixin


def check_pixel_values(pixel_values: torch.Tensor | None, num_channels: int) -> None:
    """`ValueError` unless `pixel_values` is a batch of images with `num_channels` channels."""
    if pixel_values is None or pixel_values.dim() != 4 or pixel_values.shape[1] != num_channels:
        got = None if pixel_values is None else tuple(pixel_values.shape)
        raise ValueError(
            f"`pixel_values` must have the shape (batch_size, {num_channels}, height, width), with {num_channels} "
            f"channels as in `config.num_channels`, got {got}."
        )


def interpolate_positions(
    position_embeddings: torch.Tensor,
    num_prefix_tokens: int,
    patch_grid: tuple[int, int],
    new_patch_grid: tuple[int, int],
    mode: str,
) -> torch.Tensor:
    """`position_embeddings` (1, tokens, channels) of one grid of (rows, columns) patches, resized to another."""
    if new_patch_grid == patch_grid:
        return position_embeddings
    prefix, patches = position_embeddings[:, :num_prefix_tokens], position_embeddings[:, num_prefix_tokens:]
    patches = patches.unflatten(1, patch_grid).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(patches, size=new_patch_grid, mode=mode, align_corners=False)
    return torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)


class NestedViTEmbeddings(nn.Module):
    """
    Patches, class token (and distillation token) and position embeddings. Each channel is computed once: those of the
    first stage for every image, further ones when a wider stage runs, for the images that it runs.
    """

    def __init__(self, config: NestedViTConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.image_size = as_pair(config.image_size)
        self.patch_size = as_pair(config.patch_size)
        self.patch_grid = config.patch_grid
        self.num_prefix_tokens = config.num_prefix_tokens
        self.position_interpolation = config.position_interpolation
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        if config.num_prefix_tokens == 2:
            self.distillation_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embeddings = NestedConv2d(
            config.num_channels, config.hidden_size, kernel_size=self.patch_size, stride=self.patch_size
        )
        num_tokens = self.num_prefix_tokens + self.patch_grid[0] * self.patch_grid[1]
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_tokens, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def interpolate_pos_encoding(self, position_embeddings: torch.Tensor, patch_grid: tuple[int, int]) -> torch.Tensor:
        """`position_embeddings` (1, tokens, channels) for a grid of (rows, columns) patches."""
        num_prefix_tokens, mode = self.num_prefix_tokens, self.position_interpolation
        return interpolate_positions(position_embeddings, num_prefix_tokens, self.patch_grid, patch_grid, mode)

    def forward(self, pixel_values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """`pixel_values` (batch_size, num_channels, height, width) → channels (batch_size, tokens, stop - start)."""
        tokens = [self.cls_token, self.distillation_token] if self.num_prefix_tokens == 2 else [self.cls_token]
        tokens = [token[..., start:stop].expand(pixel_values.shape[0], -1, -1) for token in tokens]
        tokens.append(project_patches(self.patch_embeddings, pixel_values.to(self.cls_token.dtype), start, stop))
        patch_grid = (pixel_values.shape[2] // self.patch_size[0], pixel_values.shape[3] // self.patch_size[1])
        position_embeddings = self.interpolate_pos_encoding(self.position_embeddings[..., start:stop], patch_grid)
        return self.dropout(torch.cat(tokens, dim=1) + position_embeddings)

    def count_patches(self, pixel_values: torch.Tensor) -> int:
        """Patches of each image of `pixel_values` (batch_size, num_channels, height, width)."""
        return (pixel_values.shape[2] // self.patch_size[0]) * (pixel_values.shape[3] // self.patch_size[1])

    def check(self, pixel_values: torch.Tensor | None, interpolate_pos_encoding: bool | None) -> None:
        """`ValueError` for images that do not fit: channels, or a size that is not to be interpolated to."""
        check_pixel_values(pixel_values, self.num_channels)
        (height, width), got = self.image_size, tuple(pixel_values.shape[-2:])
        if not interpolate_pos_encoding and got != self.image_size:
            raise ValueError(
                f"`pixel_values` must be images of {height}×{width} pixels (`config.image_size`), got "
                f"{got[0]}×{got[1]}. Resize them with the image processor, or pass `interpolate_pos_encoding=True`."
            )
        if got[0] < self.patch_size[0] or got[1] < self.patch_size[1]:
            raise ValueError(f"`pixel_values` of {got[0]}×{got[1]} pixels are smaller than a patch {self.patch_size}.")


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Attention by the backend that the configuration of `module` names: (batch, heads, tokens, head_dim) → (batch,
    tokens, heads, head_dim), and the attention probabilities where the backend returns them.
    """
    attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager_attention_forward
    )
    if query.shape[0] == 0:  # not every backend can shape an empty batch
        attention_interface = eager_attention_forward
    dropout = module.attention_dropout if module.training else 0.0
    return attention_interface(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


@owns_output
class NestedViTAttention(nn.Module):
    """Multi-head self-attention with the leading heads of a sub-network."""

    def __init__(self, config: NestedViTConfig, sizes: SubNetwork):
        super().__init__()
        self.config = config
        self.head_dim = sizes.head_dim
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        # Three matrices instead of a fused one: a leading slice of a fused matrix has no keys or values in it.
        self.q_proj = NestedLinear(sizes.hidden_size, sizes.attention_size, bias=config.qkv_bias)
        self.k_proj = NestedLinear(sizes.hidden_size, sizes.attention_size, bias=config.qkv_bias)
        self.v_proj = NestedLinear(sizes.hidden_size, sizes.attention_size, bias=config.qkv_bias)
        self.o_proj = NestedLinear(sizes.attention_size, sizes.hidden_size)

    def _project(self, projection: nn.Module, hidden_states: torch.Tensor, sub_network: SubNetwork) -> torch.Tensor:
        """(batch, tokens, width) → (batch, heads, tokens, head_dim)."""
        projected = project(projection, hidden_states, sub_network.attention_size)
        return projected.unflatten(-1, (sub_network.num_attention_heads, sub_network.head_dim)).transpose(1, 2)

    def project_key_value(
        self, hidden_states: torch.Tensor, sub_network: SubNetwork
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`hidden_states` (batch, tokens, width), normalised → key and value (batch, heads, tokens, head_dim)."""
        key = self._project(self.k_proj, hidden_states, sub_network)
        return key, self._project(self.v_proj, hidden_states, sub_network)

    def forward(
        self,
        hidden_states: torch.Tensor,
        sub_network: SubNetwork,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        query_lengths: tuple[int, ...] | None = None,
        key_lengths: tuple[int, ...] | None = None,
        kept_keys: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        `hidden_states` (batch, queries, width), normalised; key and value of all tokens; additive mask. With lengths,
        the batch is one row in which images lie packed one after another (`packed_attention`); with `kept_keys`
        (batch, tokens), tokens are left out as in the training of token pruning (`attention_to_kept`).
        """
        width = hidden_states.shape[-1]
        scaling = self.scaling if sub_network.head_dim == self.head_dim else sub_network.head_dim**-0.5
        query = self._project(self.q_proj, hidden_states, sub_network)
        if query_lengths is not None:
            from .token_packing import packed_attention  # only policies that remove tokens need it

            attn_output = packed_attention(query, key, value, query_lengths, key_lengths, scaling)
            return project(self.o_proj, attn_output.flatten(2), width), None
        if kept_keys is not None:
            from .token_pruning_training import attention_to_kept

            dropout = self.attention_dropout if self.training else 0.0
            attn_output, attn_weights = attention_to_kept(query, key, value, kept_keys, scaling, dropout)
            return project(self.o_proj, attn_output.flatten(2), width), attn_weights
        attn_output, attn_weights = attend(self, query, key, value, attention_mask, scaling, **kwargs)
        attn_output = attn_output.reshape(*hidden_states.shape[:2], sub_network.attention_size).contiguous()
        return project(self.o_proj, attn_output, width), attn_weights


def _zero_inactive(hidden_states: torch.Tensor, active: torch.Tensor | None) -> torch.Tensor:
    return hidden_states if active is None else torch.where(active[..., None], hidden_states, 0.0)


class NestedViTLayer(GradientCheckpointingLayer):
    """
    A pre-norm transformer block, on the leading channels and heads of a sub-network. Its own sizes, of which those are
    the leading ones, are the backbone's unless `sizes` says otherwise (a decoder's).
    """

    def __init__(self, config: NestedViTConfig, drop_path_rate: float = 0.0, sizes: SubNetwork | None = None):
        super().__init__()
        if sizes is None:
            sizes = SubNetwork(config.num_attention_heads, config.hidden_size, config.intermediate_size)
        self.attention = NestedViTAttention(config, sizes)
        self.layernorm_before = NestedLayerNorm(sizes.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = NestedLayerNorm(sizes.hidden_size, eps=config.layer_norm_eps)
        self.mlp = NestedMLP(sizes.hidden_size, sizes.intermediate_size, config.hidden_act)
        self.dropout = ResidualDropout(config.hidden_dropout_prob, drop_path_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        sub_network: SubNetwork,
        kept_keys: torch.Tensor | None = None,
        queries: slice | torch.Tensor | None = None,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        active: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The whole layer, or, where not every token is needed at once, the layer in two calls: first with `queries`, then
        with the other tokens and the `key` and `value` that the first call returned.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, sub_network.hidden_size)`): the tokens.
            sub_network (`SubNetwork`): the sizes, with one `intermediate_size`.
            kept_keys (`torch.Tensor` of shape `(batch, tokens)`, *optional*):
                Which tokens the attention does not leave out, see [`NestedViTAttention`]. Differentiable, so it must be
                a positional argument: re-entrant gradient checkpointing gives no gradient to others.
            queries (`slice` or `torch.LongTensor`, *optional*):
                Compute only these of the tokens; the others are their keys and values.
            key, value (`torch.Tensor` of shape `(batch, heads, all tokens, head_dim)`, *optional*):
                Keys and values of all tokens, where `hidden_states` are only some.
            active (`torch.BoolTensor` of shape `(batch, tokens)`, *optional*):
                Inactive tokens are set to zero on entry and again after each norm, as the official A-ViT computes
                halted tokens. The caller must also mask them as keys.

        Returns:
            The computed tokens `(batch, tokens or queries, sub_network.hidden_size)`; with `queries`, a tuple of them,
            the keys and the values.
        """
        hidden_states = _zero_inactive(hidden_states, active)
        normed = _zero_inactive(self.layernorm_before(hidden_states), active)
        if key is None:
            key, value = self.attention.project_key_value(normed, sub_network)
        if queries is not None:
            hidden_states, normed = hidden_states[:, queries], normed[:, queries]
        attention, mlp, dropout = self.attention, self.mlp, self.dropout
        attn_output, _ = attention(normed, sub_network, key, value, kept_keys=kept_keys, **kwargs)
        hidden_states = add_residual(hidden_states, dropout(attn_output), attention.o_proj, attention, dropout)
        normed = _zero_inactive(self.layernorm_after(hidden_states), active)
        mlp_output = mlp(normed, sub_network.intermediate_size)
        hidden_states = add_residual(hidden_states, dropout(mlp_output), mlp.fc2, mlp, dropout)
        return hidden_states if queries is None else (hidden_states, key, value)


def build_layers(config: NestedViTConfig) -> nn.ModuleList:
    """The layers, with stochastic depth that rises linearly to `config.drop_path_rate`."""
    rates = torch.linspace(0, config.drop_path_rate, config.num_hidden_layers, device="cpu").tolist()
    return nn.ModuleList([NestedViTLayer(config, rate) for rate in rates])


def run_layers(
    layers: nn.ModuleList,
    hidden_states: torch.Tensor,
    sub_network: SubNetwork,
    policy: TokenPolicy | None = None,
    num_queries: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    Run the layers of a sub-network.

    Args:
        layers (`nn.ModuleList`): all layers of the model.
        hidden_states (`torch.Tensor` of shape `(batch, tokens, sub_network.hidden_size)`): the first layer's input.
        sub_network (`SubNetwork`): which layers run, and their sizes.
        policy (`TokenPolicy`, *optional*): what happens to the tokens between layers; nothing by default.
        num_queries (`int`, *optional*): compute only so many leading tokens of the last layer; all by default.
        kwargs: for the layers.

    Returns:
        The output of the last layer; and what `finish_layers` needs for the other tokens of the last layer, which is
        empty where all of them were computed.
    """
    numbers, pending = sub_network.layer_numbers(len(layers)), {}
    for number in numbers:
        layer, sizes, arguments = layers[number], sub_network.at_layer(number), {}
        is_last = number == numbers[-1]
        if policy is not None:
            if policy.is_done:
                break
            hidden_states, arguments = policy.before_layer(number, hidden_states, is_last)
        kept_keys = arguments.pop("kept_keys", None)
        if num_queries is None or not is_last:
            hidden_states = layer(hidden_states, sizes, kept_keys, **arguments, **kwargs)
        else:
            others = hidden_states[:, num_queries:]
            arguments["queries"] = slice(num_queries)
            hidden_states, key, value = layer(hidden_states, sizes, kept_keys, **arguments, **kwargs)
            pending = {"hidden_states": others, "key": key, "value": value}
        if policy is not None:
            hidden_states = policy.after_layer(number, hidden_states, is_last)
    return hidden_states, pending


def finish_layers(
    layers: nn.ModuleList, pending: dict[str, torch.Tensor], sub_network: SubNetwork, **kwargs
) -> torch.Tensor:
    """The tokens of the last layer that `run_layers` left out: `(batch, tokens - num_queries, width)`."""
    number = sub_network.layer_numbers(len(layers))[-1]
    hidden_states, key, value = pending["hidden_states"], pending["key"], pending["value"]
    return layers[number](hidden_states, sub_network.at_layer(number), None, None, key, value, **kwargs)


class NestedViTPreTrainedModel(OfficialSourcesMixin, QuantizablePreTrainedModel):
    """What Transformers needs to know of a model made of these blocks."""

    config: NestedViTConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["NestedViTEmbeddings", "NestedViTLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": NestedViTLayer, "attentions": NestedViTAttention}
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NestedViTEmbeddings):
            for name in ("cls_token", "distillation_token", "position_embeddings"):
                if hasattr(module, name):
                    init.trunc_normal_(getattr(module, name), mean=0.0, std=self.config.initializer_range)
