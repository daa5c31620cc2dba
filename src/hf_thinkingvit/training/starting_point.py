"""The model that a run begins with: fresh, from a plain ViT or Swin, or from a model of this package."""

from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from ..auto import FAMILIES
from ..models import swin_weights, vit_weights
from ..models.config_checks import as_pair
from .config import MODEL_CONFIGS, TrainingConfig


CLASSIFIERS = {config_class.model_type: classifier for config_class, _, classifier in FAMILIES}


def build_model(config: TrainingConfig, id2label: dict[int, str]) -> PreTrainedModel:
    """The model to train, for these labels. Raises `ValueError` for fields that do not fit."""
    labels = {"id2label": id2label, "label2id": {label: index for index, label in id2label.items()}}
    classifier = CLASSIFIERS[config.model_type]
    attention = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    if config.from_vit:
        start, fixed_fields = _plain_start(classifier)
        model = start(config.from_vit, **{n: value for n, value in config.model.items() if n not in fixed_fields})
        for name in config.model.keys() & set(fixed_fields):
            if _comparable(getattr(model.config, name)) != _comparable(config.model[name]):
                raise ValueError(
                    f"`model.{name}` is {config.model[name]}, but starting from `{config.from_vit}` it is "
                    f"{getattr(model.config, name)}."
                )
        model = _with_labels(model, labels)
        if attention:
            model.set_attn_implementation(config.attn_implementation)
    elif config.from_pretrained:
        start = AutoConfig.from_pretrained(config.from_pretrained)
        if start.model_type != config.model_type:
            raise ValueError(
                f"`from_pretrained` is a {start.model_type} model, but `model_type` is {config.model_type}."
            )
        model = classifier.from_pretrained(
            config.from_pretrained, **config.model, **labels, **attention, ignore_mismatched_sizes=True
        )
    else:
        model = classifier(MODEL_CONFIGS[config.model_type](**config.model, **labels, **attention))
    for pattern in config.freeze:
        frozen = [parameter for name, parameter in model.named_parameters() if fnmatch(name, pattern)]
        if not frozen:
            raise ValueError(f"`freeze`: no parameter is called {pattern!r}.")
        for parameter in frozen:
            parameter.requires_grad_(False)
    return model


def _plain_start(classifier: type[PreTrainedModel]) -> tuple[Callable, tuple[str, ...]]:
    """How the classifier starts from a plain model, and the fields that the plain model's weights fix."""
    if hasattr(classifier, "from_swin"):
        return classifier.from_swin, swin_weights.FIXED_FIELDS
    return classifier.from_vit, vit_weights.FIXED_FIELDS


def _comparable(value: Any) -> Any:
    """Sizes as pairs, and lists as tuples."""
    return as_pair(value) if isinstance(value, (int, list, tuple)) else value


def _with_labels(model: PreTrainedModel, labels: dict[str, dict]) -> PreTrainedModel:
    """The same weights with a head for other labels, freshly initialised if there are more or fewer of them."""
    num_labels = len(labels["id2label"])
    if num_labels != model.config.num_labels:
        fresh = type(model)(type(model.config)(**{**model.config.to_dict(), **labels}))
        heads = ("classifier.", "distillation_classifier.")
        body = {name: value for name, value in model.state_dict().items() if not name.startswith(heads)}
        fresh.load_state_dict(body, strict=False)
        return fresh
    model.config.id2label, model.config.label2id = labels["id2label"], labels["label2id"]
    return model
