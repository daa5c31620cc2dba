"""
PyTorch ThinkingViT model (arXiv 2507.10800).

From pixels to logits: the classifier's `forward` calls the loop over stages (`staged_loop.py`), which calls `begin`,
`run_stage` and `recycle` of the model here and `answer` of the classifier; `run_stage` runs the layers of a sub-network
(`nested_vit.py`, of layers in `nested_layers.py`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .configuration_thinkingvit import ThinkingViTConfig
from .module_arguments import check_arguments
from .module_recording import record
from .nested_layers import NestedLayerNorm, NestedLinear
from .nested_projection import project
from .nested_vit import (
    NestedViTAttention,
    NestedViTEmbeddings,
    NestedViTLayer,
    NestedViTPreTrainedModel,
    build_layers,
    finish_layers,
    run_layers,
)
from .staged_arguments import resolve_feature_stages, resolve_stages
from .staged_loop import StagedModelMixin, run_backbone, run_stages
from .staged_run import Answer, State
from .sub_networks import SubNetwork
from .task_classification import ImageClassificationTask, StagedImageClassifierOutput
from .token_policies import LayerOutputs
from .token_pruning import ScorePredictors, TokenPruningMixin, kept_entries
from .token_pruning_training import add_pruning_outputs, training_entries
from .weights_from_vit import ONE_HEAD, export_stage, import_vit, load_classifier, thinkingvit_config_from_vit


if TYPE_CHECKING:
    # Never runs: Transformers copies the files that relative imports name; `auto_map` of a saved model names these.
    from .modeling_thinkingvit_backbone import ThinkingViTBackbone  # noqa: F401
    from .modeling_thinkingvit_segmentation import ThinkingViTForSemanticSegmentation  # noqa: F401


class ThinkingViTRecycler(nn.Module):
    """Token Recycling: embeddings + α · Proj(z), with z a stage's normalised tokens. α starts at 0."""

    def __init__(self, config: ThinkingViTConfig, sub_network: SubNetwork):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1))
        self.projection = NestedLinear(sub_network.hidden_size, config.hidden_size)

    def forward(self, embeddings: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """`embeddings` (batch, tokens, next stage's width) and a stage's tokens → the next stage's input, alike."""
        return embeddings + self.alpha * project(self.projection, tokens, embeddings.shape[-1])


class ThinkingViTPreTrainedModel(NestedViTPreTrainedModel):
    config: ThinkingViTConfig
    base_model_prefix = "thinkingvit"
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_record_outputs = {"hidden_states": record(NestedViTLayer), "attentions": NestedViTAttention}

    def __init__(self, config: ThinkingViTConfig):
        super().__init__(config)
        if config.pruning_layers and getattr(self, "reads_all_tokens", False):
            raise ValueError(
                f"{type(self).__name__} reads every patch: it cannot have `pruning_layers`. A saved model loads "
                "without them: `from_pretrained(..., pruning_layers=None, pruning_keep_rate=None)`."
            )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ThinkingViTRecycler):
            init.zeros_(module.alpha)


