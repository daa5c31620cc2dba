"""Sizes that the configurations of all plain-ViT families share, and their checks."""

from typing import ClassVar

from transformers import PreTrainedConfig

from .configuration_checks import OwnLayoutMixin, as_pair, check_backbone_fields, check_choice, check_integer


class NestedViTConfig(OwnLayoutMixin, PreTrainedConfig):
    r"""
    The fields of a ViT. Subclasses add their own, and define `num_prefix_tokens` and `remote_code`.

    Args:
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth: the last layer's rate; the first layer's is 0, those between rise linearly.
        hidden_size (`int`, *optional*):
            Full width D. By default 64 channels a head, as in DeiT.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Layers.
        num_attention_heads (`int`, *optional*):
            Heads at full width.
        intermediate_size (`int`, *optional*):
            MLP width at full width, by default `4 * hidden_size`.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the MLP (`"gelu"` is the exact, erf form).
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout after the embeddings, attention and MLP.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout of attention probabilities.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of freshly initialised weights.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            ε of the layer norms. The default is the official value; Transformers' ViT has 1e-12.
        image_size (`int` or `tuple[int, int]`, *optional*, defaults to 224):
            Input size in pixels, (height, width) where not square.
        patch_size (`int` or `tuple[int, int]`, *optional*, defaults to 16):
            Patch size in pixels.
        num_channels (`int`, *optional*, defaults to 3):
            Input channels.
        qkv_bias (`bool`, *optional*, defaults to `True`):
            Whether queries, keys and values have biases.
        position_interpolation (`str`, *optional*, defaults to `"bicubic"`):
            How position embeddings are resized for images of another size: `"bicubic"`, or `"bilinear"` as in the
            official segmentation models.
    """

    is_staged: ClassVar[bool] = False
    # The `auto_map` of saved folders. Transformers would add only the class of the saved model, not the other heads.
    remote_code: ClassVar[dict[str, str]] = {}

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
    position_interpolation: str = "bicubic"

    def __post_init__(self, **kwargs):
        check_integer("num_attention_heads", self.num_attention_heads, minimum=1)
        if self.hidden_size is None:
            self.hidden_size = 64 * self.num_attention_heads
        check_integer("hidden_size", self.hidden_size, minimum=1)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        kwargs.setdefault("auto_map", dict(self.remote_code))
        super().__post_init__(**kwargs)
        self.validate()

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: 1, the class token, or 2, with DeiT's distillation token."""
        return 1

    @property
    def patch_grid(self) -> tuple[int, int]:
        """(rows, columns) of patches at `image_size`."""
        (height, width), (patch_height, patch_width) = as_pair(self.image_size), as_pair(self.patch_size)
        return height // patch_height, width // patch_width

    def validate(self) -> None:
        """Refuse invalid values, also those set after construction. Called by the models and on saving."""
        super().validate()
        for name in ("num_attention_heads", "hidden_size", "intermediate_size", "num_hidden_layers"):
            check_integer(name, getattr(self, name), minimum=1)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be divisible by `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        check_backbone_fields(self)
        check_choice("position_interpolation", self.position_interpolation, ("bicubic", "bilinear"))


__all__ = ["NestedViTConfig"]
