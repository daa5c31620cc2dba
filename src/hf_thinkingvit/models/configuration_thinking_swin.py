"""ThinkingSwin configuration."""

from itertools import pairwise
from typing import ClassVar, NamedTuple

from .configuration_backbone import StagedBackboneConfig
from .configuration_checks import as_pair, check_backbone_fields, check_boolean, check_integer, check_number
from .sub_networks import SubNetwork


QKV_SLICINGS = ("leading_rows", "each_projection")


class SwinRound(NamedTuple):
    """
    One thinking round: for each hierarchical layer the leading heads, channels and MLP channels that it uses. All
    blocks of a layer run, and a head has the same width in every round.
    """

    layers: tuple[SubNetwork, ...]

    @property
    def num_attention_heads(self) -> tuple[int, ...]:
        return tuple(layer.num_attention_heads for layer in self.layers)

    @property
    def hidden_size(self) -> int:
        """Channels that the classifier reads: those of the last layer."""
        return self.layers[-1].hidden_size


class ThinkingSwinConfig(StagedBackboneConfig):
    r"""
    Configuration of a ThinkingSwin (arXiv 2507.10800, the paper's Swin variant): a nested Swin Transformer
    (arXiv 2103.14030) that answers with a few leading attention heads first, and runs the whole pyramid again with more
    heads where it is not certain. The defaults are the published Swin-S model.

    Swin and ThinkingViT both speak of stages. Here a *stage* is a round of thinking, as in ThinkingViT, and a stage of
    Swin's hierarchy is a *layer*, which consists of blocks.

    Args:
        head_rounds (`list[list[int]]`, *optional*, defaults to `[[3, 3, 6, 12], [3, 6, 12, 24]]`):
            For each round, the attention heads of each layer. Any number of rounds, non-decreasing in every layer;
            one round is a plain Swin Transformer.
        qkv_slicing (`str`, *optional*, defaults to `"leading_rows"`):
            Which rows of the fused query-key-value matrix (3 · channels) a round of n channels uses: `"leading_rows"`
            the first 3n, cut into queries, keys and values, as the official weights require; or
            `"each_projection"` the first n of each third, so that the heads of a plain Swin are nested as they are. At
            full width they are the same.
        image_size (`int` or `tuple[int, int]`, *optional*, defaults to 224):
            Input size in pixels, (height, width) where not square. Other sizes are taken too; with
            `use_absolute_embeddings`, if `interpolate_pos_encoding=True` is passed.
        patch_size (`int` or `tuple[int, int]`, *optional*, defaults to 4):
            Patch size in pixels.
        num_channels (`int`, *optional*, defaults to 3):
            Input channels.
        embed_dim (`int`, *optional*, defaults to 96):
            Full width of the first layer; each further layer is twice as wide as the one before.
        depths (`list[int]`, *optional*, defaults to `[2, 2, 18, 2]`):
            Blocks of each layer.
        num_heads (`list[int]`, *optional*, defaults to `[3, 6, 12, 24]`):
            Attention heads of each layer at full width.
        window_size (`int`, *optional*, defaults to 7):
            Side of the attention windows, in patches. If the grid is not a multiple of it, windows are padded.
        mlp_ratio (`float`, *optional*, defaults to 4.0):
            MLP width over layer width.
        qkv_bias (`bool`, *optional*, defaults to `True`):
            Whether queries, keys and values have biases.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout after the embeddings, attention and MLP.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout of attention probabilities.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth: the last block's rate; the first block's is 0, those between rise linearly.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the MLP (`"gelu"` is the exact, erf form).
        use_absolute_embeddings (`bool`, *optional*, defaults to `False`):
            Whether learned position embeddings are added to the patches.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of freshly initialised weights.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            ε of the blocks' norms and the final one; the norms of patch embedding and patch merging always have 1e-5,
            as in Transformers' Swin.
        threshold, exit_criterion, exit_at_threshold, entropy_top_k, stage_loss_weights, label_smoothing (*optional*):
            The exit and loss fields of [`StagedConfig`].
        out_stage, out_features, out_indices (*optional*):
            Of a backbone ([`ThinkingSwinBackbone`]), see [`StagedBackboneConfig`].

    Raises:
        ValueError: if a value is invalid; the message names the field.

    Example:

    ```python
    >>> from hf_thinkingvit import ThinkingSwinConfig, ThinkingSwinForImageClassification

    >>> config = ThinkingSwinConfig(head_rounds=[[3, 3, 6, 12], [3, 6, 12, 24]], threshold=0.9)
    >>> model = ThinkingSwinForImageClassification(config)
    ```"""

    model_type = "thinking_swin"
    remote_code: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_thinking_swin.ThinkingSwinConfig",
        "AutoModel": "modeling_thinking_swin.ThinkingSwinModel",
        "AutoModelForImageClassification": "modeling_thinking_swin.ThinkingSwinForImageClassification",
        "AutoBackbone": "modeling_thinking_swin_backbone.ThinkingSwinBackbone",
    }

    head_rounds: list[list[int]] | tuple[tuple[int, ...], ...] = ((3, 3, 6, 12), (3, 6, 12, 24))
    qkv_slicing: str = "leading_rows"
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 4
    num_channels: int = 3
    embed_dim: int = 96
    depths: list[int] | tuple[int, ...] = (2, 2, 18, 2)
    num_heads: list[int] | tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float | int = 4.0
    qkv_bias: bool = True
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    hidden_act: str = "gelu"
    use_absolute_embeddings: bool = False
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs):
        self._check_hierarchy()
        self.depths, self.num_heads = list(self.depths), list(self.num_heads)
        self.head_rounds = [list(heads) for heads in self.head_rounds]
        # These follow from other fields, so a value in a file or from a caller is only checked.
        for name in ("hidden_size", "num_hidden_layers"):
            given = kwargs.pop(name, None)
            if given is not None and given != getattr(self, name):
                raise ValueError(f"`{name}` follows from `embed_dim` and `depths`: {getattr(self, name)}, got {given}.")
        kwargs.setdefault("auto_map", dict(self.remote_code))
        super().__post_init__(**kwargs)
        self.validate()

    @property
    def num_layers(self) -> int:
        """Layers of the hierarchy."""
        return len(self.depths)

    @property
    def num_hidden_layers(self) -> int:
        """Transformer blocks, over all layers."""
        return sum(self.depths)

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """Full width of each layer."""
        return tuple(self.embed_dim * 2**layer for layer in range(self.num_layers))

    @property
    def hidden_size(self) -> int:
        """Full width of the last layer."""
        return self.hidden_sizes[-1]

    @property
    def downsampling(self) -> int:
        """Patches along each side that one position of the last layer covers."""
        return 2 ** (self.num_layers - 1)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """(rows, columns) of patches at `image_size`; images are padded to whole patches."""
        return self.grid_of(as_pair(self.image_size))

    def grid_of(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of patches of an image of (height, width) pixels."""
        rows, columns = (-(-side // patch) for side, patch in zip(image_size, as_pair(self.patch_size)))
        return rows, columns

    @property
    def num_stages(self) -> int:
        return len(self.head_rounds)

    @property
    def stages(self) -> tuple[SwinRound, ...]:
        return tuple(
            SwinRound(
                tuple(
                    SubNetwork(heads, width, int(self.mlp_ratio * width))
                    for heads, width in (
                        (heads, full // all_heads * heads)
                        for heads, full, all_heads in zip(round_heads, self.hidden_sizes, self.num_heads)
                    )
                )
            )
            for round_heads in self.head_rounds
        )

    @property
    def num_recorded_layers(self) -> int:
        """Layer outputs in `hidden_states` when every round runs."""
        return self.num_stages * self.num_layers

    def validate(self) -> None:
        self._check_hierarchy()
        super().validate()
        check_integer("window_size", self.window_size, minimum=1)
        check_number("mlp_ratio", self.mlp_ratio)
        check_backbone_fields(self)
        width = self.embed_dim // self.num_heads[0] * self.head_rounds[0][0]
        if int(self.mlp_ratio * width) < 1:
            raise ValueError(f"`mlp_ratio` ({self.mlp_ratio}) leaves no MLP channel for a width of {width}: raise it.")
        check_boolean("use_absolute_embeddings", self.use_absolute_embeddings)
        if self.qkv_slicing not in QKV_SLICINGS:
            raise ValueError(f"`qkv_slicing` must be one of {list(QKV_SLICINGS)}, got {self.qkv_slicing!r}.")

    def _check_hierarchy(self) -> None:
        """`depths`, `num_heads`, `embed_dim` and `head_rounds`, each by itself and together."""
        check_integer("embed_dim", self.embed_dim, minimum=1)
        for name in ("depths", "num_heads"):
            _check_counts(name, getattr(self, name))
        num_layers = len(self.depths)
        if len(self.num_heads) != num_layers:
            raise ValueError(
                f"`num_heads` must have one entry per layer, as many as `depths` ({num_layers}), got {self.num_heads}."
            )
        for layer, heads in enumerate(self.num_heads):
            if self.embed_dim * 2**layer % heads:
                raise ValueError(
                    f"`embed_dim` ({self.embed_dim}) gives layer {layer} {self.embed_dim * 2**layer} channels, which "
                    f"its {heads} heads (`num_heads`) cannot share."
                )
        rounds = self.head_rounds
        if not isinstance(rounds, (list, tuple)) or not rounds:
            raise ValueError(f"`head_rounds` must be a non-empty list with a list of heads per round, got {rounds!r}.")
        for heads in rounds:
            _check_counts("head_rounds", heads)
            if len(heads) != num_layers:
                raise ValueError(
                    f"`head_rounds` must have {num_layers} heads per round, one for each of `depths`, got {heads}."
                )
            if any(some > all_of_them for some, all_of_them in zip(heads, self.num_heads)):
                raise ValueError(
                    f"`head_rounds` asks for the heads {heads}, but the model has `num_heads` = {self.num_heads}."
                )
        for before, after in pairwise(rounds):
            if any(few > more for few, more in zip(before, after)):
                raise ValueError(
                    f"`head_rounds` must not decrease in any layer: each round contains the one before, got "
                    f"{[list(heads) for heads in rounds]}."
                )


def _check_counts(name: str, counts) -> None:
    if not isinstance(counts, (list, tuple)) or not counts:
        raise ValueError(f"`{name}` must be made of non-empty lists of integers, one per layer, got {counts!r}.")
    for count in counts:
        check_integer(name, count, minimum=1)


__all__ = ["ThinkingSwinConfig"]
