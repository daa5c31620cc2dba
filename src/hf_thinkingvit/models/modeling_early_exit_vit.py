"""
PyTorch early-exit ViT: one width, answers after some of the layers.

A stage is the layers from one exit to the next; `recycle` hands the tokens on unchanged. The classifier's `forward`
calls the loop over stages (`staged_loop.py`) as in `modeling_thinkingvit.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .configuration_early_exit_vit import METHODS, EarlyExitViTConfig
from .exit_losses import exit_training_loss
from .module_arguments import check_arguments
from .module_recording import record
from .nested_layers import NestedLayerNorm, NestedLinear
from .nested_vit import (
    NestedViTAttention,
    NestedViTEmbeddings,
    NestedViTLayer,
    NestedViTPreTrainedModel,
    build_layers,
    finish_layers,
    run_layers,
)
from .staged_arguments import resolve_stages
from .staged_compilation import compilable_step
from .staged_loop import StagedModelMixin, run_backbone, run_stages
from .staged_run import Answer, StagedRun, State
from .task_classification import ImageClassificationTask, StagedImageClassifierOutput
from .weights_from_vit import PLAIN_VIT, fields_from_vit, import_vit, load_classifier, override_fields


# Entries of the state that stay from stage to stage: ACT's weighted sum of class tokens, what is left of the weights.
HALTING_STATE = ("halted_output", "remainder")


@dataclass
class EarlyExitImageClassifierOutput(StagedImageClassifierOutput):
    """
    Output of an early-exit ViT: the fields of [`StagedImageClassifierOutput`], and

    Args:
        halting_scores (`tuple[torch.Tensor]`, *optional*, returned like `stage_logits`, with `config.halting`):
            Halting score `(batch_size,)`, float32, of every stage; that of the last one is 1.
    """

    halting_scores: tuple[torch.Tensor, ...] | None = None


def with_halting_scores(
    outputs: StagedImageClassifierOutput, run: StagedRun, config: EarlyExitViTConfig
) -> EarlyExitImageClassifierOutput:
    """The output of a run with the halting scores of its stages, if exits learn them and `stage_logits` are there."""
    scores = None
    if outputs.stage_logits is not None and config.halting is not None:
        scores = tuple(step.answer["halting_score"] for step in run.steps)
    return EarlyExitImageClassifierOutput(**outputs, halting_scores=scores)


class EarlyExitViTPreTrainedModel(NestedViTPreTrainedModel):
    config: EarlyExitViTConfig
    base_model_prefix = "early_exit_vit"
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_record_outputs = {"hidden_states": record(NestedViTLayer), "attentions": NestedViTAttention}


class EarlyExitViTModel(EarlyExitViTPreTrainedModel):
    """The bare model, without heads. `forward` runs every layer, since without an answer nothing can exit."""

    def __init__(self, config: EarlyExitViTConfig):
        super().__init__(config)
        config.validate()
        self.stages = config.stages
        self.embeddings = NestedViTEmbeddings(config)
        self.layers = build_layers(config)
        self.layernorm = NestedLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def begin(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None, stages: range | None = None
    ) -> State:
        """The state with which the first stage starts."""
        self.embeddings.check(pixel_values, interpolate_pos_encoding)
        hidden_states = self.embeddings(pixel_values, 0, self.config.hidden_size)
        state = {"hidden_states": hidden_states}
        if self.config.halting == "act":
            state["halted_output"] = torch.zeros_like(hidden_states[:, 0])
            state["remainder"] = hidden_states.new_ones(hidden_states.shape[0], dtype=torch.float32)
        return state

    def run_stage(self, stage_index: int, state: State, all_tokens: bool = True, **kwargs) -> State:
        """
        Run the layers of a stage. Of the last one only the class token is computed, unless `all_tokens`, or the exit
        has a transformer layer; what the other tokens need is in the state then.

        Returns:
            The state, with the computed `tokens` `(images, tokens or 1, hidden_size)`, without the final LayerNorm.
        """
        reads_all = self.config.exit_head == "transformer_layer" and stage_index < len(self.stages) - 1
        num_queries = None if all_tokens or reads_all else 1
        tokens, pending = run_layers(
            self.layers, state["hidden_states"], self.stages[stage_index], num_queries=num_queries, **kwargs
        )
        return {**{name: state[name] for name in HALTING_STATE if name in state}, "tokens": tokens, **pending}

    def recycle(self, stage_index: int, state: State, **kwargs) -> State:
        """The state with which stage `stage_index + 1` starts: the same tokens, all of them."""
        tokens = state["tokens"]
        if "key" in state:
            others = finish_layers(self.layers, state, self.stages[stage_index], **kwargs)
            tokens = torch.cat([tokens, others], dim=1)
        return {**{name: state[name] for name in HALTING_STATE if name in state}, "hidden_states": tokens}

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        *,
        max_stages: int | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): images.
            max_stages (`int`, *optional*): run only the layers of this many stages; all by default.
            interpolate_pos_encoding (`bool`, *optional*): accept images of another size than `config.image_size`.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: `last_hidden_state` are the tokens after the
            last layer that ran and the final LayerNorm, `(batch_size, tokens, hidden_size)`; `pooler_output` is their
            class token.

        Raises:
            ValueError: for pixel values or `max_stages` that do not fit the model.
            TypeError: for arguments that neither the model nor Transformers knows.
        """
        check_arguments(self, kwargs)
        stages = resolve_stages(self.config.num_stages, max_stages)
        state = run_backbone(self, pixel_values, stages, interpolate_pos_encoding, **kwargs)
        tokens = self.layernorm(state["tokens"])
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens[:, 0])


