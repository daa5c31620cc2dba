"""
PyTorch A-ViT model (arXiv 2112.07658): a DeiT whose tokens halt.

From pixels to logits: `AViTModel` runs the layers (`nested_vit.run_layers`) with one of two token policies
(`token_halting.py`) with equal results. `forward` masks halted tokens: it is differentiable, and serves training and
recorded outputs. `run_sparse` removes them, which the classifier uses for inference.
"""

from dataclasses import dataclass, fields

import torch
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .configuration_avit import AViTConfig, check_halting_epsilon
from .configuration_checks import check_integer
from .module_arguments import check_arguments, warn_of_outside_loss
from .module_recording import wants_recordings
from .nested_layers import NestedLayerNorm, NestedLinear
from .nested_vit import NestedViTEmbeddings, NestedViTPreTrainedModel, build_layers, run_layers
from .task_classification import check_labels, classification_loss
from .token_halting import DenseHalting, SparseHalting, depth_until_answer, sparse_macs
from .token_halting_loss import OUTSIDE_LOSS, add_loss, halting_losses
from .weights_from_vit import ONE_OR_TWO_HEADS, avit_config_from_vit, import_vit, load_classifier


@dataclass
class AViTModelOutput(ModelOutput):
    """
    Output of the bare A-ViT, which computes densely.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, tokens, hidden_size)`):
            Halting-weighted sum of each token's outputs, after the final LayerNorm.
        pooler_output (`torch.Tensor` of shape `(batch_size, hidden_size)`):
            The class token of it.
        token_depth (`torch.LongTensor` of shape `(batch_size, tokens)`):
            Layers that each token ran, from 1.
        ponder (`torch.FloatTensor` of shape `(batch_size, tokens)`):
            ρ: layers that each token ran, plus its remainder. Float32.
        halting_scores (`torch.FloatTensor` of shape `(layers, batch_size, tokens)`):
            Scores of every layer's output, float32; meaningless for tokens that had halted, whose inputs are 0.
        hidden_states, attentions (`tuple[torch.Tensor]`, *optional*):
            As in Transformers' ViT; rows of halted tokens mean nothing.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    token_depth: torch.Tensor | None = None
    ponder: torch.Tensor | None = None
    halting_scores: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class AViTImageClassifierOutput(ModelOutput):
    """
    Output of the A-ViT classifier.

    Args:
        loss (`torch.Tensor` of shape `(1,)`, *optional*, returned when `labels` are given):
            The task loss; in training mode with label smoothing, plus the weighted ponder and prior losses.
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`):
            Scores before softmax; of a distilled model, the mean of both heads.
        cls_logits, distillation_logits (`torch.Tensor` of shape `(batch_size, num_labels)`, *optional*):
            Each head's scores, for distilled models.
        task_loss, ponder_loss, prior_loss (`torch.Tensor` of shape `(1,)`, *optional*):
            The parts of the loss, unweighted. The latter two in training mode, also without `labels`, and with
            `output_halting_losses=True`.
        mean_depth (`torch.FloatTensor` of shape `(batch_size,)`):
            Mean number of layers that the image's tokens run until its answer is there. An image leaves with its class
            token (and distillation token); other tokens that have not halted leave with it, and count with the layers
            that they ran. The same in training, and whatever other outputs are asked for. The A-ViT paper's mean depth,
            of every token's own depth, is the mean of `token_depth`.
        macs (`torch.LongTensor` of shape `(batch_size,)`, *optional*, not returned in training mode):
            Multiply-accumulates in matrix products of the sparse computation until the image's answer is there. What
            runs only for `token_depth` or for recorded outputs is not counted.
        token_depth (`torch.LongTensor` of shape `(batch_size, tokens)`, *optional*):
            Layers that each token runs until it halts, returned with `output_token_depth=True`, for which images stay
            until all their tokens have halted.
        hidden_states, attentions (`tuple[torch.Tensor]`, *optional*):
            Of every token, from the dense computation; rows of halted tokens mean nothing.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cls_logits: torch.Tensor | None = None
    distillation_logits: torch.Tensor | None = None
    task_loss: torch.Tensor | None = None
    ponder_loss: torch.Tensor | None = None
    prior_loss: torch.Tensor | None = None
    mean_depth: torch.Tensor | None = None
    macs: torch.Tensor | None = None
    token_depth: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def in_declared_order(outputs: ModelOutput) -> ModelOutput:
    """The same output as one whose fields were all set at once: a tuple has them in the order of their setting."""
    return type(outputs)(**{field.name: getattr(outputs, field.name) for field in fields(outputs)})


class AViTPreTrainedModel(NestedViTPreTrainedModel):
    config: AViTConfig
    base_model_prefix = "avit"


class AViTModel(AViTPreTrainedModel):
    """The bare A-ViT. `forward` is the dense computation, for every token; `run_sparse` is the sparse one."""

    def __init__(self, config: AViTConfig):
        super().__init__(config)
        config.validate()
        self.embeddings = NestedViTEmbeddings(config)
        self.layers = build_layers(config)
        self.layernorm = NestedLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def begin(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None) -> torch.Tensor:
        """The first layer's input `(batch_size, tokens, hidden_size)`."""
        self.embeddings.check(pixel_values, interpolate_pos_encoding)
        return self.embeddings(pixel_values, 0, self.config.hidden_size)

    def resolve(self, halting_epsilon: float | None, max_depth: int | None) -> tuple[float, int]:
        """ε and the number of layers for a call; `ValueError` for invalid values."""
        if halting_epsilon is None:
            halting_epsilon = self.config.halting_epsilon
        check_halting_epsilon(halting_epsilon)
        if max_depth is None:
            return halting_epsilon, self.config.num_hidden_layers
        check_integer("max_depth", max_depth, minimum=1)
        if max_depth > self.config.num_hidden_layers:
            raise ValueError(
                f"`max_depth` must be at most {self.config.num_hidden_layers}, the number of layers, got {max_depth}."
            )
        return halting_epsilon, max_depth

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        *,
        halting_epsilon: float | None = None,
        max_depth: int | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AViTModelOutput:
        r"""
        The dense computation: halted tokens are masked, nothing is saved, everything is differentiable.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): images.
            halting_epsilon (`float`, *optional*): ε for this call, instead of `config.halting_epsilon`.
            max_depth (`int`, *optional*): run at most this many layers; all tokens halt in the last of them.
            interpolate_pos_encoding (`bool`, *optional*): accept images of another size than `config.image_size`.

        Raises:
            ValueError: for arguments that do not fit the model.
            TypeError: for arguments that neither the model nor Transformers knows.
        """
        check_arguments(self, kwargs)
        epsilon, num_layers = self.resolve(halting_epsilon, max_depth)
        hidden_states = self.begin(pixel_values, interpolate_pos_encoding)
        halting = DenseHalting(self.config, epsilon, hidden_states)
        run_layers(self.layers[:num_layers], hidden_states, self.config.sub_network, halting, **kwargs)
        tokens = self.layernorm(halting.output)
        return AViTModelOutput(
            last_hidden_state=tokens,
            pooler_output=tokens[:, 0],
            token_depth=halting.token_depth,
            ponder=halting.ponder,
            halting_scores=torch.stack(halting.scores),
        )

    def run_sparse(
        self,
        pixel_values: torch.Tensor,
        halting_epsilon: float | None = None,
        max_depth: int | None = None,
        output_token_depth: bool = False,
        interpolate_pos_encoding: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The sparse computation.

        Returns:
            The halting-weighted prefix tokens (class, distillation) after the final LayerNorm `(batch_size, prefix
            tokens, hidden_size)`, and the layers that each token ran `(batch_size, tokens)`: without
            `output_token_depth` until its image left.
        """
        epsilon, num_layers = self.resolve(halting_epsilon, max_depth)
        hidden_states = self.begin(pixel_values, interpolate_pos_encoding)
        batch_size, num_tokens, width = hidden_states.shape
        halting = SparseHalting(self.config, epsilon, hidden_states, all_depths=output_token_depth)
        run_layers(self.layers[:num_layers], hidden_states, self.config.sub_network, halting)
        output = halting.output.view(batch_size, self.config.num_prefix_tokens, width)
        return self.layernorm(output), halting.token_depth.view(batch_size, num_tokens)


class AViTForImageClassification(AViTPreTrainedModel):
    """
    A-ViT with an image classification head on the halting-weighted class token (and a second head on the distillation
    token of distilled models). In evaluation mode the computation is sparse, in training mode dense.
    """

    _loss_function = staticmethod(classification_loss)  # behind `loss_function`, which users may set

    def __init__(self, config: AViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.avit = AViTModel(config)
        self.classifier = NestedLinear(config.hidden_size, config.num_labels)
        if config.use_distillation_token:
            self.distillation_classifier = NestedLinear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        halting_epsilon: float | None = None,
        max_depth: int | None = None,
        output_token_depth: bool | None = None,
        output_halting_losses: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AViTImageClassifierOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): images.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Class indices; float targets for regression and multi-label classification, as in Transformers.
            halting_epsilon (`float`, *optional*):
                ε for this call, instead of `config.halting_epsilon`: a greater one halts tokens earlier.
            max_depth (`int`, *optional*):
                Run at most this many layers; all tokens halt in the last of them.
            output_token_depth (`bool`, *optional*):
                Return each token's depth, which keeps images running until all their tokens have halted.
            output_halting_losses (`bool`, *optional*):
                Return `ponder_loss` and `prior_loss` in evaluation mode as well, which computes densely. In training
                mode without `labels`, say that the loss computed outside adds them, each times its weight in the
                configuration; else a warning asks for it, once.
            interpolate_pos_encoding (`bool`, *optional*):
                Accept images of another size than `config.image_size`.

        Raises:
            ValueError: for arguments that do not fit the model.
            TypeError: for arguments that neither the model nor Transformers knows.
        """
        check_arguments(self, kwargs)
        if labels is None and not output_halting_losses:
            warn_of_outside_loss(self, OUTSIDE_LOSS)
        with_halting_losses = self.training or bool(output_halting_losses)
        recorded = wants_recordings(self.config, kwargs)
        dense = None
        if with_halting_losses or recorded:
            dense = self.avit(
                pixel_values,
                halting_epsilon=halting_epsilon,
                max_depth=max_depth,
                interpolate_pos_encoding=interpolate_pos_encoding,
                **kwargs,
            )
            prefix, token_depth = dense.last_hidden_state[:, : self.config.num_prefix_tokens], dense.token_depth
        else:
            prefix, token_depth = self.avit.run_sparse(
                pixel_values, halting_epsilon, max_depth, bool(output_token_depth), interpolate_pos_encoding
            )
        depth = depth_until_answer(token_depth, self.config.num_prefix_tokens)
        outputs = AViTImageClassifierOutput(mean_depth=depth.float().mean(dim=1))
        if not self.training:
            _, num_layers = self.avit.resolve(halting_epsilon, max_depth)
            outputs.macs = sparse_macs(self.config, depth, num_layers) + self._fixed_macs(depth.shape[1])
        outputs.logits = self.classifier(prefix[:, 0])
        if self.config.use_distillation_token:
            outputs.cls_logits, outputs.distillation_logits = outputs.logits, self.distillation_classifier(prefix[:, 1])
            outputs.logits = (outputs.cls_logits + outputs.distillation_logits) / 2
        if output_token_depth:
            outputs.token_depth = token_depth
        if recorded:
            outputs.hidden_states, outputs.attentions = dense.hidden_states, dense.attentions
        if with_halting_losses:
            outputs.ponder_loss, outputs.prior_loss = halting_losses(dense.halting_scores, dense.ponder, self.config)
        if labels is not None:
            check_labels(labels, len(token_depth), self.config)
            add_loss(self, outputs, labels, **kwargs)
        outputs = in_declared_order(outputs)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()

    @classmethod
    def from_vit(cls, source, **config_overrides) -> "AViTForImageClassification":
        r"""
        Start from a trained plain ViT or DeiT. An A-ViT has exactly the same parameters.

        Args:
            source (`str`, `os.PathLike`, `ViTForImageClassification`, `DeiTForImageClassification` or
                `DeiTForImageClassificationWithTeacher`):
                A model, or the folder or Hub id of one. A DeiT has a distillation token, so the A-ViT is distilled;
                where it has one head only, both heads start with its weights.
            config_overrides:
                Further fields of [`AViTConfig`], such as `gate_center`. `num_labels` (or `id2label`) of another number
                than the source's gives a new classifier, freshly initialised.

        Raises:
            ValueError: if the source is not a ViT or DeiT classifier, or an override changes a field that its weights
                determine.
        """
        vit = load_classifier(source, ONE_OR_TWO_HEADS, config_overrides)
        model = cls(avit_config_from_vit(vit.config, **config_overrides))
        takes_classifier = import_vit(model, vit)
        if takes_classifier and model.config.use_distillation_token and not hasattr(vit, "distillation_classifier"):
            model.distillation_classifier.load_state_dict(model.classifier.state_dict())
        return model

    def _fixed_macs(self, num_tokens: int) -> int:
        """Multiply-accumulates that every image takes: patch embedding and heads."""
        config, embeddings = self.config, self.avit.embeddings
        patch = embeddings.num_channels * embeddings.patch_size[0] * embeddings.patch_size[1]
        num_prefix = config.num_prefix_tokens
        return config.hidden_size * (patch * (num_tokens - num_prefix) + config.num_labels * num_prefix)


__all__ = ["AViTForImageClassification", "AViTModel", "AViTPreTrainedModel"]
