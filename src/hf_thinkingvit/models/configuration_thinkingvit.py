"""ThinkingViT configuration."""

from typing import NamedTuple

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .config_checks import as_pair, check_integer, check_number, check_size
from .exit_criteria import check_exit_fields


AUTO_MAP = {
    "AutoConfig": "configuration_thinkingvit.ThinkingViTConfig",
    "AutoModel": "modeling_thinkingvit.ThinkingViTModel",
    "AutoModelForImageClassification": "modeling_thinkingvit.ThinkingViTForImageClassification",
}


class Stage(NamedTuple):
    """One sub-network: how many leading heads and channels of every layer it uses."""

    num_attention_heads: int
    hidden_size: int
    intermediate_size: int


class ThinkingViTConfig(PreTrainedConfig):
    r"""
    Configuration of a ThinkingViT (arXiv 2507.10800): a nested Vision Transformer that answers with a few leading
    heads first, and thinks again with more heads where it is not certain. The defaults are the published 3 → 6 model:
    DeiT-Tiny first, then DeiT-Small.

    Args:
        thinking_stages (`list[int]`, *optional*, defaults to `[3, 6]`):
            Attention heads of each stage, non-decreasing, any number of stages. `[6]` is a plain ViT, `[3, 3]` iterates
            over the same sub-network, `[2, 3, 6]` has three stages.
        threshold (`float` or `list[float]`, *optional*, defaults to 0.5):
            τ: an image exits after a stage iff its entropy is below τ (strictly; for `max_probability` and `margin`:
            iff they are above it). One number, or one per exit, that is per stage but the last, which always answers.
            For the entropies, 0 never exits early.
        exit_criterion (`str`, *optional*, defaults to `"topk_entropy"`):
            `"topk_entropy"` (the official code's, on which published thresholds are), `"entropy"` (full softmax, the
            paper's formula), `"max_probability"` or `"margin"` (largest minus second largest probability).
        entropy_top_k (`int`, *optional*, defaults to 10):
            How many of the largest probabilities `"topk_entropy"` keeps.
        stage_loss_weights (`list[float]`, *optional*):
            Weight of each stage's cross-entropy in the training loss. Equal weights that sum to 1 by default.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth: the last layer's rate; the first layer's is 0, those between rise linearly.
        hidden_size (`int`, *optional*):
            Full width D. By default 64 channels a head, as in DeiT.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Layers; every stage runs all of them.
        num_attention_heads (`int`, *optional*):
            Heads at full width. By default those of the widest stage.
        intermediate_size (`int`, *optional*):
            MLP width at full width, by default `4 * hidden_size`; each stage uses the share that its heads have.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the MLP (`"gelu"` is the exact, erf form).
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout after the embeddings, attention and MLP.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout of attention probabilities.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of freshly initialised weights.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            The official value; Transformers' ViT has 1e-12.
        image_size (`int` or `tuple[int, int]`, *optional*, defaults to 224):
            Input size in pixels, (height, width) where not square.
        patch_size (`int` or `tuple[int, int]`, *optional*, defaults to 16):
            Patch size in pixels.
        num_channels (`int`, *optional*, defaults to 3):
            Input channels.
        qkv_bias (`bool`, *optional*, defaults to `True`):
            Whether queries, keys and values have biases.
        use_distillation_token (`bool`, *optional*, defaults to `False`):
            Whether a DeiT distillation token follows the class token in the sequence.

    Raises:
        ValueError: for values that cannot work; the message names the field.

    Example:

    ```python
    >>> from hf_thinkingvit import ThinkingViTConfig, ThinkingViTForImageClassification

    >>> config = ThinkingViTConfig(thinking_stages=[2, 3, 6], threshold=[0.9, 0.5])
    >>> model = ThinkingViTForImageClassification(config)
    ```"""

    model_type = "thinkingvit"
    # So that `Trainer` hands `compute_metrics` the logits alone, as for any classifier.
    keys_to_ignore_at_inference = ["exit_stage", "entropy", "stage_logits", "hidden_states", "attentions"]

    thinking_stages: list[int] | tuple[int, ...] = (3, 6)
    threshold: float | int | list[float] | tuple[float, ...] = 0.5
    exit_criterion: str = "topk_entropy"
    entropy_top_k: int = 10
    stage_loss_weights: list[float] | tuple[float, ...] | None = None
    drop_path_rate: float | int = 0.0
    hidden_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    use_distillation_token: bool = False

    def __post_init__(self, **kwargs):
        self._check_thinking_stages()
        self.thinking_stages = list(self.thinking_stages)
        if self.num_attention_heads is None:
            self.num_attention_heads = max(self.thinking_stages)
        if self.hidden_size is None:
            self.hidden_size = 64 * self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        # Saving a model names the code of its own class only; the folder serves the bare model too.
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)
        self.validate()

    @property
    def num_stages(self) -> int:
        return len(self.thinking_stages)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The sub-networks, in the order in which they think."""
        return tuple(
            Stage(heads, heads * self.head_dim, heads * self.intermediate_size // self.num_attention_heads)
            for heads in self.thinking_stages
        )

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: the class token, and the distillation token where there is one."""
        return 2 if self.use_distillation_token else 1

    @property
    def patch_grid(self) -> tuple[int, int]:
        """(rows, columns) of patches at `image_size`."""
        (height, width), (patch_height, patch_width) = as_pair(self.image_size), as_pair(self.patch_size)
        return height // patch_height, width // patch_width

    @property
    def num_recorded_layers(self) -> int:
        """Layer outputs in `hidden_states` when every stage runs."""
        return self.num_stages * self.num_hidden_layers

    def validate(self) -> None:
        """Refuse values that cannot work, also those set after construction. Called by the models and on saving."""
        super().validate()
        self._check_thinking_stages()
        check_integer("num_attention_heads", self.num_attention_heads, minimum=1)
        if max(self.thinking_stages) > self.num_attention_heads:
            raise ValueError(
                f"`thinking_stages` asks for {max(self.thinking_stages)} heads, but the model has "
                f"`num_attention_heads` = {self.num_attention_heads}."
            )
        for name in ("hidden_size", "intermediate_size"):
            check_integer(name, getattr(self, name), minimum=1)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be divisible by `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        for heads in self.thinking_stages:
            if heads * self.intermediate_size % self.num_attention_heads:
                raise ValueError(
                    f"`intermediate_size` ({self.intermediate_size}) cannot be shared out: a stage of {heads} of "
                    f"{self.num_attention_heads} heads would get a fraction of a channel."
                )
        for name in ("num_hidden_layers", "num_channels"):
            check_integer(name, getattr(self, name), minimum=1)
        for name in ("image_size", "patch_size"):
            check_size(name, getattr(self, name))
        if min(self.patch_grid) < 1:
            raise ValueError(f"`image_size` ({self.image_size}) is smaller than `patch_size` ({self.patch_size}).")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            check_number(name, getattr(self, name), maximum=1.0)
        check_number("layer_norm_eps", self.layer_norm_eps)
        check_number("initializer_range", self.initializer_range)
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of {sorted(ACT2FN)}, got {self.hidden_act!r}.")
        check_exit_fields(self)

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


__all__ = ["Stage", "ThinkingViTConfig"]