class EarlyExitViTForImageClassification(ImageClassificationTask, StagedModelMixin, EarlyExitViTPreTrainedModel):
    """
    A ViT with image classification heads on the class token after some of its layers, and early exit.

    Example:

    ```python
    >>> model = EarlyExitViTForImageClassification(EarlyExitViTConfig.fastbert(num_labels=10))
    >>> outputs = model(pixel_values, threshold=0.3)
    >>> outputs.logits.argmax(-1), outputs.exit_stage
    ```"""

    # Layers and attention of exits' heads are not part of the sequence of layers.
    _can_record_outputs = {
        "hidden_states": record(NestedViTLayer, layer_name="early_exit_vit"),
        "attentions": record(NestedViTAttention, index=1, layer_name="early_exit_vit"),
    }

    def __init__(self, config: EarlyExitViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.early_exit_vit = EarlyExitViTModel(config)
        self.classifier = NestedLinear(config.hidden_size, config.num_labels)
        exits = range(config.num_stages - 1)
        if config.halting is not None:
            self.halting_gates = nn.ModuleList([nn.Linear(config.hidden_size, 1) for _ in exits])
        if config.exit_head == "transformer_layer":
            self.exit_transformer_layers = nn.ModuleList([NestedViTLayer(config) for _ in exits])
        if config.exit_head != "shared":
            norms = [NestedLayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in exits]
            self.exit_layernorms = nn.ModuleList(norms)
            classifiers = [NestedLinear(config.hidden_size, config.num_labels) for _ in exits]
            self.exit_classifiers = nn.ModuleList(classifiers)
        self.post_init()

    def freeze_backbone(self) -> None:
        """
        Train the exits' own heads and halting gates only: everything that a plain ViT has stops requiring gradients. In
        a training run, `freeze: ["early_exit_vit.*", "classifier.*"]` does the same. With `self_distillation`, which
        trains nothing else anyway, it saves time and memory.

        Raises:
            ValueError: if nothing would be left to train.
        """
        if not any(hasattr(self, name) for name in ("exit_classifiers", "halting_gates")):
            raise ValueError("With `exit_head` = 'shared' and no `halting` there is nothing to train but the backbone.")
        self.early_exit_vit.requires_grad_(False)
        self.classifier.requires_grad_(False)

    @property
    def _distils_itself(self) -> bool:
        return self.training and self.config.self_distillation

    def answer(self, stage_index: int, state: State) -> Answer:
        # With self-distillation only the exits' own heads learn, whether the rest is frozen or not.
        tokens = state["tokens"].detach() if self._distils_itself else state["tokens"]
        class_token = tokens[:, 0]
        answer = {"halting_score": state["halting_score"]} if "halting_score" in state else {}
        if "remainder" in state:
            remainder = state["remainder"].to(class_token.dtype)
            class_token = state["halted_output"] + remainder[:, None] * class_token
        if stage_index == self.config.num_stages - 1 or self.config.exit_head == "shared":
            logits = self.classifier(self.early_exit_vit.layernorm(class_token))
            return {"logits": logits.detach() if self._distils_itself else logits, **answer}
        if self.config.exit_head == "transformer_layer":
            tokens, _, _ = self.exit_transformer_layers[stage_index](tokens, self.config.sub_network, queries=slice(1))
            class_token = tokens[:, 0]
        logits = self.exit_classifiers[stage_index](self.exit_layernorms[stage_index](class_token))
        return {"logits": logits, **answer}

    @compilable_step
    def run_stage(self, stage_index: int, state: State, is_last: bool = False, **kwargs) -> State:
        """The state as the stage leaves it, with its halting score if exits learn one; that of the last stage is 1."""
        state = super().run_stage(stage_index, state, is_last=is_last, **kwargs)
        if self.config.halting is not None:
            class_token = state["tokens"][:, 0]
            if stage_index == self.config.num_stages - 1:
                score = class_token.new_ones(class_token.shape[0], dtype=torch.float32)
            else:
                score = self.halting_gates[stage_index](class_token).float().sigmoid().squeeze(1)
            state = {**state, "halting_score": score}
        return state

    @compilable_step
    def recycle(self, stage_index: int, state: State, **kwargs) -> State:
        """The state with which stage `stage_index + 1` starts; with ACT, this stage's class token is weighted in."""
        if "remainder" in state:
            class_token = state["tokens"][:, 0]
            # At most what is left, so that the weights sum to 1 also beyond the stage at which an image halts.
            weight = torch.minimum(state["halting_score"], state["remainder"])
            halted_output = state["halted_output"] + weight[:, None].to(class_token.dtype) * class_token
            state = {**state, "halted_output": halted_output, "remainder": state["remainder"] - weight}
        return super().recycle(stage_index, state, **kwargs)

    def run_loss(self, labels: torch.Tensor, run: StagedRun, **kwargs) -> torch.Tensor:
        """
        In training mode the loss that `config.halting` or `config.self_distillation` asks for, a mean over the images
        whose label is not -100; else as of every staged model.
        """
        if not (self.training and self.config.has_own_loss):
            return super().run_loss(labels, run, **kwargs)
        return exit_training_loss(self.config, labels, run.steps, kwargs.get("num_items_in_batch"))

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        threshold: float | Sequence[float] | None = None,
        max_stages: int | None = None,
        output_stage_logits: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EarlyExitImageClassifierOutput:
        r"""
        In evaluation mode an image leaves after the first stage whose answer passes τ, and only the others are computed
        further. In training mode every image runs every layer.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Images, as the image processor returns them.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Class indices, of which -100 is ignored; for regression and multi-label classification float targets, as
                of [`ThinkingViTForImageClassification`].
            threshold (`float` or `list[float]`, *optional*):
                τ for this call, instead of `config.threshold`: Python's or NumPy's numbers, an array or a tensor.
            max_stages (`int`, *optional*):
                Run at most this many stages, from 1 to the number that the model has; the last of them always answers.
            output_stage_logits (`bool`, *optional*):
                Return every stage's logits for every image, which makes all of them run.
            interpolate_pos_encoding (`bool`, *optional*):
                Accept images of another size than `config.image_size`, and interpolate the position embeddings.
            generator (`torch.Generator`, *optional*):
                Of the criterion `"pondernet"`, whose answers are random: draws the number by which each image's halting
                is sampled. By default torch's global one of the CPU, so that two calls may answer differently; with a
                generator of the same seed they answer the same, whatever the dtype, the device and the batches.

        Returns:
            [`EarlyExitImageClassifierOutput`]

        Raises:
            ValueError: for pixel values, labels, `threshold` or `max_stages` that do not fit the model, and for a
                `generator` of a criterion that draws nothing.
            TypeError: for arguments that neither the model nor Transformers knows.
        """
        check_arguments(self, kwargs)
        stages = resolve_stages(self.config.num_stages, max_stages, None, threshold)
        self.check_call(pixel_values, labels, stages, output_stage_logits)
        run = run_stages(
            self,
            self.exit_rule(threshold),
            stages,
            pixel_values,
            run_all=bool(output_stage_logits),
            generator=generator,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **kwargs,
        )
        outputs = self.build_output(run, labels, output_stage_logits, **kwargs)
        return with_halting_scores(outputs, run, self.config)

    @classmethod
    def from_vit(cls, source, method: str | None = None, **config_overrides) -> "EarlyExitViTForImageClassification":
        r"""
        Start from a trained plain ViT. Without early exits the model gives the source's logits (except with
        `halting="act"`). Heads of exits and halting gates are freshly initialised.

        Args:
            source (`str`, `os.PathLike` or `ViTForImageClassification`):
                A model, or the folder or Hub id of one.
            method (`str`, *optional*):
                A published method: the name of a preset of the configuration, such as `"pabee"`.
            config_overrides:
                Further fields of [`EarlyExitViTConfig`], such as `exit_layers`; other labels give new classifiers.

        Raises:
            ValueError: if the source is no ViT classifier, there is no such method, or an override changes what the
                source's weights fix.
        """
        if method is not None and method not in METHODS:
            raise ValueError(f"`method` must be one of {list(METHODS)}, got {method!r}.")
        vit = load_classifier(source, PLAIN_VIT, config_overrides)
        make_config = EarlyExitViTConfig if method is None else getattr(EarlyExitViTConfig, method)
        model = cls(make_config(**override_fields(fields_from_vit(vit.config, config_overrides), config_overrides)))
        import_vit(model, vit)
        return model


__all__ = [
    "EarlyExitImageClassifierOutput",
    "EarlyExitViTForImageClassification",
    "EarlyExitViTModel",
    "EarlyExitViTPreTrainedModel",
]
