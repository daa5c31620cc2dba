"""
PyTorch ThinkingSwin model: ThinkingViT (arXiv 2507.10800) on a Swin Transformer.

From pixels to logits: the classifier's `forward` calls the loop over stages (`staged_loop.py`), which calls `begin`,
`run_stage` and `recycle` of the model here and `answer` of the classifier; `run_stage` runs the layers of the pyramid
(`nested_swin.py`, of layers in `nested_layers.py`).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .configuration_thinking_swin import SwinRound, ThinkingSwinConfig
from .module_arguments import check_arguments
from .module_quantization import QuantizablePreTrainedModel
from .module_recording import record
from .nested_layers import NestedLayerNorm, NestedLinear
from .nested_projection import project
from .nested_swin import NestedSwinAttention, NestedSwinEmbeddings, NestedSwinLayer
from .staged_arguments import resolve_feature_stages, resolve_stages
from .staged_loop import StagedModelMixin, run_backbone, run_stages
from .staged_run import Answer, State
from .task_classification import ImageClassificationTask, StagedImageClassifierOutput
from .token_policies import layer_entries
from .weights_from_official import OfficialSourcesMixin
from .weights_from_swin import import_swin, load_swin, thinking_swin_config_from_swin


if TYPE_CHECKING:
    # Never runs: Transformers copies the files that relative imports name along with the code of a saved model, and
    # `auto_map` names this one.
    from .modeling_thinking_swin_backbone import ThinkingSwinBackbone  # noqa: F401


class ThinkingSwinRecycler(nn.Module):
    """
    Token Recycling: embeddings + α · Proj(Up(z)), with z a round's normalised tokens. Up is a transposed convolution of
    each channel by itself, with kernel = stride = the pyramid's downsampling, back to the grid of patches; Proj maps
    each position to the width with which the next round starts. α starts at 0.
    """

    def __init__(self, config: ThinkingSwinConfig, before: SwinRound, after: SwinRound):
        super().__init__()
        side, width, next_width = config.downsampling, before.hidden_size, after.layers[0].hidden_size
        self.alpha = nn.Parameter(torch.zeros(1))
        self.upsample = nn.Parameter(torch.ones(side, side, width))  # kernel: rows, columns, channels
        self.weight = nn.Parameter(torch.zeros(next_width, width))  # of Proj
        self.bias = nn.Parameter(torch.zeros(next_width))

    def forward(self, embeddings: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """
        `embeddings` (batch, rows, columns, channels) and `tokens` (batch, rows / side, columns / side, width) → the
        next round's input (batch, rows, columns, its width).
        """
        side, width = len(self.upsample), len(self.weight)
        # No two kernels overlap, so for each place in a kernel both maps are one: Proj with its columns scaled by Up.
        # All of them at once are one product with the few tokens, instead of one with every patch.
        weight = self.upsample[:, :, None, :] * (self.alpha * self.weight)
        bias = (self.alpha * self.bias).repeat(side**2)
        recycled = nn.functional.linear(tokens, weight.flatten(0, 2), bias)
        recycled = recycled.unflatten(3, (side, side, width)).transpose(2, 3)
        squares = embeddings[..., :width].unflatten(2, (-1, side)).unflatten(1, (-1, side))
        return (squares + recycled).flatten(3, 4).flatten(1, 2)


class ThinkingSwinPreTrainedModel(OfficialSourcesMixin, QuantizablePreTrainedModel):
    config: ThinkingSwinConfig
    base_model_prefix = "thinking_swin"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["NestedSwinEmbeddings", "NestedSwinLayer"]
    _supports_sdpa = True
    # Relative position biases are added to the scores, which flash attention and flex attention do not take.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": record(NestedSwinLayer), "attentions": record(NestedSwinAttention, 1)}
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NestedSwinEmbeddings) and module.position_embeddings is not None:
            init.zeros_(module.position_embeddings)
        elif isinstance(module, NestedSwinAttention):
            init.zeros_(module.relative_position_bias_table)
        elif isinstance(module, ThinkingSwinRecycler):
            init.zeros_(module.alpha)
            init.ones_(module.upsample)  # each patch starts with the token that covers it
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.bias)


class ThinkingSwinModel(ThinkingSwinPreTrainedModel):
    """
    The bare ThinkingSwin, without a classifier. `forward` runs every round for every image, since without an answer
    nothing can exit; a classifier runs it round by round with `begin`, `run_stage` and `recycle`.
    """

    def __init__(self, config: ThinkingSwinConfig):
        super().__init__(config)
        config.validate()
        self.stages = config.stages
        self.embeddings = NestedSwinEmbeddings(config)
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").split(config.depths)
        self.layers = nn.ModuleList([NestedSwinLayer(config, index, rate.tolist()) for index, rate in enumerate(rates)])
        self.layernorm = NestedLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.recyclers = nn.ModuleList([ThinkingSwinRecycler(config, *rounds) for rounds in pairwise(self.stages)])
        self.post_init()

    def begin(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None, stages: range | None = None
    ) -> State:
        """
        The state with which the first of `stages` (all rounds by default) starts, without recycled tokens.

        Raises:
            ValueError: for images that do not fit the model, and, if several rounds are to run, for sizes that tokens
                cannot be recycled to.
        """
        self.embeddings.check(pixel_values, interpolate_pos_encoding)
        stages = stages or range(self.config.num_stages)
        if len(stages) > 1:
            self._check_recycling(tuple(pixel_values.shape[-2:]))
        embeddings = self.embeddings(pixel_values)
        width = self.stages[stages.start].layers[0].hidden_size
        return {"embeddings": embeddings, "hidden_states": embeddings[..., :width]}

    def _check_recycling(self, image_size: tuple[int, int]) -> None:
        side = self.config.downsampling
        if any(patches % side for patches in self.config.grid_of(image_size)):
            height, width = (side * patch for patch in self.embeddings.patch_size)
            grid = "×".join(map(str, self.config.grid_of(image_size)))
            raise ValueError(
                f"`pixel_values` of {image_size[0]}×{image_size[1]} pixels give {grid} patches, which tokens cannot be "
                f"recycled to: rows and columns must be multiples of {side}. Resize the images to a height that is a "
                f"multiple of {height} and a width that is a multiple of {width} pixels, or pass `max_stages=1`."
            )

    def run_stage(
        self, stage_index: int, state: State, all_tokens: bool = True, output_layers: bool = False, **kwargs
    ) -> State:
        """
        Run the layers of a round. All tokens are computed in any case.

        Returns:
            The state, with the `tokens` `(images, rows, columns, width of the round)` after the final LayerNorm; with
            `output_layers`, also `layer_outputs.0` and so on, `(images, rows, columns, width)` of each layer.
        """
        hidden_states = state["hidden_states"]
        grid, outputs = tuple(hidden_states.shape[1:3]), []
        hidden_states = hidden_states.flatten(1, 2)
        for layer, sub_network in zip(self.layers, self.stages[stage_index].layers):
            hidden_states = layer(hidden_states, grid, sub_network, **kwargs)
            grid = layer.grid_after(grid)
            if output_layers:
                outputs.append(hidden_states.unflatten(1, grid))
        tokens = self.layernorm(hidden_states).unflatten(1, grid)
        return {"embeddings": state["embeddings"], "tokens": tokens, **layer_entries(outputs)}

    def recycle(self, stage_index: int, state: State, **kwargs) -> State:
        """The state with which round `stage_index + 1` starts, from that in which `run_stage` left this one."""
        hidden_states = self.recyclers[stage_index](state["embeddings"], state["tokens"])
        return {"embeddings": state["embeddings"], "hidden_states": hidden_states}

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        *,
        max_stages: int | None = None,
        sub_network: int | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): images.
            max_stages (`int`, *optional*): run only this many rounds; by default up to `config.out_stage`, or all.
            sub_network (`int`, *optional*): run the sub-network of this round alone, without recycled tokens.
            interpolate_pos_encoding (`bool`, *optional*): with `config.use_absolute_embeddings`, accept images of
                another size than `config.image_size`.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: `last_hidden_state` are tokens of the last
            round that ran, after the final LayerNorm, `(batch_size, tokens, its width)`, and `pooler_output` is their
            mean. `hidden_states` and `attentions` hold every layer and every block of every round, in order, as in
            `StagedImageClassifierOutput`.

        Raises:
            ValueError: for pixel values, `max_stages` or `sub_network` that do not fit the model.
            TypeError: for arguments that neither the model nor Transformers knows.
        """
        check_arguments(self, kwargs)
        stages = resolve_feature_stages(self.config, max_stages, sub_network)
        tokens = run_backbone(self, pixel_values, stages, interpolate_pos_encoding, **kwargs)["tokens"].flatten(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens.mean(dim=1))