class ThinkingViTModel(ThinkingViTPreTrainedModel):
    """The bare ThinkingViT. `forward` runs every stage for every image, since without an answer nothing can exit."""

    def __init__(self, config: ThinkingViTConfig):
        super().__init__(config)
        config.validate()
        self.stages = config.stages
        self.embeddings = NestedViTEmbeddings(config)
        self.layers = build_layers(config)
        self.layernorm = NestedLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.recyclers = nn.ModuleList([ThinkingViTRecycler(config, sub_network) for sub_network in self.stages[:-1]])
        self.score_predictors = ScorePredictors(config, self.stages[-1].hidden_size)
        self.post_init()

    def begin(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None, stages: range | None = None
    ) -> State:
        """
        The state with which the first of `stages` (all by default) starts, without recycled tokens: its channels of the
        embeddings, and the pixels while a later stage will read more channels.
        """
        self.embeddings.check(pixel_values, interpolate_pos_encoding)
        first = stages.start if stages else 0
        hidden_states = self.embeddings(pixel_values, 0, self.stages[first].hidden_size)
        pixels = {"pixel_values": pixel_values} if self._needs_pixels(hidden_states) else {}
        return {**pixels, "embeddings": hidden_states, "hidden_states": hidden_states}

    def _needs_pixels(self, embeddings: torch.Tensor) -> bool:
        """Whether a later stage reads channels that `embeddings` lacks."""
        return embeddings.shape[-1] < self.stages[-1].hidden_size

    def run_stage(
        self,
        stage_index: int,
        state: State,
        all_tokens: bool = True,
        keep_rate: float | Sequence[float] | None = None,
        output_kept_tokens: bool = False,
        output_layers: bool = False,
        **kwargs,
    ) -> State:
        """
        Run the layers of a stage. Unless `all_tokens`, the last layer computes the class token alone, and the state
        holds the inputs, keys and values from which `recycle` computes its other tokens. In the last stage of a model
        with pruning layers, patches are removed, or in training mode left out of the attention.

        Returns:
            The state, with the computed `tokens` `(images, tokens or 1, width of the stage)` after the final LayerNorm;
            of a pruned stage `keep_decisions.0` and so on in training, `kept_tokens.0` and so on if they are asked for;
            of another one, with `output_layers`, `layer_outputs.0` and so on.
        """
        hidden_states = state["hidden_states"]
        is_pruned = len(self.score_predictors) > 0 and stage_index == len(self.stages) - 1
        num_queries = None if all_tokens or (is_pruned and self.training) else 1
        recorder = LayerOutputs() if output_layers else None
        policy = self.score_predictors.policy(hidden_states, keep_rate, self.training) if is_pruned else recorder
        tokens, pending = run_layers(
            self.layers, hidden_states, self.stages[stage_index], policy=policy, num_queries=num_queries, **kwargs
        )
        inputs = {name: state[name] for name in ("pixel_values", "embeddings") if name in state}
        if output_layers or (is_pruned and (output_kept_tokens or self.training)):
            inputs.update(policy.entries())
        return {**inputs, "tokens": self.layernorm(tokens), **pending}

    def recycle(
        self,
        stage_index: int,
        state: State,
        keep_rate: float | Sequence[float] | None = None,
        output_kept_tokens: bool = False,
        **kwargs,
    ) -> State:
        """The state with which stage `stage_index + 1` starts, of all tokens: only the last stage removes any."""
        tokens, embeddings = state["tokens"], state["embeddings"]
        if "key" in state:
            others = finish_layers(self.layers, state, self.stages[stage_index], **kwargs)
            tokens = torch.cat([tokens, self.layernorm(others)], dim=1)
        width = self.stages[stage_index + 1].hidden_size
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
        sub_network: int | None = None,
        keep_rate: float | Sequence[float] | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): images.
            max_stages (`int`, *optional*): run only this many stages; by default up to `config.out_stage`, or all.
            sub_network (`int`, *optional*): run the sub-network of this stage alone, without recycled tokens.
            keep_rate (`float` or `list[float]`, *optional*): instead of `config.pruning_keep_rate`.
            interpolate_pos_encoding (`bool`, *optional*): accept images of another size than `config.image_size`.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: `last_hidden_state` are tokens of the last
            stage that ran, after the final LayerNorm, `(batch_size, tokens, its width)`, after pruning patches by
            descending score; `pooler_output` is the class token. `hidden_states` and `attentions` are as in
            `StagedImageClassifierOutput`.

        Raises:
            ValueError: for pixel values, `max_stages`, `sub_network` or `keep_rate` that do not fit the model.
            TypeError: for arguments that neither the model nor Transformers knows.
        """
        check_arguments(self, kwargs)
        stages = resolve_feature_stages(self.config, max_stages, sub_network)
        self.score_predictors.check_keep_rate(keep_rate)
        state = run_backbone(self, pixel_values, stages, interpolate_pos_encoding, keep_rate=keep_rate, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=state["tokens"], pooler_output=state["tokens"][:, 0])


class ThinkingViTForImageClassification(
    TokenPruningMixin, ImageClassificationTask, StagedModelMixin, ThinkingViTPreTrainedModel
):
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

    def answer(self, stage_index: int, state: State) -> Answer:
        pruning = {**training_entries(state, self.config.num_prefix_tokens), **kept_entries(state)}
        return {"logits": project(self.classifier, state["tokens"][:, 0]), **pruning}

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        threshold: float | Sequence[float] | None = None,
        max_stages: int | None = None,
        sub_network: int | None = None,
        keep_rate: float | Sequence[float] | None = None,
        output_stage_logits: bool | None = None,
        output_kept_tokens: bool | None = None,
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
                Run the sub-network of this stage alone, from the embeddings and without recycled tokens. It is the
                `exit_stage` of every image.
            keep_rate (`float` or `list[float]`, *optional*):
                Of a model with pruning layers: the share of the image's patches that remain, instead of
                `config.pruning_keep_rate`. The same weights serve several rates.
            output_stage_logits (`bool`, *optional*):
                Return every stage's logits for every image, which makes all of them run.
            output_kept_tokens (`bool`, *optional*):
                Return the patches that remain at each pruning layer, `kept_tokens`; empty without pruning layers.
            interpolate_pos_encoding (`bool`, *optional*):
                Accept images of another size than `config.image_size`, and interpolate the position embeddings.

        Returns:
            [`StagedImageClassifierOutput`]

        Raises:
            ValueError: for pixel values, labels or other arguments that do not fit the model.
            TypeError: for arguments that neither the model nor Transformers knows.
        """
        check_arguments(self, kwargs)
        stages = resolve_stages(self.config.num_stages, max_stages, sub_network, threshold)
        predictors = self.thinkingvit.score_predictors
        self.check_call(pixel_values, labels, stages, output_stage_logits)
        run = run_stages(
            self,
            self.exit_rule(threshold),
            stages,
            pixel_values,
            run_all=bool(output_stage_logits),
            interpolate_pos_encoding=interpolate_pos_encoding,
            **self.token_arguments(keep_rate, output_kept_tokens),
            **kwargs,
        )
        outputs = self.build_output(run, labels, output_stage_logits, **kwargs)
        add_pruning_outputs(outputs, self.config, run, predictors.rates(keep_rate), labels, **kwargs)
        if output_kept_tokens:
            num_patches = self.thinkingvit.embeddings.count_patches(pixel_values)
            outputs.kept_tokens = predictors.kept_tokens(run, num_patches, keep_rate)
        return outputs

    @classmethod
    def from_vit(cls, source, thinking_stages=None, **config_overrides) -> "ThinkingViTForImageClassification":
        r"""
        Start from a trained plain ViT (the plug-in upgrade of the ThinkingViT paper). It goes into the leading channels
        and heads; the rest is freshly initialised. With a source as wide as stage 0, stage 0 gives its logits. One
        between the widths of two stages is a start for training only.

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
        with the weights of one stage, which gives the logits of `forward(sub_network=stage_index)`: without recycled
        tokens. A pruned stage is extracted without its pruning.

        Raises:
            ValueError: if there is no such stage.
        """
        return export_stage(self, stage_index)


__all__ = ["ThinkingViTForImageClassification", "ThinkingViTModel", "ThinkingViTPreTrainedModel"]
