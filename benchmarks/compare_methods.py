"""
The methods that `benchmarks.compare` trains, as data: what each adds to the configuration of a run.

How a method trains is read from its shipped configuration in `examples/configs`; data, augmentation, optimizer and
schedule are the comparison's, the same for all.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from hf_thinkingvit import AViTConfig, EarlyExitViTConfig, ElasticViTConfig, ThinkingViTConfig
from hf_thinkingvit.training import TrainingConfig, parse_config


CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
DATA = ("cifar10", "imagenet")  # for which configurations are shipped
COMMON = ("thinkingvit_cifar10.yaml", "thinkingvit_3_6_imagenet.yaml")  # those of all methods
# The fields of a run that can be a method's own. `frozen_backbone_epochs` is one too, as a share of the epochs.
METHOD_FIELDS = (
    "stage_sampling",
    "gradient_accumulation_steps",
    "clip_grad",
    "freeze",
    "distillation",
    "distillation_weight",
    "distillation_temperature",
    "hidden_states_weight",
    "teacher_sub_network",
    "backbone_learning_rate",
)


@dataclass(frozen=True)
class Sizes:
    """
    The two sizes that every method is built in, of the run's configuration of a ThinkingViT: its first and its last
    stage.

    Attributes:
        narrow, wide (`int`): attention heads.
        head_dim, num_layers (`int`): of both.
        shared (`dict`): the fields of the model that do not depend on the size.
    """

    narrow: int
    wide: int
    head_dim: int
    num_layers: int
    shared: dict[str, Any]

    @classmethod
    def of(cls, model: dict[str, Any]) -> "Sizes":
        config = ThinkingViTConfig(**model)
        sized = ("thinking_stages", "num_attention_heads", "hidden_size", "intermediate_size")
        shared = {name: value for name, value in model.items() if name not in sized}
        stages, head_dim = config.thinking_stages, config.hidden_size // config.num_attention_heads
        return cls(stages[0], stages[-1], head_dim, config.num_hidden_layers, shared)

    @property
    def full(self) -> dict[str, Any]:
        """The fields of a model of the wide size."""
        return {**self.shared, "num_attention_heads": self.wide, "hidden_size": self.wide * self.head_dim}

    def thinking(self, *stages: int) -> dict[str, Any]:
        return {**self.shared, "thinking_stages": list(stages), "hidden_size": max(stages) * self.head_dim}


def preset(make: Callable[..., PreTrainedConfig], sizes: Sizes, **arguments: Any) -> dict[str, Any]:
    """The fields that a published method's class method sets, and those of the size."""
    made, default = make(**sizes.full, **arguments), make.__self__(**sizes.full)
    names = [entry.name for entry in dataclasses.fields(make.__self__)]
    values = {name: getattr(made, name, None) for name in names}
    changed = {name: value for name, value in values.items() if value != getattr(default, name, None)}
    if "exit_criterion" in changed:  # every criterion has a scale of its own
        changed["threshold"] = made.threshold
    return {**sizes.full, **changed}


@dataclass(frozen=True)
class Method:
    """
    Attributes:
        title (`str`): for the table and the picture.
        model_type (`str`): of the model.
        model (`Callable`): from `Sizes` to the fields of the model's configuration.
        settings (`tuple[str, str]`, *optional*): its shipped configurations for CIFAR-10 and for ImageNet, in
            `examples/configs`, which say the run's `METHOD_FIELDS`.
        run (`dict`): further fields of the run's configuration.
        start (`str`, *optional*): the method, of the same seed, whose model this one starts from: it is fine-tuned.
        start_as (`str`): "vit", that model as a plain ViT; "model", the model itself; "rewired", an elastic model with
            the plain ViT's heads and neurons in the order of their importance.
        teacher (`bool`): whether that model is the teacher as well.
        epochs (`float`): share of the epochs of a fine-tuned method.
        points (`Callable`, *optional*): from the model's configuration to the operating points, as fields that are
            overridden on loading; a model that thinks in stages is swept over τ instead.
        is_step (`bool`): whether it is only a step to another method, and not reported.
    """

    title: str
    model_type: str
    model: Callable[[Sizes], dict[str, Any]]
    settings: tuple[str, str] | None = None
    run: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    start_as: str = "vit"
    teacher: bool = False
    epochs: float = 1.0
    points: Callable[[PreTrainedConfig], list[dict[str, Any]]] | None = None
    is_step: bool = False