class ThinkingSwinForImageClassification(ImageClassificationTask, StagedModelMixin, ThinkingSwinPreTrainedModel):
    """
    ThinkingSwin with an image classification head on the mean of the tokens, one head for all rounds, and early exit.

    Call it as any Transformers image classifier; see `forward` for the arguments that steer the exits, and
    [`StagedImageClassifierOutput`] for what each output means when images exit at different stages.

    Example:

    ```python
    >>> model = ThinkingSwinForImageClassification.from_pretrained("org/thinking-swin-s", threshold=0.9)
    >>> outputs = model(**image_processor(images, return_tensors="pt"))
    >>> outputs.logits.argmax(-1), outputs.exit_stage, outputs.entropy
    ```"""

    def __init__(self, config: ThinkingSwinConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.thinking_swin = ThinkingSwinModel(config)
        self.classifier = NestedLinear(config.hidden_size, config.num_labels)
        self.post_init()

    def answer(self, stage_index: int, state: State) -> Answer:
        return {"logits": project(self.classifier, state["tokens"].flatten(1, 2).mean(dim=1))}

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        threshold: float | Sequence[float] | None = None,
        max_stages: int | None = None,
        sub_network: int | None = None,
        output_stage_logits: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> StagedImageClassifierOutput:
        r"""
        In evaluation mode an image leaves after the first stage whose answer passes τ, and only the others are computed
        further. In training mode every image runs every stage.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Images, as the image processor returns them.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Class indices; -100 is ignored. With one label (`config.num_labels == 1`) a float target for
                regression; with `config.problem_type = "multi_label_classification"` a float tensor
                `(batch_size, num_labels)`. In training mode without labels a warning says, once, that a loss computed
                outside should be one of `stage_logits`; `output_stage_logits=True` says that it is.
            threshold (`float` or `list[float]`, *optional*):
                τ for this call, instead of `config.threshold`: Python's or NumPy's numbers, an array or a tensor.
            max_stages (`int`, *optional*):
                Run at most this many stages, from 1 to the number that the model has; the last of them always answers.
            sub_network (`int`, *optional*):
                Run the sub-network of this round alone, from the embeddings and without recycled tokens. It is the
                `exit_stage` of every image.
            output_stage_logits (`bool`, *optional*):
                Return every stage's logits for every image, which makes all of them run.
            interpolate_pos_encoding (`bool`, *optional*):
                With `config.use_absolute_embeddings`, accept images of another size than `config.image_size`, and
                interpolate the position embeddings. Without them, other sizes are accepted in any case.

        Returns:
            [`StagedImageClassifierOutput`]

        Raises:
            ValueError: for pixel values, labels, `threshold`, `max_stages` or `sub_network` that do not fit the model.
            TypeError: for arguments that neither the model nor Transformers knows.
        """
        check_arguments(self, kwargs)
        stages = resolve_stages(self.config.num_stages, max_stages, sub_network, threshold)
        self.check_call(pixel_values, labels, stages, output_stage_logits)
        run = run_stages(
            self,
            self.exit_rule(threshold),
            stages,
            pixel_values,
            run_all=bool(output_stage_logits),
            interpolate_pos_encoding=interpolate_pos_encoding,
            **kwargs,
        )
        return self.build_output(run, labels, output_stage_logits, **kwargs)

    @classmethod
    def from_swin(cls, source, head_rounds=None, **config_overrides) -> "ThinkingSwinForImageClassification":
        r"""
        Start from a trained plain Swin Transformer (the plug-in upgrade of the ThinkingViT paper).

        The new model is as wide as the source and has its weights; only recycling is freshly initialised, without
        effect at first (α = 0). So a round with all heads gives the source's logits, and the rounds before it use the
        leading heads and channels, which training has to teach to answer.

        Args:
            source (`str`, `os.PathLike` or `SwinForImageClassification`):
                A model, or the folder or Hub id of one.
            head_rounds (`list[list[int]]`, *optional*):
                Heads of each layer for each round, at most the source's. By default two rounds: first all heads of the
                first layer and half of them in the others (as in the published model), then all.
            config_overrides:
                Further fields of [`ThinkingSwinConfig`], such as `threshold`. `qkv_slicing` is `"each_projection"`
                here, not the configuration's default: then the leading heads of a narrower round are heads of the
                source, while `"leading_rows"` would read its queries as keys and values. `num_labels` (or `id2label`)
                of another number than the source's gives a new classifier, freshly initialised.

        Raises:
            ValueError: if the source is no Swin classifier, or an override changes a field that its weights determine.
        """
        swin = load_swin(source, config_overrides)
        model = cls(thinking_swin_config_from_swin(swin.config, head_rounds, **config_overrides))
        import_swin(model, swin)
        return model


__all__ = ["ThinkingSwinForImageClassification", "ThinkingSwinModel", "ThinkingSwinPreTrainedModel"]
