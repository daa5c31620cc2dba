"""Early-exit ViT configuration."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

from .configuration_checks import check_integer, check_number, configured_problem_type
from .configuration_nested_vit import NestedViTConfig
from .configuration_staged import StagedConfig
from .staged_arguments import resolve_thresholds
from .sub_networks import SubNetwork


EXIT_HEADS = ("shared", "linear", "transformer_layer")
HALTING = ("act", "pondernet")
# τ of the criteria that read learned halting scores, where none is given: ACT's 1 - ε for ε = 0.01, PonderNet's own
# sampling, and the median of its distribution.
HALTING_THRESHOLDS = {"act": 0.99, "pondernet": 1.0, "q_exit": 0.5}
# Published methods: class methods of the configuration.
METHODS = ("branchynet", "vit_ee", "fastbert", "pabee", "act", "pondernet")


class EarlyExitViTConfig(StagedConfig, NestedViTConfig):
    r"""
    Configuration of a Vision Transformer of one width that may answer after some of its layers. The class methods
    `branchynet`, `vit_ee`, `fastbert`, `pabee`, `act` and `pondernet` give the published methods, for any depth. The
    default is a DeiT-Tiny with its own head after every layer.

    Args:
        exit_layers (`list[int]`, *optional*):
            After how many layers an image may exit: strictly increasing numbers from 1 to `num_hidden_layers` - 1. By
            default all of these. The last layer always answers, so there is one stage more than exits.
        exit_head (`str`, *optional*, defaults to `"linear"`):
            What answers at an exit: `"shared"`, the last layer's LayerNorm and classifier; `"linear"`, a LayerNorm and
            a classifier of its own; or `"transformer_layer"`, a transformer layer, LayerNorm and classifier of its own.
        halting (`str`, *optional*):
            The method whose halting scores each exit learns, as a linear map of the class token. `"act"`, adaptive
            computation time by layer (arXiv 1603.08983): the answer is read from the class tokens of the layers so far,
            weighted by their scores; needs `exit_head="shared"` and `exit_criterion="act"`. `"pondernet"` (arXiv
            2107.05407): an exit's score is its probability of halting there. Its own criterion, `"pondernet"`, halts by
            a number that is drawn for each image, so its answers are random: `forward`, [`AdaptiveEngine`] and the
            pipeline take a `generator`. `"q_exit"` is the published deterministic criterion for the same model.
        halting_loss_weight (`float`, *optional*, defaults to 0.01):
            Weight of ACT's ponder cost, or β of PonderNet's divergence from the prior.
        halting_prior (`float`, *optional*, defaults to 0.2):
            λ_p of PonderNet's geometric prior, above 0 and below 1.
        self_distillation (`bool`, *optional*, defaults to `False`):
            Whether exits learn from the last answer instead of the labels (FastBERT, arXiv 2004.02178). In training
            mode nothing but the exits' own heads gets a gradient then: the backbone and the last answer stay as they
            are, frozen or not, so they must have been trained before. Set it to `False` to train them.
        threshold, exit_criterion, entropy_top_k, stage_loss_weights, label_smoothing (*optional*):
            The exit and loss fields of [`StagedConfig`]. With `halting`, `exit_criterion` is the criterion of that
            name by default, with a `threshold` of 0.99 (`"act"`, which is 1 - ε) or 1 (`"pondernet"`, its sampling);
            that of `"q_exit"` (arXiv 2204.03276: the probability of having halted so far) is 0.5.
        kwargs:
            The ViT fields of [`NestedViTConfig`]: `hidden_size` (by default 64 channels a head), `num_hidden_layers`
            (12), `num_attention_heads` (3), `intermediate_size`, `image_size`, `patch_size` and so on.

    Raises:
        ValueError: for values that cannot work; the message names the field.

    Example:

    ```python
    >>> from hf_thinkingvit import EarlyExitViTConfig, EarlyExitViTForImageClassification

    >>> config = EarlyExitViTConfig.pabee(num_hidden_layers=12, num_labels=10)
    >>> model = EarlyExitViTForImageClassification(config)
    ```"""

    model_type = "early_exit_vit"
    keys_to_ignore_at_inference = [*StagedConfig.keys_to_ignore_at_inference, "halting_scores"]
    remote_code: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_early_exit_vit.EarlyExitViTConfig",
        "AutoModel": "modeling_early_exit_vit.EarlyExitViTModel",
        "AutoModelForImageClassification": "modeling_early_exit_vit.EarlyExitViTForImageClassification",
    }

    num_attention_heads: int = 3
    exit_layers: list[int] | tuple[int, ...] | None = None
    exit_head: str = "linear"
    halting: str | None = None
    halting_loss_weight: float | int = 0.01
    halting_prior: float | int = 0.2
    self_distillation: bool = False

    def __post_init__(self, **kwargs):
        check_integer("num_hidden_layers", self.num_hidden_layers, minimum=1)
        if self.exit_layers is None:
            self.exit_layers = range(1, self.num_hidden_layers)
        self._check_exit_layers()
        self.exit_layers = list(self.exit_layers)
        if self.exit_criterion is None and self.halting in HALTING:
            self.exit_criterion = self.halting
        if self.threshold is None:
            self.threshold = HALTING_THRESHOLDS.get(self.exit_criterion)
        super().__post_init__(**kwargs)

    @property
    def num_stages(self) -> int:
        return len(self.exit_layers) + 1

    @property
    def sub_network(self) -> SubNetwork:
        """The sizes of every layer."""
        return SubNetwork(self.num_attention_heads, self.hidden_size, self.intermediate_size)

    @property
    def stages(self) -> tuple[SubNetwork, ...]:
        """The layers from one exit to the next."""
        ends = [0, *self.exit_layers, self.num_hidden_layers]
        sizes = self.num_attention_heads, self.hidden_size, self.intermediate_size
        return tuple(SubNetwork(*sizes, layers=tuple(range(*pair))) for pair in pairwise(ends))

    @property
    def exit_thresholds(self) -> tuple[float, ...]:
        """τ of each exit. `ValueError` if none is set."""
        if self.threshold is None:
            raise ValueError(f"`exit_criterion` = {self.exit_criterion!r} needs a `threshold`.")
        return resolve_thresholds(self.threshold, self.num_stages - 1)

    @property
    def has_own_loss(self) -> bool:
        """Whether the training loss is another than the weighted sum of the stages' losses."""
        return self.halting is not None or self.self_distillation

    @property
    def num_recorded_layers(self) -> int:
        """Layer outputs in `hidden_states` when every stage runs."""
        return self.num_hidden_layers

    def validate(self) -> None:
        self._check_exit_layers()
        super().validate()
        if self.exit_head not in EXIT_HEADS:
            raise ValueError(f"`exit_head` must be one of {list(EXIT_HEADS)}, got {self.exit_head!r}.")
        if self.halting is not None and self.halting not in HALTING:
            raise ValueError(f"`halting` must be None or one of {list(HALTING)}, got {self.halting!r}.")
        if self.halting == "act" and (self.exit_head != "shared" or self.exit_criterion != "act"):
            raise ValueError(
                "`halting` = 'act' reads its answer from the class tokens of several layers, and halts by the sum of "
                f"its scores: it needs `exit_head` = 'shared' (got {self.exit_head!r}) and `exit_criterion` = 'act' "
                f"(got {self.exit_criterion!r})."
            )
        check_number("halting_loss_weight", self.halting_loss_weight)
        check_number("halting_prior", self.halting_prior, maximum=1.0)
        if self.halting_prior in (0, 1):
            raise ValueError(f"`halting_prior` must be above 0 and below 1, got {self.halting_prior!r}.")
        if not isinstance(self.self_distillation, bool):
            raise ValueError(f"`self_distillation` must be true or false, got {self.self_distillation!r}.")
        self._check_loss()

    def _check_loss(self) -> None:
        """Refuse fields that would have no effect on the loss, or for which it is not defined."""
        if not self.has_own_loss:
            return
        if self.self_distillation and (self.exit_head == "shared" or self.halting is not None):
            raise ValueError(
                "`self_distillation` trains the exits' own heads and nothing else: it needs `exit_head` = 'linear' or "
                "'transformer_layer', and no `halting`."
            )
        if self.stage_loss_weights is not None:
            raise ValueError("`stage_loss_weights` has no effect with `halting` or `self_distillation`: leave it out.")
        if configured_problem_type(self) not in (None, "single_label_classification"):
            raise ValueError(
                "The losses of `halting` and `self_distillation` are of single-label classification, got "
                f"`problem_type` = {configured_problem_type(self)!r}."
            )

    def _check_exit_layers(self) -> None:
        layers = self.exit_layers
        if not isinstance(layers, Sequence) or isinstance(layers, str):
            raise ValueError(f"`exit_layers` must be a list of numbers of layers, got {layers!r}.")
        for layer in layers:
            check_integer("exit_layers", layer, minimum=1)
        if list(layers) != sorted(set(layers)) or (layers and layers[-1] >= self.num_hidden_layers):
            raise ValueError(
                "`exit_layers` must be strictly increasing numbers from 1 to `num_hidden_layers` - 1 = "
                f"{self.num_hidden_layers - 1} (the last layer always answers), got {list(layers)}."
            )

    @classmethod
    def branchynet(cls, **fields: Any) -> "EarlyExitViTConfig":
        """
        BranchyNet (arXiv 1709.01686): linear heads, softmax entropy with one τ per exit, a weighted sum of losses. Two
        exits, at a third and two thirds of the depth, and τ = 0.5 nats, unless `fields` says otherwise.
        """
        depth = _depth(fields)
        exits = sorted({max(1, round(depth * part / 3)) for part in (1, 2)} - {depth})
        return cls(**_chosen(fields, "entropy", 0.5, exit_layers=exits))

    @classmethod
    def vit_ee(cls, **fields: Any) -> "EarlyExitViTConfig":
        """
        ViT-EE (arXiv 2105.09121): one exit at half the depth, of a transformer layer and a classifier, by softmax
        entropy; τ = 0.5 nats unless `fields` says otherwise. For its training with a frozen backbone see
        `EarlyExitViTForImageClassification.freeze_backbone`.
        """
        depth = _depth(fields)
        exits = [depth // 2] if depth > 1 else []
        return cls(**_chosen(fields, "entropy", 0.5, exit_layers=exits, exit_head="transformer_layer"))

    @classmethod
    def fastbert(cls, **fields: Any) -> "EarlyExitViTConfig":
        """
        FastBERT (arXiv 2004.02178): a linear head after every layer, normalised entropy below `threshold` (its "speed",
        0.5 unless `fields` says otherwise), heads distilled from the last one.
        """
        return cls(**_chosen(fields, "normalised_entropy", 0.5, self_distillation=True))

    @classmethod
    def pabee(cls, **fields: Any) -> "EarlyExitViTConfig":
        """
        PABEE (arXiv 2006.04152): a linear head after every layer, exit after the same prediction by more than
        `threshold` answers in a row (half of them unless `fields` says otherwise), losses weighted by layer.
        """
        depth = _depth(fields)
        layers = [*cls(num_hidden_layers=depth, exit_layers=fields.get("exit_layers")).exit_layers, depth]
        weights = {"stage_loss_weights": [layer / sum(layers) for layer in layers]}
        if fields.get("halting") or fields.get("self_distillation"):  # which have a loss of their own
            weights = {}
        return cls(**_chosen(fields, "patience", max(1, len(layers) // 2), **weights))

    @classmethod
    def act(cls, **fields: Any) -> "EarlyExitViTConfig":
        """
        ACT by layer (arXiv 1603.08983): a halting score after every layer, an answer from the weighted class tokens.
        The ponder cost has A-ViT's weight, 5e-4 (arXiv 2112.07658), unless `fields` says otherwise.
        """
        return cls(**_chosen(fields, halting="act", exit_head="shared", halting_loss_weight=5e-4))

    @classmethod
    def pondernet(cls, **fields: Any) -> "EarlyExitViTConfig":
        """
        PonderNet (arXiv 2107.05407): a halting probability after every layer, one head, β = 0.01, λ_p = 0.2. Its
        answers are random; `exit_criterion="q_exit"` makes them deterministic.
        """
        return cls(**_chosen(fields, halting="pondernet", exit_head="shared"))


def _chosen(
    fields: dict[str, Any], criterion: str | None = None, threshold: float | None = None, **defaults: Any
) -> dict[str, Any]:
    """
    The fields of a method: what is given (not `None`), else its `defaults`, and its criterion with a τ on that scale.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if criterion is not None:
        defaults["exit_criterion"] = criterion
        if given.get("exit_criterion", criterion) == criterion:
            defaults["threshold"] = threshold
    return {**defaults, **given}


def _depth(fields: dict[str, Any]) -> int:
    depth = fields.get("num_hidden_layers")
    depth = EarlyExitViTConfig.num_hidden_layers if depth is None else depth
    check_integer("num_hidden_layers", depth, minimum=1)
    return depth


__all__ = ["EarlyExitViTConfig"]