def as_it_is(config: PreTrainedConfig) -> list[dict[str, Any]]:
    return [{}]


def every_sub_network(config: PreTrainedConfig) -> list[dict[str, Any]]:
    return [{"default_sub_network": number} for number in range(len(config.sub_networks))]


def halting_epsilons(config: PreTrainedConfig) -> list[dict[str, Any]]:
    return [{"halting_epsilon": value} for value in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9)]


def keep_rates(config: PreTrainedConfig) -> list[dict[str, Any]]:
    return [{"pruning_keep_rate": value} for value in (0.5, 0.6, 0.7, 0.8, 0.9)]


def quarters(sizes: Sizes) -> list[int]:
    """Layers after each quarter of the depth, as 3, 6 and 9 of 12."""
    return sorted({max(1, round(sizes.num_layers * part / 4)) for part in (1, 2, 3)} - {sizes.num_layers})


def baseline(name: str) -> tuple[str, str]:
    return f"baselines/{name}_cifar10.yaml", f"baselines/{name}_imagenet.yaml"


@cache
def shipped_config(file: str) -> TrainingConfig:
    """A configuration of `examples/configs`."""
    return parse_config(["--config", str(CONFIGS / file)])


def method_fields(name: str, data: str, epochs: int) -> dict[str, Any]:
    """The fields of a run of `epochs` in which its method's shipped configuration for `data` is not a ThinkingViT's."""
    method = METHODS[name]
    if method.settings is None:
        return dict(method.run)
    shipped, common = (shipped_config(files[DATA.index(data)]) for files in (method.settings, COMMON))
    fields = {field: getattr(shipped, field) for field in METHOD_FIELDS}
    fields = {field: value for field, value in fields.items() if value != getattr(common, field)}
    if shipped.frozen_backbone_epochs:
        fields["frozen_backbone_epochs"] = shipped.frozen_backbone_epochs / shipped.epochs * epochs
    return {**fields, **method.run}


ELASTIC, EXITS = "elastic_vit", "early_exit_vit"

