"""ThinkingViT configuration."""

from typing import ClassVar

from .configuration_checks import check_boolean, check_integer
from .configuration_nested_vit import NestedViTConfig
from .configuration_staged import StagedConfig
from .sub_networks import SubNetwork


class ThinkingViTConfig(StagedConfig, NestedViTConfig):
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
        threshold, exit_criterion, entropy_top_k, stage_loss_weights, label_smoothing (*optional*):
            The exit and loss fields of [`StagedConfig`].
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
    }

    thinking_stages: list[int] | tuple[int, ...] = (3, 6)
    use_distillation_token: bool = False

    def __post_init__(self, **kwargs):
        self._check_thinking_stages()
        self.thinking_stages = list(self.thinking_stages)
        if self.num_attention_heads is None:
            self.num_attention_heads = max(self.thinking_stages)
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
