"""The exit fields of every model that thinks in stages, whatever its backbone."""

import copy
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn
from transformers import PreTrainedConfig

from .configuration_checks import OwnLayoutMixin, as_plain_numbers, check_label_smoothing
from .exit_criteria import same_threshold, suits_problem_type
from .exit_rules import check_exit_fields, default_exit_fields


if TYPE_CHECKING:
    # Never executed: Transformers saves the files that relative imports name with a model's code, and nothing else
    # imports this one.
    from .staged_pipeline import StagedImageClassificationPipeline  # noqa: F401


ADAPTIVE_IMAGE_CLASSIFICATION = "adaptive-image-classification"
# Its entry in `custom_pipelines`, in the form that `Pipeline.save_pretrained` writes for registered pipelines.
PIPELINE = {
    "impl": "staged_pipeline.StagedImageClassificationPipeline",
    "pt": ["AutoModelForImageClassification"],
    "type": "image",
}


def configuration_of(model_or_config: nn.Module | PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a model, also of one that is compiled or wrapped (such as by `DistributedDataParallel`)."""
    model = model_or_config
    while isinstance(model, nn.Module) and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return getattr(model, "config", model)


def thinks_in_stages(model_or_config: nn.Module | PreTrainedConfig) -> bool:
    """
    Whether a model answers after each of several stages, and so has an exit rule.

    Args:
        model_or_config (`nn.Module` or `PreTrainedConfig`): of any family, also of those in Transformers.

    Raises:
        ValueError: for a staged model that was loaded with the code of an earlier version, saved in its folder, which
            has other steps than this version calls.
    """
    config = configuration_of(model_or_config)
    is_staged = getattr(config, "is_staged", None)
    if is_staged is None and hasattr(config, "exit_criterion"):
        raise ValueError(
            f"This {config.model_type} model runs the code in its own folder (`trust_remote_code=True`), which an "
            "earlier version of hf-thinkingvit saved and this version cannot use. Import `hf_thinkingvit` before the "
            "model is loaded: then the installed code is used, with the same weights. Saving the model again updates "
            "its folder."
        )
    return bool(is_staged)


class StagedConfig(OwnLayoutMixin, PreTrainedConfig):
    r"""
    Fields of models that answer in stages: the exit rule, and the weights of the stages in training. Subclasses define
    the stages in `stages`.

    Args:
        threshold (`float` or `list[float]`, *optional*):
            τ: an image exits after a stage iff its entropy is strictly below τ (for `max_probability`, `margin`,
            `patience`, `confident_twice`, `act`, `pondernet` and `q_exit`: iff the score is strictly above τ). One
            number, or one per exit, that is per stage but the last, which always answers. For the entropies, 0 never
            exits early. τ is on the scale of its criterion. By default 0.5 for `"topk_entropy"` and 0.1 for
            `"mean_binary_entropy"`; the other criteria have no default and need both fields. For regression, which no
            criterion judges, the default is 0, and nothing else is accepted.
        exit_criterion (`str`, *optional*):
            `"topk_entropy"` (the official code's, to which published thresholds refer), `"entropy"` (full softmax, the
            paper's formula), `"normalised_entropy"` (the same, divided by its maximum), `"max_probability"` or
            `"margin"` (largest minus second largest probability); criteria that compare stages, `"similarity"` (mean
            squared difference from the logits before), `"patience"` (stages in a row with the same prediction) and
            `"confident_twice"` (smaller maximum probability of the last two stages); of learned halting scores `"act"`,
            `"pondernet"` (random) and `"q_exit"` (see [`EarlyExitViTConfig`]); for multi-label classification
            `"mean_binary_entropy"` (of each label's sigmoid, averaged over the labels: from 0 to ln 2). By default
            `"mean_binary_entropy"` where `problem_type` is `"multi_label_classification"`, and `"topk_entropy"`
            otherwise. Setting another one later (or a `problem_type` that it does not suit) resets `threshold` to
            `None`, and it must then be set as well; only 0 remains valid from one entropy to another.
        exit_at_threshold (`bool`, *optional*, defaults to `False`):
            Whether an image whose score equals τ exits as well, as in the published ThinkingViT with DynamicViT (which
            also has `exit_criterion="entropy"`). Then a τ of 0 still lets an entropy of exactly 0 exit.
        entropy_top_k (`int`, *optional*, defaults to 10):
            How many of the largest probabilities `"topk_entropy"` uses.
        stage_loss_weights (`list[float]`, *optional*):
            Weight of each stage's loss in the training loss. Equal weights that sum to 1 by default.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Share of each target that the training loss spreads evenly over all classes, at least 0 and below 1. For
            single-label classification only. Use it instead of `TrainingArguments.label_smoothing_factor`, with which
            `Trainer` computes the loss itself, from the last stage alone.
    """

    is_staged: ClassVar[bool] = True
    # So that `Trainer` hands `compute_metrics` the logits alone, as for any classifier.
    keys_to_ignore_at_inference = [
        "exit_stage",
        "entropy",
        "stage_logits",
        "kept_tokens",
        "hidden_states",
        "attentions",
    ]

    threshold: float | int | list[float] | tuple[float, ...] | None = None
    exit_criterion: str | None = None
    exit_at_threshold: bool = False
    entropy_top_k: int = 10
    stage_loss_weights: list[float] | tuple[float, ...] | None = None
    label_smoothing: float | int = 0.0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "threshold":
            value = as_plain_numbers(value)
        before = self.__dict__.get("exit_criterion")
        super().__setattr__(name, value)
        if before is None:  # during construction: the fields are checked together once all are set
            return
        if name == "problem_type" and not suits_problem_type(before, value):
            self.exit_criterion, _ = default_exit_fields(value, None, 0.0, 0)
        elif name == "exit_criterion" and not same_threshold(before, value, self.threshold):
            # The old τ is not on the new criterion's scale. With `None`, everything that needs τ raises an error.
            self.threshold = None

    def __post_init__(self, **kwargs):
        # As in Transformers, `num_labels` takes precedence over `id2label`.
        num_labels = kwargs.get("num_labels") or (2 if self.id2label is None else len(self.id2label))
        problem_type = "regression" if self.problem_type is None and num_labels == 1 else self.problem_type
        self.exit_criterion, self.threshold = default_exit_fields(
            problem_type, self.exit_criterion, self.threshold, self.num_stages - 1
        )
        super().__post_init__(**kwargs)

    def update(self, config_dict: dict[str, Any]) -> None:
        """As in Transformers, but sets `exit_criterion` before `threshold`, which it may reset."""
        first = ("problem_type", "exit_criterion")
        super().update(dict(sorted(config_dict.items(), key=lambda item: item[0] not in first)))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "StagedConfig":
        """
        As in Transformers, but overrides of the model's own fields are applied before the fields are checked, because
        the valid values of one field depend on others.

        Raises:
            ValueError: if `exit_criterion` is overridden without `threshold`, or a value is invalid.
        """
        base = {field.name for field in fields(PreTrainedConfig)} - {"problem_type", "id2label", "label2id"}
        names = {field.name for field in fields(cls)} - base
        overrides = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        for name in ("threshold", "exit_criterion"):
            if overrides.get(name, ...) is None:
                del overrides[name]
        if "exit_criterion" in overrides and "threshold" not in overrides and "threshold" in config_dict:
            problem_type, saved = config_dict.get("problem_type"), config_dict.get("exit_criterion")
            saved, _ = default_exit_fields(problem_type, saved, config_dict["threshold"], 0)
            if not same_threshold(saved, overrides["exit_criterion"], config_dict["threshold"]):
                raise ValueError(
                    f"`exit_criterion` = {overrides['exit_criterion']!r} alone would read the saved `threshold` "
                    f"({config_dict['threshold']}), which is on the scale of {saved!r}, on another scale: give both "
                    "`exit_criterion` and `threshold`."
                )
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    @property
    def stages(self) -> tuple[Any, ...]:
        """The sub-networks, in the order in which they run."""
        raise NotImplementedError

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def custom_pipelines(self) -> dict[str, dict[str, Any]]:
        """
        The pipelines that are saved with the model, by task. The adaptive one is left out if it is registered, as this
        package does: Transformers would prefer the folder's, and require `trust_remote_code`. Returns a copy, because
        `pipeline` writes classes into it, which cannot be saved.
        """
        from transformers.pipelines import PIPELINE_REGISTRY

        pipelines = self._pipelines()
        if ADAPTIVE_IMAGE_CLASSIFICATION in PIPELINE_REGISTRY.get_supported_tasks():
            del pipelines[ADAPTIVE_IMAGE_CLASSIFICATION]
        return pipelines

    @custom_pipelines.setter
    def custom_pipelines(self, pipelines: dict[str, dict[str, Any]] | None) -> None:
        others = {task: info for task, info in (pipelines or {}).items() if task != ADAPTIVE_IMAGE_CLASSIFICATION}
        self.__dict__.pop("custom_pipelines", None)
        if others:
            self.__dict__["custom_pipelines"] = others

    def _pipelines(self) -> dict[str, dict[str, Any]]:
        return copy.deepcopy({**self.__dict__.get("custom_pipelines", {}), ADAPTIVE_IMAGE_CLASSIFICATION: PIPELINE})

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "custom_pipelines": self._pipelines()}

    def validate(self) -> None:
        super().validate()
        check_exit_fields(self)
        check_label_smoothing(self)


__all__ = ["StagedConfig", "configuration_of", "thinks_in_stages"]