METHODS: dict[str, Method] = {
    "plain_narrow": Method("plain, narrow", "thinkingvit", lambda s: s.thinking(s.narrow), points=as_it_is),
    "plain_wide": Method("plain, wide", "thinkingvit", lambda s: s.thinking(s.wide), points=as_it_is),
    # What fine-tuning alone gives: the control of all methods that start from the wide net.
    "plain_wide_longer": Method(
        "plain, wide, longer",
        "thinkingvit",
        lambda s: s.thinking(s.wide),
        start="plain_wide",
        start_as="model",
        points=as_it_is,
    ),
    "thinkingvit": Method("ThinkingViT, wider", "thinkingvit", lambda s: s.thinking(s.narrow, s.wide)),
    "iteration": Method("ThinkingViT, same width", "thinkingvit", lambda s: s.thinking(s.narrow, s.narrow)),
    "hydravit": Method(
        "HydraViT",
        ELASTIC,
        lambda s: preset(ElasticViTConfig.hydravit, s, heads=[s.narrow, s.wide]),
        baseline("hydravit"),
        points=every_sub_network,
    ),
    "matformer": Method(
        "MatFormer",
        ELASTIC,
        lambda s: preset(ElasticViTConfig.matformer, s),
        baseline("matformer"),
        points=every_sub_network,
    ),
    "sortednet": Method(
        "SortedNet",
        ELASTIC,
        lambda s: preset(ElasticViTConfig.sortednet, s),
        baseline("sortednet"),
        points=every_sub_network,
    ),
    "dynabert_widths": Method(
        "DynaBERT, widths",
        ELASTIC,
        lambda s: preset(ElasticViTConfig.dynabert, s, depths=[1.0]),
        baseline("dynabert_widths"),
        start="plain_wide",
        start_as="rewired",
        teacher=True,
        epochs=0.5,
        is_step=True,
    ),
    "dynabert": Method(
        "DynaBERT",
        ELASTIC,
        lambda s: preset(ElasticViTConfig.dynabert, s),
        baseline("dynabert_depths"),
        start="dynabert_widths",
        start_as="model",
        teacher=True,
        epochs=0.5,
        points=every_sub_network,
    ),
    "branchynet": Method(
        "BranchyNet", EXITS, lambda s: preset(EarlyExitViTConfig.branchynet, s), baseline("branchynet")
    ),
    "vit_ee": Method(
        "ViT-EE", EXITS, lambda s: preset(EarlyExitViTConfig.vit_ee, s), baseline("vit_ee"), start="plain_wide"
    ),
    "confidence": Method(
        "confidence (FastBERT)",
        EXITS,
        lambda s: preset(EarlyExitViTConfig.fastbert, s),
        baseline("fastbert"),
        start="plain_wide",
    ),
    "similarity": Method(
        "similarity",
        EXITS,
        lambda s: {**s.full, "exit_head": "shared", "exit_criterion": "similarity", "threshold": 0.1},
    ),
    "pabee": Method("PABEE", EXITS, lambda s: preset(EarlyExitViTConfig.pabee, s), baseline("pabee")),
    "act": Method("ACT", EXITS, lambda s: preset(EarlyExitViTConfig.act, s), baseline("act")),
    "pondernet": Method("PonderNet", EXITS, lambda s: preset(EarlyExitViTConfig.pondernet, s), baseline("pondernet")),
    "dynamicvit": Method(
        "DynamicViT",
        "thinkingvit",
        lambda s: {**s.thinking(s.wide), "pruning_layers": quarters(s), "pruning_keep_rate": 0.7},
        ("thinkingvit_cifar10_pruned.yaml", "dynamicvit_small_imagenet.yaml"),
        start="plain_wide",
        start_as="model",
        teacher=True,
        points=keep_rates,
    ),
    "avit": Method(
        "A-ViT",
        "avit",
        lambda s: {**s.full, "gate_scale": 5, "gate_center": 5, "target_depth": round(2 * s.num_layers / 3)},
        ("avit_cifar10.yaml", "avit_small_imagenet.yaml"),
        {"mixup": 0.0, "cutmix": 0.0},  # as in both files
        start="plain_wide",
        points=halting_epsilons,
    ),
}
# What a picture shows beside each other, in front of the plain nets and ThinkingViT.
GROUPS = {
    "sub-networks of one ViT": ("hydravit", "matformer", "sortednet", "dynabert"),
    "answers after chosen layers": ("branchynet", "vit_ee", "confidence", "similarity", "pabee", "act", "pondernet"),
    "fewer patches": ("dynamicvit", "avit"),
}
_CLASSES = {"thinkingvit": ThinkingViTConfig, ELASTIC: ElasticViTConfig, EXITS: EarlyExitViTConfig, "avit": AViTConfig}


def model_config(name: str, sizes: Sizes, **labels: Any) -> PreTrainedConfig:
    """The configuration of a method's model."""
    method = METHODS[name]
    return _CLASSES[method.model_type](**method.model(sizes), **labels)


def with_starts(names: Iterable[str], given: Iterable[str] = ()) -> list[str]:
    """The methods, and before each those that it starts from; a `given` one starts from none."""
    ordered: dict[str, None] = {}
    for name in names:
        if METHODS[name].start is not None and name not in given:
            ordered |= dict.fromkeys(with_starts([METHODS[name].start], given))
        ordered[name] = None
    return list(ordered)
