"""
PyTorch ThinkingViT model (arXiv 2507.10800).

Reading order is the order in which pixels flow: embeddings, attention, MLP, layer, token recycling, the model that runs
one stage at a time, and the classifier, whose loop over stages is `early_exit.StagedImageClassifierMixin`.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .config_checks import as_pair
from .configuration_thinkingvit import Stage, ThinkingViTConfig
from .early_exit import StagedImageClassifierMixin, State, resolve_max_stages, wants_recordings
from .nested_layers import NestedConv2d, NestedLayerNorm, NestedLinear, ResidualDropout
from .vit_weights import export_stage, import_vit, load_vit, thinkingvit_config_from_vit


class ThinkingViTEmbeddings(nn.Module):
    """
    Patches, class token (and distillation token) and position embeddings. Each channel is computed once: those that the
    first stage reads for every image, the others when a stage needs them, for the images that it runs.
    """

    def __init__(self, config: ThinkingViTConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.image_size = as_pair(config.image_size)
        self.patch_size = as_pair(config.patch_size)
        self.patch_grid = config.patch_grid
        self.num_prefix_tokens = config.num_prefix_tokens
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        if config.use_distillation_token:
            self.distillation_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embeddings = NestedConv2d(
            config.num_channels, config.hidden_size, kernel_size=self.patch_size, stride=self.patch_size
        )
        num_tokens = self.num_prefix_tokens + self.patch_grid[0] * self.patch_grid[1]
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_tokens, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def interpolate_pos_encoding(self, position_embeddings: torch.Tensor, patch_grid: tuple[int, int]) -> torch.Tensor:
        """`position_embeddings` (1, tokens, channels) for a grid of (rows, columns) patches, bicubic."""
        if patch_grid == self.patch_grid:
            return position_embeddings
        prefix = position_embeddings[:, : self.num_prefix_tokens]
        patches = position_embeddings[:, self.num_prefix_tokens :]
        patches = patches.unflatten(1, self.patch_grid).permute(0, 3, 1, 2)
        patches = nn.functional.interpolate(patches, size=patch_grid, mode="bicubic", align_corners=False)
        return torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, pixel_values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """`pixel_values` (batch_size, num_channels, height, width) → channels (batch_size, tokens, stop - start)."""
        tokens = [self.cls_token, self.distillation_token] if self.num_prefix_tokens == 2 else [self.cls_token]
        tokens = [token[..., start:stop].expand(pixel_values.shape[0], -1, -1) for token in tokens]
        tokens.append(self._embed_patches(pixel_values.to(self.cls_token.dtype), start, stop))
        patch_grid = (pixel_values.shape[2] // self.patch_size[0], pixel_values.shape[3] // self.patch_size[1])
        position_embeddings = self.interpolate_pos_encoding(self.position_embeddings[..., start:stop], patch_grid)
        return self.dropout(torch.cat(tokens, dim=1) + position_embeddings)

    def _embed_patches(self, pixel_values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        if start == 0:
            return self.patch_embeddings(pixel_values, stop).flatten(2).transpose(1, 2)
        # Later channels are for the images that go on, maybe few: a product with their patches is the same, and quicker
        # for few images than setting up a convolution.
        rows, columns = (side // patch for side, patch in zip(pixel_values.shape[2:], self.patch_size))
        patches = pixel_values[..., : rows * self.patch_size[0], : columns * self.patch_size[1]]
        patches = patches.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 1, 3, 5)
        weight, bias = self.patch_embeddings.weight, self.patch_embeddings.bias
        return nn.functional.linear(patches.flatten(3).flatten(1, 2), weight[start:stop].flatten(1), bias[start:stop])

    def check(self, pixel_values: torch.Tensor | None, interpolate_pos_encoding: bool | None) -> None:
        """`ValueError` for images that do not fit: channels, or a size that is not to be interpolated to."""
        channels, (height, width) = self.num_channels, self.image_size
        if pixel_values is None or pixel_values.dim() != 4 or pixel_values.shape[1] != channels:
            got = None if pixel_values is None else tuple(pixel_values.shape)
            raise ValueError(
                f"`pixel_values` must have the shape (batch_size, {channels}, height, width), with {channels} channels "
                f"as in `config.num_channels`, got {got}."
            )
        got = tuple(pixel_values.shape[-2:])
        if not interpolate_pos_encoding and got != self.image_size:
            raise ValueError(
                f"`pixel_values` must be images of {height}×{width} pixels (`config.image_size`), got "
                f"{got[0]}×{got[1]}. Resize them with the image processor, or pass `interpolate_pos_encoding=True`."
            )
        if got[0] < self.patch_size[0] or got[1] < self.patch_size[1]:
            raise ValueError(f"`pixel_values` of {got[0]}×{got[1]} pixels are smaller than a patch {self.patch_size}.")


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain operations: (batch, heads, tokens, head_dim) → (batch, tokens, heads, head_dim)."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    attn_weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value).transpose(1, 2).contiguous()
    return attn_output, attn_weights


class ThinkingViTAttention(nn.Module):
    """Multi-head self-attention with the leading `stage.num_attention_heads` heads."""

    def __init__(self, config: ThinkingViTConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        # Three matrices rather than one: each is then its own leading slice, which no layout of a fused one gives.
        self.q_proj = NestedLinear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = NestedLinear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = NestedLinear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = NestedLinear(config.hidden_size, config.hidden_size)

    def _split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        batch_size, num_tokens, width = projected.shape
        return projected.view(batch_size, num_tokens, width // self.head_dim, self.head_dim).transpose(1, 2)

    def project_key_value(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`hidden_states` (batch, tokens, width), normalised → key and value (batch, heads, tokens, head_dim)."""
        width = hidden_states.shape[-1]
        key = self._split_heads(self.k_proj(hidden_states, width))
        return key, self._split_heads(self.v_proj(hidden_states, width))

    def forward(
        self, hidden_states: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states` (batch, queries, width), normalised; key and value of all tokens."""
        width = hidden_states.shape[-1]
        query = self._split_heads(self.q_proj(hidden_states, width))
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if hidden_states.shape[0] == 0:  # not every backend can shape an empty batch
            attention_interface = eager_attention_forward
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            None,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = attn_output.reshape(*hidden_states.shape).contiguous()
        return self.o_proj(attn_output, width), attn_weights


class ThinkingViTMLP(nn.Module):
    def __init__(self, config: ThinkingViTConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = NestedLinear(config.hidden_size, config.intermediate_size)
        self.fc2 = NestedLinear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, intermediate_size: int) -> torch.Tensor:
        intermediate = self.activation_fn(self.fc1(hidden_states, intermediate_size))
        return self.fc2(intermediate, hidden_states.shape[-1])


class ThinkingViTLayer(GradientCheckpointingLayer):
    """A pre-norm transformer block, on the leading channels and heads of a stage."""

    def __init__(self, config: ThinkingViTConfig, drop_path_rate: float = 0.0):
        super().__init__()
        self.attention = ThinkingViTAttention(config)
        self.layernorm_before = NestedLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = NestedLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ThinkingViTMLP(config)
        self.dropout = ResidualDropout(config.hidden_dropout_prob, drop_path_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        stage: Stage,
        num_queries: int | None = None,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The whole layer, or, where not every token is needed at once, the layer in two calls: first with `num_queries`,
        then with the other tokens and the `key` and `value` that the first call returned.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, stage.hidden_size)`): the tokens.
            stage (`Stage`): the sub-network.
            num_queries (`int`, *optional*): compute only so many leading tokens; the others are their keys and values.
            key, value (`torch.Tensor` of shape `(batch, heads, all tokens, head_dim)`, *optional*):
                Keys and values of all tokens, where `hidden_states` are only some.

        Returns:
            The computed tokens `(batch, tokens or num_queries, stage.hidden_size)`; with `num_queries`, a tuple of
            them, the keys and the values.
        """
        normed = self.layernorm_before(hidden_states)
        if key is None:
            key, value = self.attention.project_key_value(normed)
        if num_queries is not None:
            hidden_states, normed = hidden_states[:, :num_queries], normed[:, :num_queries]
        attn_output, _ = self.attention(normed, key, value, **kwargs)
        hidden_states = hidden_states + self.dropout(attn_output)
        mlp_output = self.mlp(self.layernorm_after(hidden_states), stage.intermediate_size)
        hidden_states = hidden_states + self.dropout(mlp_output)
        return hidden_states if num_queries is None else (hidden_states, key, value)


class ThinkingViTRecycler(nn.Module):
    """Token Recycling: embeddings + α · Proj(z), with z a stage's normalised tokens. α starts at 0."""

    def __init__(self, config: ThinkingViTConfig, stage: Stage):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1))
        self.projection = NestedLinear(stage.hidden_size, config.hidden_size)

    def forward(self, embeddings: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """`embeddings` (batch, tokens, next stage's width) and a stage's tokens → the next stage's input, alike."""
        return embeddings + self.alpha * self.projection(tokens, embeddings.shape[-1])


def _record(target_class: type[nn.Module]) -> OutputRecorder:
    recorder = OutputRecorder(target_class)
    # Newer versions of Transformers resolve negative indices in `output_hidden_states` by this; older ones ignore it.
    recorder.num_hidden_layers_key = "num_recorded_layers"
    return recorder


class ThinkingViTPreTrainedModel(PreTrainedModel):
    config: ThinkingViTConfig
    base_model_prefix = "thinkingvit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ThinkingViTEmbeddings", "ThinkingViTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": _record(ThinkingViTLayer), "attentions": ThinkingViTAttention}
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ThinkingViTEmbeddings):
            for name in ("cls_token", "distillation_token", "position_embeddings"):
                if hasattr(module, name):
                    init.trunc_normal_(getattr(module, name), mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, ThinkingViTRecycler):
            init.zeros_(module.alpha)


