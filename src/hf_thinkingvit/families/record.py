"""
What the rest of the package has to know of a family of models, as one record.

Registration, conversion, costs, training and model cards read these records instead of asking which family a model is
of. A new family is one module beside this one, and one configuration and one model file in `models/`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .official import OfficialFormat


IMAGE_CLASSIFICATION = "image-classification"
IMAGE_SEGMENTATION = "image-segmentation"

# Fields of every family that only training reads.
TRAINING_FIELDS = frozenset(
    {
        *("label_smoothing", "initializer_range"),
        *("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"),
    }
)
BACKBONE_FIELDS = frozenset({"out_stage"})  # what other models' heads read
# Fields of every family that thinks in stages: when an image exits, and how the stages are weighted in training.
EXIT_FIELDS = frozenset({"threshold", "exit_criterion", "exit_at_threshold", "entropy_top_k", "stage_loss_weights"})


@dataclass(frozen=True)
class Costs:
    """
    How the multiply-accumulates of a family are counted. `None` where a family does not compute in this way.

    Attributes:
        stages (`Callable`): `(config, image_size)` to the MACs that each stage adds, as this package computes it.
        published_stages (`Callable`): the same as the paper's tables count.
        sub_networks (`Callable`): `(config, image_size)` to the MACs of each sub-network alone.
        halting (`Callable`): `(config, token_depth, image_size)` to the MACs of each image, from its tokens' depths.
    """

    stages: Callable[..., list[int]] | None = None
    published_stages: Callable[..., list[int]] | None = None
    sub_networks: Callable[..., list[int]] | None = None
    halting: Callable[..., Any] | None = None


@dataclass(frozen=True)
class PlainSource:
    """
    How a model of a family starts from the weights of a plain model of Transformers.

    Attributes:
        constructor (`str`): name of the class method that does it, which every head of the family has.
        fixed_fields (`frozenset[str]`): fields of the configuration that the plain model determines.
    """

    constructor: str
    fixed_fields: frozenset[str]


@dataclass(frozen=True)
class Paper:
    """
    Attributes:
        title (`str`): of the method, with the backbones that it is implemented on.
        bibtex (`str`): the citation.
    """

    title: str
    bibtex: str


@dataclass(frozen=True)
class CardText:
    """
    What a model card says of a family, in Markdown.

    Attributes:
        description (`str`): the opening paragraph.
        limits (`str`): what cannot be relied on.
        rule (`str`, *optional*):
            For families that do not think in stages: when computation ends, with fields of the configuration in braces.
        override (`str`, *optional*):
            For the same: the field that a user sets on loading, to trade accuracy for computation.
        tokens (`Callable`, *optional*):
            From a configuration to what happens to tokens between layers, or to `None`.
    """

    description: str
    limits: str
    rule: str | None = None
    override: str | None = None
    tokens: Callable[[PreTrainedConfig], str | None] = lambda config: None


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: there is one record per family
class Family:
    """
    Attributes:
        name (`str`): as the paper spells it.
        config_class, model_class: the configuration and the bare model.
        heads (`dict[str, type]`): the model class for each task, under the task's name in `pipeline`.
        costs (`Costs`): how multiply-accumulates are counted.
        plain (`PlainSource`): how to start from a plain model.
        free_fields (`frozenset[str]`):
            Fields that may change when training goes on from trained weights. They say how the model trains and when it
            stops computing; the meaning of the weights does not depend on them.
        announced_fields (`frozenset[str]`):
            Fields that may change as well, but then the same weights compute another function, which a training run
            announces.
        added_parameters (`Mapping[str, str]`):
            Fields that, where the starting point has none, add parameters without changing the others: by the field's
            name, the pattern of their names. A training run initialises these freshly and announces it.
        card (`CardText`): of model cards.
        paper (`Paper`): to cite.
        official (`OfficialFormat`, *optional*): how the authors' classifiers are converted, where there are any.
        backbone_class (`type`, *optional*): the model for other models' heads, of `AutoBackbone`.
        other_official (`tuple[OfficialFormat, ...]`): the same for their checkpoints of other tasks.
        without_mixup (`str`, *optional*):
            For a family that is trained without mixup and cutmix: that statement with its source.
    """

    name: str
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    heads: Mapping[str, type[PreTrainedModel]]
    costs: Costs
    plain: PlainSource
    free_fields: frozenset[str]
    announced_fields: frozenset[str]
    card: CardText
    paper: Paper
    official: OfficialFormat | None = None
    other_official: tuple[OfficialFormat, ...] = ()
    backbone_class: type[PreTrainedModel] | None = None
    added_parameters: Mapping[str, str] = field(default_factory=dict)
    without_mixup: str | None = None

    @property
    def model_type(self) -> str:
        return self.config_class.model_type

    @property
    def classifier(self) -> type[PreTrainedModel]:
        return self.heads[IMAGE_CLASSIFICATION]

    @property
    def official_formats(self) -> tuple[OfficialFormat, ...]:
        """In the order in which they are asked whether a checkpoint is of theirs."""
        return (*self.other_official, *([] if self.official is None else [self.official]))

    def from_plain(self, source: Any, task: str = IMAGE_CLASSIFICATION, **config_overrides) -> PreTrainedModel:
        """A model for `task` that starts from the plain model `source`; see the head's own constructor."""
        return getattr(self.heads[task], self.plain.constructor)(source, **config_overrides)
