"""PyTorch elastic ViT: one ViT with several sub-networks, of which each call runs those that it is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .configuration_checks import check_integer
from .configuration_elastic_vit import ElasticViTConfig
from .importance import sort_by_importance
from .module_arguments import check_arguments
from .module_recording import record, wants_recordings
from .nested_layers import NestedLayerNorm, NestedLinear
from .nested_projection import project
from .nested_vit import (
    NestedViTAttention,
    NestedViTEmbeddings,
    NestedViTLayer,
    NestedViTPreTrainedModel,
    build_layers,
    run_layers,
)
from .sub_networks import SubNetwork
from .task_classification import check_labels, classification_loss
from .tasks import loss_arguments, weights_of_stages
from .weights_from_vit import (
    PLAIN_VIT,
    SHARED_FIELDS,
    fields_from_vit,
    import_vit,
    load_classifier,
    override_fields,
    pairs_of_layers,
)


@dataclass
class ElasticImageClassifierOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor` of shape `(1,)`, *optional*, returned when `labels` are given):
            The mean of the losses of the sub-networks that ran; in training mode weighted by
            `sub_network_loss_weights`, scaled to keep their sum, and with `label_smoothing`.
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`):
            Of the sub-network that ran, of several the last.
        sub_network_logits (`tuple[torch.Tensor]`, *optional*, returned where `sub_network` is a list):
            Logits of each, in the order of the list.
        hidden_states (`tuple[torch.Tensor]`, *optional*, returned with `output_hidden_states=True`):
            The input of the first layer that runs, then the output of each layer, `(batch_size, tokens, width)`, of
            one sub-network after the other.
        attentions (`tuple[torch.Tensor]`, *optional*, returned with `output_attentions=True`):
            Attention probabilities `(batch_size, heads, tokens, tokens)` of each layer, likewise.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    sub_network_logits: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def resolve_network(
    config: ElasticViTConfig, sub_network: int | None, intermediate_size: int | Sequence[int] | None = None
) -> SubNetwork:
    """
    The sub-network of that number (the configuration's default where it is `None`), with other MLP widths where they
    are given.

    Raises:
        ValueError: if there is none, or the model has fewer MLP channels or another number of layers.
    """
    number = config.default_sub_network if sub_network is None else sub_network
    networks = config.networks
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(networks):
        raise ValueError(f"`sub_network` must be an integer from 0 to {len(networks) - 1}, got {number!r}.")
    if intermediate_size is None:
        return networks[number]
    network = replace(networks[number], intermediate_size=intermediate_size)
    network.check_fits(config, "The sub-network with these `intermediate_size`")
    return network


class ElasticViTPreTrainedModel(NestedViTPreTrainedModel):
    config: ElasticViTConfig
    base_model_prefix = "elastic_vit"
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_record_outputs = {"hidden_states": record(NestedViTLayer), "attentions": NestedViTAttention}


class ElasticViTModel(ElasticViTPreTrainedModel):
    """The bare model, without a classifier."""

    def __init__(self, config: ElasticViTConfig):
        super().__init__(config)
        config.validate()
        self.embeddings = NestedViTEmbeddings(config)
        self.layers = build_layers(config)
        self.layernorm = NestedLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        *,
        sub_network: int | None = None,
        intermediate_size: int | Sequence[int] | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): images.
            sub_network (`int`, *optional*): the sub-network to run, `config.default_sub_network` by default.
            intermediate_size (`int` or `list[int]`, *optional*): MLP channels instead of those of the sub-network, one
                number or one for each layer of the model (MatFormer's Mix'n'Match).
            interpolate_pos_encoding (`bool`, *optional*): accept images of another size than `config.image_size`.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: the tokens after the final LayerNorm,
            `(batch_size, tokens, width of the sub-network)`, and as `pooler_output` the class token.

        Raises:
            ValueError: for pixel values, `sub_network` or `intermediate_size` that do not fit the model.
            TypeError: for arguments that neither the model nor Transformers knows.
        """
        check_arguments(self, kwargs)
        network = resolve_network(self.config, sub_network, intermediate_size)
        tokens = self.run(pixel_values, network, interpolate_pos_encoding, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens[:, 0])

    def run(
        self,
        pixel_values: torch.Tensor,
        network: SubNetwork,
        interpolate_pos_encoding: bool | None = None,
        num_queries: int | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """The normalised tokens `(batch_size, tokens or num_queries, width)` of a sub-network."""
        self.embeddings.check(pixel_values, interpolate_pos_encoding)
        hidden_states = self.embeddings(pixel_values, 0, network.hidden_size)
        tokens, _ = run_layers(self.layers, hidden_states, network, num_queries=num_queries, **kwargs)
        return self.layernorm(tokens)


class ElasticViTForImageClassification(ElasticViTPreTrainedModel):
    """
    An elastic ViT with an image classification head on the class token: one for all sub-networks, or with
    `config.separate_classifiers` one for each.

    Example:

    ```python
    >>> model = ElasticViTForImageClassification(ElasticViTConfig.matformer(num_attention_heads=6, num_labels=10))
    >>> small = model(pixel_values, sub_network=0)
    >>> between = model(pixel_values, intermediate_size=[768] * 6 + [192] * 6)
    ```"""

    _loss_function = staticmethod(classification_loss)

    def __init__(self, config: ElasticViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.elastic_vit = ElasticViTModel(config)
        if config.separate_classifiers:
            widths = [network.hidden_size for network in config.networks]
            self.classifier = nn.ModuleList([NestedLinear(width, config.num_labels) for width in widths])
        else:
            self.classifier = NestedLinear(config.hidden_size, config.num_labels)
        self.post_init()

    def classifier_of(self, sub_network: int) -> NestedLinear:
        """The classifier that a sub-network uses."""
        return self.classifier[sub_network] if self.config.separate_classifiers else self.classifier

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        sub_network: int | Sequence[int] | None = None,
        intermediate_size: int | Sequence[int] | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ElasticImageClassifierOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): images.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): class indices, of which -100 is ignored;
                for regression and multi-label classification float targets, as of
                [`ThinkingViTForImageClassification`].
            sub_network (`int` or `list[int]`, *optional*): the sub-network to run, `config.default_sub_network` by
                default; of a list each, for training. No other is computed.
            intermediate_size (`int` or `list[int]`, *optional*): MLP channels instead of those of the sub-network, one
                number or one for each layer of the model (MatFormer's Mix'n'Match).
            interpolate_pos_encoding (`bool`, *optional*): accept images of another size than `config.image_size`.

        Returns:
            [`ElasticImageClassifierOutput`]

        Raises:
            ValueError: for pixel values, labels, `sub_network` or `intermediate_size` that do not fit the model.
            TypeError: for arguments that neither the model nor Transformers knows.
        """
        check_arguments(self, kwargs)
        is_list = isinstance(sub_network, Sequence)
        numbers = list(sub_network) if is_list else [sub_network]
        numbers = [self.config.default_sub_network if number is None else number for number in numbers]
        if not numbers:
            raise ValueError("`sub_network` must be a number or a non-empty list of numbers, got an empty list.")
        networks = [resolve_network(self.config, number, intermediate_size) for number in numbers]
        # Recorded outputs are of all tokens; else of the last layer only the class token is read.
        num_queries = None if wants_recordings(self.config, kwargs) else 1
        logits = []
        for number, network in zip(numbers, networks):
            tokens = self.elastic_vit.run(pixel_values, network, interpolate_pos_encoding, num_queries, **kwargs)
            logits.append(project(self.classifier_of(number), tokens[:, 0]))
        loss = None
        if labels is not None:
            check_labels(labels, len(pixel_values), self.config)
            arguments = loss_arguments(self, kwargs)
            weights = self.config.sub_network_loss_weights if self.training else None
            weights = weights_of_stages(weights, numbers, "sub_network_loss_weights")
            losses = [self.loss_function(labels, each, self.config, **arguments) for each in logits]
            loss = sum(weight * each for weight, each in zip(weights, losses))
        return ElasticImageClassifierOutput(loss, logits[-1], tuple(logits) if is_list else None)

    @classmethod
    def from_vit(
        cls,
        source,
        method: str | None = None,
        reorder: str | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **config_overrides,
    ) -> "ElasticViTForImageClassification":
        r"""
        Start from a trained plain ViT. It is the whole model, or where `num_attention_heads` is greater than the
        source's (HydraViT starts so), the leading heads and channels of it; a sub-network of its size gives its logits.

        Args:
            source (`str`, `os.PathLike` or `ViTForImageClassification`): a model, or the folder or Hub id of one.
            method (`str`, *optional*): `"hydravit"`, `"matformer"`, `"dynabert"` or `"sortednet"`, which chooses the
                sub-networks.
            reorder (`str`, *optional*): `"importance"` sorts heads and MLP channels by |gradient × parameter| on the
                given images, so that sub-networks have the most important ones; the whole model stays the same.
            pixel_values (`torch.Tensor` of shape `(images, num_channels, height, width)`, *optional*): these images.
            labels (`torch.LongTensor` of shape `(images,)`, *optional*): their class indices.
            config_overrides:
                Further fields of [`ElasticViTConfig`]. With `separate_classifiers`, each sub-network's is the leading
                columns of the source's.

        Raises:
            ValueError: if the source is no ViT classifier, there is no such method or order, `reorder` has no images
                or no classifier to measure by, or is of a model wider than the source, or an override changes what the
                source's weights fix.
        """
        if method is not None and method not in ("hydravit", "matformer", "dynabert", "sortednet"):
            raise ValueError(f"`method` must be hydravit, matformer, dynabert or sortednet, got {method!r}.")
        if reorder not in (None, "importance") or (
            reorder is None and (pixel_values is not None or labels is not None)
        ):
            raise ValueError(
                f"`reorder` must be None, or 'importance' with `pixel_values` and `labels`, got {reorder!r}."
            )
        vit = load_classifier(source, PLAIN_VIT, config_overrides)
        make_config = ElasticViTConfig if method is None else getattr(ElasticViTConfig, method)
        separate = config_overrides.pop("separate_classifiers", False)
        model = cls(make_config(**_fields_of_start(vit.config, config_overrides)))
        sizes = SubNetwork(vit.config.num_attention_heads, vit.config.hidden_size, vit.config.intermediate_size)
        if model.config.hidden_size != sizes.hidden_size:
            model.config.find_sub_network(sizes, "network of the source's size")
        takes_classifier = import_vit(model, vit)
        if reorder is not None:
            if not takes_classifier:
                raise ValueError("`reorder` measures importance by the source's classifier: keep its labels.")
            if model.config.hidden_size != vit.config.hidden_size:
                raise ValueError("`reorder` measures importance in the whole model, which here is not all trained.")
            sort_by_importance(model, pixel_values, labels)
        return _with_separate_classifiers(model) if separate else model

    @torch.no_grad()
    def extract_sub_network(self, sub_network: int | None = None) -> PreTrainedModel:
        r"""
        A stand-alone Transformers `ViTForImageClassification` with the weights, and the logits, of one sub-network.

        Raises:
            ValueError: if there is no such sub-network, or a plain ViT cannot be of its sizes: heads that do not fill
                the width (DynaBERT), or several MLP widths.
        """
        number = self.config.default_sub_network if sub_network is None else sub_network
        network = resolve_network(self.config, number)
        layers = list(network.layer_numbers(self.config.num_hidden_layers))
        mlp_widths = {network.at_layer(layer).intermediate_size for layer in layers}
        if network.attention_size != network.hidden_size or len(mlp_widths) > 1:
            raise ValueError(
                f"A plain ViT has `hidden_size` channels in its heads, and one MLP width: it cannot be of {network}. "
                "Save this model with `default_sub_network` instead."
            )
        network = network.at_layer(layers[0])  # one width
        fields = {name: getattr(self.config, name) for name in SHARED_FIELDS} | {"num_hidden_layers": len(layers)}
        sizes = {name: getattr(network, name) for name in ("num_attention_heads", "hidden_size", "intermediate_size")}
        vit = ViTForImageClassification(ViTConfig(**{**fields, **sizes})).to(device=self.device, dtype=self.dtype)
        classifier = f"classifier.{number}." if self.config.separate_classifiers else "classifier."
        for nested, parameter in pairs_of_layers(self, vit, layers, classifier):
            parameter.copy_(nested)
        return vit.train(self.training)


def _fields_of_start(vit: ViTConfig, overrides: dict) -> dict:
    """The fields of a model that starts from a plain ViT, with the same or more heads of the same size."""
    overrides = dict(overrides)
    heads = overrides.pop("num_attention_heads", vit.num_attention_heads)
    check_integer("num_attention_heads", heads, minimum=vit.num_attention_heads)
    fields = override_fields(fields_from_vit(vit, overrides), overrides)
    for name in ("hidden_size", "intermediate_size"):
        fields[name] = fields[name] * heads // vit.num_attention_heads
    return {**fields, "num_attention_heads": heads}


@torch.no_grad()
def _with_separate_classifiers(model: ElasticViTForImageClassification) -> ElasticViTForImageClassification:
    """The same model, in place, with a copy of its classifier's leading columns for each sub-network."""
    shared, config = model.classifier, model.config
    config.separate_classifiers = True
    separate = [NestedLinear(network.hidden_size, config.num_labels) for network in config.networks]
    model.classifier = nn.ModuleList(separate).to(shared.weight)
    for classifier in separate:
        classifier.weight.copy_(shared.weight[:, : classifier.in_features])
        classifier.bias.copy_(shared.bias)
    model.classifier.train(model.training)
    return model


__all__ = [
    "ElasticImageClassifierOutput",
    "ElasticViTForImageClassification",
    "ElasticViTModel",
    "ElasticViTPreTrainedModel",
]
