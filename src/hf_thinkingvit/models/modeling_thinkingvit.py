"""
PyTorch ThinkingViT model (arXiv 2507.10800).

In the order in which pixels flow: embeddings and layers (`nested_vit.py`), token recycling, the model that runs one
stage at a time, and the classifier, whose loop over stages is `staged_loop.StagedImageClassifierMixin`.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .configuration_nested_vit import Stage
from .configuration_thinkingvit import ThinkingViTConfig
from .module_arguments import check_arguments
from .module_recording import record, wants_recordings
from .nested_layers import NestedLayerNorm, NestedLinear
from .nested_vit import (
    NestedViTAttention,
    NestedViTEmbeddings,
    NestedViTLayer,
    NestedViTPreTrainedModel,
    build_layers,
)
from .staged_compilation import compilable_step
from .staged_loop import StagedImageClassifierMixin, State, resolve_max_stages
from .weights_from_vit import ONE_HEAD, export_stage, import_vit, load_classifier, thinkingvit_config_from_vit


class ThinkingViTRecycler(nn.Module):
    """Token Recycling: embeddings + α · Proj(z), with z a stage's normalised tokens. α starts at 0."""

    def __init__(self, config: ThinkingViTConfig, stage: Stage):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1))
        self.projection = NestedLinear(stage.hidden_size, config.hidden_size)

    def forward(self, embeddings: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """`embeddings` (batch, tokens, next stage's width) and a stage's tokens → the next stage's input, alike."""
        return embeddings + self.alpha * self.projection(tokens, embeddings.shape[-1])


class ThinkingViTPreTrainedModel(NestedViTPreTrainedModel):
    config: ThinkingViTConfig
    base_model_prefix = "thinkingvit"
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_record_outputs = {"hidden_states": record(NestedViTLayer), "attentions": NestedViTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ThinkingViTRecycler):
            init.zeros_(module.alpha)


class ThinkingViTModel(ThinkingViTPreTrainedModel):
    """
    The bare ThinkingViT, without a classifier. It cannot tell when an answer is good enough, so `forward` runs every
    stage for every image; the classifier runs it stage by stage with `embed`, `run_stage` and `recycle`.
    """

    def __init__(self, config: ThinkingViTConfig):
        super().__init__(config)
        config.validate()
        self.stages = config.stages
        self.embeddings = NestedViTEmbeddings(config)
        self.layers = build_layers(config)
        self.layernorm = NestedLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.recyclers = nn.ModuleList([ThinkingViTRecycler(config, stage) for stage in self.stages[:-1]])
        self.post_init()

    def embed(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None) -> State:
        """The state with which stage 0 starts. Pixels stay in it while a later stage is wider and will need them."""
        self.embeddings.check(pixel_values, interpolate_pos_encoding)
        hidden_states = self.embeddings(pixel_values, 0, self.stages[0].hidden_size)
        pixels = {"pixel_values": pixel_values} if self._needs_pixels(hidden_states) else {}
        return {**pixels, "embeddings": hidden_states, "hidden_states": hidden_states}

    def _needs_pixels(self, embeddings: torch.Tensor) -> bool:
        """Whether a later stage reads channels that `embeddings` lacks."""
        return embeddings.shape[-1] < self.stages[-1].hidden_size

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
            tokens, key, value = last_layer(hidden_states, stage, slice(1), **kwargs)
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
        pixels = {"pixel_values": state["pixel_values"]} if self._needs_pixels(embeddings) else {}
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
            TypeError: for arguments that neither the model nor Transformers knows.
        """
        check_arguments(self, kwargs)
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

    @compilable_step
    def begin(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None, **kwargs) -> State:
        return self.thinkingvit.embed(pixel_values, interpolate_pos_encoding)

    @compilable_step
    def run_stage(self, stage_index: int, state: State, is_last: bool = False, **kwargs) -> tuple[torch.Tensor, State]:
        # In training every image goes on, so nothing is gained by computing the last layer in two parts. Recorded
        # outputs are of all tokens.
        all_tokens = (self.training and not is_last) or wants_recordings(self.config, kwargs)
        class_token, state = self.thinkingvit.run_stage(stage_index, state, all_tokens=all_tokens, **kwargs)
        return self.classifier(class_token), state

    @compilable_step
    def recycle(self, stage_index: int, state: State, **kwargs) -> State:
        return self.thinkingvit.recycle(stage_index, state, **kwargs)

    @classmethod
    def from_vit(cls, source, thinking_stages=None, **config_overrides) -> "ThinkingViTForImageClassification":
        r"""
        Start from a trained plain ViT (the plug-in upgrade of the ThinkingViT paper).

        The source goes into the leading channels and heads of the new model, of which the rest is freshly initialised;
        so with a source as wide as stage 0, stage 0 gives the source's logits. A source of full width fills the whole
        model. One between the widths of two stages is a start for training only: no stage gives its logits.

        Args:
            source (`str`, `os.PathLike`, `ViTForImageClassification` or `DeiTForImageClassification`):
                A model, or the folder or Hub id of one.
            thinking_stages (`list[int]`, *optional*):
                Heads per stage. By default the source's heads, then twice as many.
            config_overrides:
                Further fields of [`ThinkingViTConfig`], such as `threshold`. `num_labels` (or `id2label`) of another
                number than the source's gives a new classifier, freshly initialised.

        Raises:
            ValueError: if the source is no ViT or DeiT classifier, or is wider than every stage.
        """
        vit = load_classifier(source, ONE_HEAD, config_overrides)
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
