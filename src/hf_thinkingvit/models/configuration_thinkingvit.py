"""ThinkingViT configuration."""

from typing import ClassVar

from .configuration_backbone import StagedBackboneConfig
from .configuration_checks import check_boolean, check_choice, check_integer, check_number
from .configuration_nested_vit import NestedViTConfig
from .configuration_pruning import DEFAULT_KEEP_RATE, check_pruning_fields
from .exit_criteria import EXIT_CRITERIA
from .sub_networks import SubNetwork


class ThinkingViTConfig(StagedBackboneConfig, NestedViTConfig):
    r"""
    Configuration of a ThinkingViT (arXiv 2507.10800): a nested Vision Transformer that answers with a few leading
    heads first, and thinks again with more heads where it is not certain. The defaults are the published 3 → 6 model:
    DeiT-Tiny first, then DeiT-Small.

    Args:
        thinking_stages (`list[int]`, *optional*, defaults to `[3, 6]`):
            Attention heads of each stage, non-decreasing, any number of stages. `[6]` is a plain ViT, `[3, 3]` iterates
            over the same sub-network, `[2, 3, 6]` has three stages. Every stage runs all layers.
        use_distillation_token (`bool`, *optional*, defaults to `False`):
            Whether a DeiT distillation token follows the class token in the sequence.
        decoder_type (`str`, *optional*):
            The decoder of a semantic segmentation model: `"linear"`, or `"mask_transformer"` (Segmenter, arXiv
            2105.05633). None for the other tasks. With a decoder, `exit_criterion` is `"mean_pixel_entropy"` (of the
            logits resized to pixels, as the official code computes it, averaged over pixels; by default, with τ = 0.5)
            or `"mean_grid_entropy"` (averaged over patches; it has no default τ). Both are full-softmax entropies.
        decoder_num_hidden_layers (`int`, *optional*, defaults to 2):
            Layers of the mask transformer.
        decoder_hidden_size (`int`, *optional*):
            Width of the mask transformer, by default `hidden_size`.
        decoder_num_attention_heads (`int`, *optional*):
            Heads of the mask transformer, by default of the size of the backbone's.
        decoder_intermediate_size (`int`, *optional*):
            MLP width of the mask transformer, by default `4 * decoder_hidden_size`.
        decoder_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout in the mask transformer, of attention probabilities too. Segmenter's recipe has 0.1.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255):
            Label of the pixels that do not count in the segmentation loss.
        pruning_layers (`list[int]`, *optional*):
            Layers, counted from 0, before which the last stage removes the patches that a small predictor scores lowest
            (DynamicViT, arXiv 2106.02034: `[3, 6, 9]`). None by default. With `thinking_stages=[6]` this is DynamicViT
            itself. In training mode the predictors' decisions are sampled, and patches are left out
            of the attention instead of removed.
        pruning_keep_rate (`float` or `list[float]`, *optional*):
            Share of the image's patches that remain: one number ρ, for ρ, ρ², ρ³ and so on, or one share per pruning
            layer. By default 0.7 where there are `pruning_layers`.
        pruning_ratio_loss_weight (`float`, *optional*, defaults to 2.0):
            Weight in the training loss of how far the shares that the predictors keep are from `pruning_keep_rate`
            (official: 2 for DeiT-S, 5 for DeiT-B).
        threshold, exit_criterion, exit_at_threshold, entropy_top_k, stage_loss_weights, label_smoothing (*optional*):
            The exit and loss fields of [`StagedConfig`].
        out_stage, out_features, out_indices (*optional*):
            Of a backbone ([`ThinkingViTBackbone`]), see [`StagedBackboneConfig`].
        kwargs:
            The ViT fields of [`NestedViTConfig`], at full width: `hidden_size` (by default 64 channels a head),
            `num_hidden_layers` (12), `num_attention_heads` (by default those of the widest stage), `intermediate_size`
            (by default `4 * hidden_size`; each stage uses the share that its heads have), `hidden_act`,
            `hidden_dropout_prob`, `attention_probs_dropout_prob`, `drop_path_rate`, `initializer_range`,
            `layer_norm_eps` (1e-6), `image_size` (224), `patch_size` (16), `num_channels` (3), `qkv_bias`.

    Raises:
        ValueError: if a value is invalid; the message names the field.

    Example:

    ```python
    >>> from hf_thinkingvit import ThinkingViTConfig, ThinkingViTForImageClassification

    >>> config = ThinkingViTConfig(thinking_stages=[2, 3, 6], threshold=[0.9, 0.5])
    >>> model = ThinkingViTForImageClassification(config)
    ```"""

    model_type = "thinkingvit"
    remote_code: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_thinkingvit.ThinkingViTConfig",
        "AutoModel": "modeling_thinkingvit.ThinkingViTModel",
        "AutoModelForImageClassification": "modeling_thinkingvit.ThinkingViTForImageClassification",
        "AutoBackbone": "modeling_thinkingvit_backbone.ThinkingViTBackbone",
    }
    # With a decoder, this as well.
    remote_code_of_decoders: ClassVar[dict[str, str]] = {
        "AutoModelForSemanticSegmentation": "modeling_thinkingvit_segmentation.ThinkingViTForSemanticSegmentation",
    }

    thinking_stages: list[int] | tuple[int, ...] = (3, 6)
    use_distillation_token: bool = False
    decoder_type: str | None = None
    decoder_num_hidden_layers: int = 2
    decoder_hidden_size: int | None = None
    decoder_num_attention_heads: int | None = None
    decoder_intermediate_size: int | None = None
    decoder_dropout_prob: float | int = 0.0
    semantic_loss_ignore_index: int = 255
    pruning_layers: list[int] | tuple[int, ...] | None = None
    pruning_keep_rate: float | int | list[float] | tuple[float, ...] | None = None

    pruning_ratio_loss_weight: float | int = 2.0

    def __post_init__(self, **kwargs):
        self._check_thinking_stages()
        self.thinking_stages = list(self.thinking_stages)
        if self.num_attention_heads is None:
            self.num_attention_heads = max(self.thinking_stages)
        if self.decoder_type is not None:
            kwargs.setdefault("auto_map", {**self.remote_code, **self.remote_code_of_decoders})
            if self.exit_criterion is None:
                self.exit_criterion = "mean_pixel_entropy"
        if self.pruning_layers and self.pruning_keep_rate is None:
            self.pruning_keep_rate = DEFAULT_KEEP_RATE
        super().__post_init__(**kwargs)

    @property
    def num_stages(self) -> int:
        return len(self.thinking_stages)

    @property
    def stages(self) -> tuple[SubNetwork, ...]:
        return tuple(
            SubNetwork(heads, heads * self.head_dim, heads * self.intermediate_size // self.num_attention_heads)
            for heads in self.thinking_stages
        )

    @property
    def num_prefix_tokens(self) -> int:
        return 2 if self.use_distillation_token else 1

    @property
    def num_recorded_layers(self) -> int:
        """Layer outputs in `hidden_states` when every stage runs."""
        return self.num_stages * self.num_hidden_layers

    def validate(self) -> None:
        self._check_thinking_stages()
        super().validate()
        check_boolean("use_distillation_token", self.use_distillation_token)
        if max(self.thinking_stages) > self.num_attention_heads:
            raise ValueError(
                f"`thinking_stages` asks for {max(self.thinking_stages)} heads, but the model has "
                f"`num_attention_heads` = {self.num_attention_heads}."
            )
        for heads in self.thinking_stages:
            if heads * self.intermediate_size % self.num_attention_heads:
                raise ValueError(
                    f"`intermediate_size` ({self.intermediate_size}) cannot be shared out: a stage of {heads} of "
                    f"{self.num_attention_heads} heads would get a fraction of a channel."
                )
        for index, sub_network in enumerate(self.stages):
            sub_network.check_fits(self, f"Stage {index} of `thinking_stages`")
        check_pruning_fields(self, self.stages[-1])

        if self.decoder_type is not None:
            self._check_decoder()

    @property
    def decoder_sizes(self) -> SubNetwork:
        """The sizes of the mask transformer, with defaults where fields are `None`."""
        hidden_size = self.hidden_size if self.decoder_hidden_size is None else self.decoder_hidden_size
        heads, intermediate_size = self.decoder_num_attention_heads, self.decoder_intermediate_size
        heads = max(hidden_size // self.head_dim, 1) if heads is None else heads
        return SubNetwork(heads, hidden_size, 4 * hidden_size if intermediate_size is None else intermediate_size)

    def _check_decoder(self) -> None:
        check_choice("decoder_type", self.decoder_type, ("linear", "mask_transformer"))
        if not EXIT_CRITERIA[self.exit_criterion].is_dense:
            names = sorted(name for name, criterion in EXIT_CRITERIA.items() if criterion.is_dense)
            raise ValueError(
                f"`exit_criterion` = {self.exit_criterion!r} judges one answer for each image, but a model with a "
                f"decoder answers for each patch: set `exit_criterion` to one of {names}, with its `threshold`. "
                "`ThinkingViTForSemanticSegmentation.from_thinkingvit` starts from a classifier."
            )
        if isinstance(self.semantic_loss_ignore_index, bool) or not isinstance(self.semantic_loss_ignore_index, int):
            raise ValueError(
                f"`semantic_loss_ignore_index` must be an integer, got {self.semantic_loss_ignore_index!r}."
            )
        if 0 <= self.semantic_loss_ignore_index < self.num_labels:
            raise ValueError(
                f"`semantic_loss_ignore_index` ({self.semantic_loss_ignore_index}) is one of the {self.num_labels} "
                "classes (`num_labels`), whose pixels would never count: set it to a number that is no class, such as "
                "-100, and write that number into the masks where pixels do not count."
            )
        check_integer("decoder_num_hidden_layers", self.decoder_num_hidden_layers, minimum=1)
        for name in ("decoder_hidden_size", "decoder_num_attention_heads", "decoder_intermediate_size"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), minimum=1)
        check_number("decoder_dropout_prob", self.decoder_dropout_prob, maximum=1.0)
        sizes = self.decoder_sizes
        if sizes.hidden_size % sizes.num_attention_heads:
            raise ValueError(
                f"`decoder_hidden_size` ({sizes.hidden_size}) must be divisible by `decoder_num_attention_heads` "
                f"({sizes.num_attention_heads})."
            )

    def _check_thinking_stages(self) -> None:
        stages = self.thinking_stages
        if not isinstance(stages, (list, tuple)) or not stages:
            raise ValueError(f"`thinking_stages` must be a non-empty list of head counts, got {stages!r}.")
        for heads in stages:
            check_integer("thinking_stages", heads, minimum=1)
        if list(stages) != sorted(stages):
            raise ValueError(
                f"`thinking_stages` must not decrease: each stage contains the one before, got {list(stages)}."
            )


__all__ = ["ThinkingViTConfig"]