class ThinkingViTModel(ThinkingViTPreTrainedModel):
    """
    The bare ThinkingViT, without a classifier. It cannot tell when an answer is good enough, so `forward` runs every
    stage for every image; the classifier runs it stage by stage with `embed`, `run_stage` and `recycle`.
    """

    def __init__(self, config: ThinkingViTConfig):
        super().__init__(config)
        config.validate()
        rates = torch.linspace(0, config.drop_path_rate, config.num_hidden_layers, device="cpu").tolist()
        self.stages = config.stages
        self.embeddings = ThinkingViTEmbeddings(config)
        self.layers = nn.ModuleList([ThinkingViTLayer(config, rate) for rate in rates])
        self.layernorm = NestedLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.recyclers = nn.ModuleList([ThinkingViTRecycler(config, stage) for stage in self.stages[:-1]])
        self.post_init()

    def embed(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None) -> State:
        """The state with which stage 0 starts. Pixels stay in it while a later stage is wider and will need them."""
        self.embeddings.check(pixel_values, interpolate_pos_encoding)
        hidden_states = self.embeddings(pixel_values, 0, self.stages[0].hidden_size)
        return {"pixel_values": pixel_values, "embeddings": hidden_states, "hidden_states": hidden_states}

    def run_stage(self, stage_index: int, state: State, *, all_tokens: bool, **kwargs) -> tuple[torch.Tensor, State]:
        """
        Run a stage up to its answer. Of the last layer only the class token is computed, unless `all_tokens`; what
        `finish_stage` needs to compute the others stays in the state.

        Returns:
            The class token after the final LayerNorm `(images, width of the stage)`, and the state.
        """
        stage, hidden_states = self.stages[stage_index], state["hidden_states"]
        *layers, last_layer = self.layers
        for layer in layers:
            hidden_states = layer(hidden_states, stage, **kwargs)
        if all_tokens:
            tokens = last_layer(hidden_states, stage, **kwargs)
            unfinished = {}
        else:
            tokens, key, value = last_layer(hidden_states, stage, 1, **kwargs)
            unfinished = {"hidden_states": hidden_states[:, 1:], "key": key, "value": value}
        inputs = {name: state[name] for name in ("pixel_values", "embeddings") if name in state}
        return self.layernorm(tokens[:, 0]), {**inputs, "tokens": tokens, **unfinished}

    def finish_stage(self, stage_index: int, state: State, **kwargs) -> torch.Tensor:
        """All tokens `(images, tokens, width of the stage)` of a stage that has answered, after the final LayerNorm."""
        tokens = state["tokens"]
        if "key" in state:
            stage, last_layer = self.stages[stage_index], self.layers[-1]
            others = last_layer(state["hidden_states"], stage, None, state["key"], state["value"], **kwargs)
            tokens = torch.cat([tokens, others], dim=1)
        return self.layernorm(tokens)

    def recycle(self, stage_index: int, state: State, **kwargs) -> State:
        """The state with which stage `stage_index + 1` starts."""
        tokens = self.finish_stage(stage_index, state, **kwargs)
        embeddings, width = state["embeddings"], self.stages[stage_index + 1].hidden_size
        if width > embeddings.shape[-1]:
            wider = self.embeddings(state["pixel_values"], embeddings.shape[-1], width)
            embeddings = torch.cat([embeddings, wider], dim=-1)
        pixels = {"pixel_values": state["pixel_values"]} if width < self.stages[-1].hidden_size else {}
        return {**pixels, "embeddings": embeddings, "hidden_states": self.recyclers[stage_index](embeddings, tokens)}

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        *,
        max_stages: int | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): images.
            max_stages (`int`, *optional*): run only this many stages; all by default.
            interpolate_pos_encoding (`bool`, *optional*): accept images of another size than `config.image_size`.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutput`]: `last_hidden_state` holds the tokens of the last stage
            that ran, after the final LayerNorm, `(batch_size, tokens, width of that stage)`. `hidden_states` and
            `attentions` hold every layer of every stage, in order, as in `StagedImageClassifierOutput`.

        Raises:
            ValueError: for pixel values or `max_stages` that do not fit the model.
        """
        num_stages = resolve_max_stages(max_stages, self.config.num_stages)
        state = self.embed(pixel_values, interpolate_pos_encoding)
        for index in range(num_stages):
            _, state = self.run_stage(index, state, all_tokens=True, **kwargs)
            if index < num_stages - 1:
                state = self.recycle(index, state, **kwargs)
        return BaseModelOutput(last_hidden_state=self.finish_stage(num_stages - 1, state, **kwargs))


class ThinkingViTForImageClassification(StagedImageClassifierMixin, ThinkingViTPreTrainedModel):
    """
    ThinkingViT with an image classification head on the class token, one head for all stages, and early exit.

    Call it as any Transformers image classifier; see `forward` for the arguments that steer the exits, and
    [`StagedImageClassifierOutput`] for what each output means when images exit at different stages.

    Example:

    ```python
    >>> model = ThinkingViTForImageClassification.from_pretrained("org/thinkingvit-3-6", threshold=0.9)
    >>> outputs = model(**image_processor(images, return_tensors="pt"))
    >>> outputs.logits.argmax(-1), outputs.exit_stage, outputs.entropy
    ```"""

    def __init__(self, config: ThinkingViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.thinkingvit = ThinkingViTModel(config)
        self.classifier = NestedLinear(config.hidden_size, config.num_labels)
        self.post_init()

    def begin(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None, **kwargs) -> State:
        return self.thinkingvit.embed(pixel_values, interpolate_pos_encoding)

    def run_stage(self, stage_index: int, state: State, is_last: bool = False, **kwargs) -> tuple[torch.Tensor, State]:
        # In training every image goes on, so nothing is gained by computing the last layer in two parts. Recorded
        # outputs are of all tokens.
        all_tokens = (self.training and not is_last) or wants_recordings(self.config, kwargs)
        class_token, state = self.thinkingvit.run_stage(stage_index, state, all_tokens=all_tokens, **kwargs)
        return self.classifier(class_token), state

    def recycle(self, stage_index: int, state: State, **kwargs) -> State:
        return self.thinkingvit.recycle(stage_index, state, **kwargs)

    @classmethod
    def from_vit(cls, source, thinking_stages=None, **config_overrides) -> "ThinkingViTForImageClassification":
        r"""
        Start from a trained plain ViT (the plug-in upgrade of the ThinkingViT paper).

        A source as wide as one of the stages goes into the leading channels and heads of the new model, of which the
        rest is freshly initialised; so with a source as wide as stage 0, stage 0 gives the source's logits. A source of
        full width fills the whole model.

        Args:
            source (`str`, `os.PathLike`, `ViTForImageClassification` or `DeiTForImageClassification`):
                A model, or the folder or Hub id of one.
            thinking_stages (`list[int]`, *optional*):
                Heads per stage. By default the source's heads, then twice as many.
            config_overrides:
                Further fields of [`ThinkingViTConfig`], such as `threshold`.

        Raises:
            ValueError: if the source is no ViT or DeiT classifier, or is as wide as none of the stages.
        """
        vit = load_vit(source)
        model = cls(thinkingvit_config_from_vit(vit.config, thinking_stages, **config_overrides))
        import_vit(model, vit)
        return model

    def extract_stage(self, stage_index: int):
        r"""
        A stand-alone Transformers `ViTForImageClassification` (with a distillation token: `DeiTForImageClassification`)
        with the weights of one stage. For stage 0 it gives the same logits as this model with `max_stages=1`; a later
        stage is extracted without the recycled tokens, so it gives the same logits only while its α are 0.

        Raises:
            ValueError: if there is no such stage.
        """
        return export_stage(self, stage_index)


__all__ = ["ThinkingViTForImageClassification", "ThinkingViTModel", "ThinkingViTPreTrainedModel"]
