"""The model that a run begins with: freshly initialised, from a plain ViT or Swin, or from a model of this package."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..families import FAMILIES, Family
from ..models.configuration_checks import as_pair
from ..models.configuration_labels import label2id_of
from ..models.weights_from_official import is_official
from .adapters import add_adapters
from .config import TrainingConfig
from .labels import first_difference, known_labels, label_names, match_labels
from .tasks import TrainingTask, training_task


def build_model(
    config: TrainingConfig, id2label: dict[int, str], report: Callable[[str], None] = print
) -> PreTrainedModel:
    """
    The model to train, with a classifier for the labels of the data, in float32.

    Args:
        config (`TrainingConfig`): of the run.
        id2label (`dict[int, str]`): the data's labels.
        report (`Callable`): called with a message for each part of the starting point that is replaced or used
            in another way.

    Raises:
        ValueError: for fields that do not fit the starting point, and if weights other than the classifier would have
            to be replaced.
    """
    family, task = FAMILIES[config.model_type], training_task(config.task)
    if config.from_vit:
        model = _from_plain(config, family, task, id2label)
    elif config.from_pretrained:
        model = _from_pretrained(config, family, task, id2label, report)
    else:
        model = family.heads[task.name](family.config_class(**config.model, **_labels(id2label)))
        _check_last_answer(model.config, "its weights are new")
    if config.from_vit or config.from_pretrained:
        # Half precision, as checkpoints are stored in, would train with rounded updates.
        model = with_labels(model.float(), id2label, config.label_map, report, task)
        model.config.dtype = torch.float32
        if vars(model.config).pop("calibration", None) is not None:
            report("the starting point was calibrated; what that promises does not hold for what is trained from it")
    if config.attn_implementation:
        model.set_attn_implementation(config.attn_implementation)
    for pattern in config.freeze:
        frozen = [parameter for name, parameter in model.named_parameters() if fnmatch(name, pattern)]
        if not frozen:
            raise ValueError(f"`freeze`: no parameter is called {pattern!r}.")
        for parameter in frozen:
            parameter.requires_grad_(False)
    if config.lora_rank:
        add_adapters(model, config)
    return model


def _from_plain(
    config: TrainingConfig, family: Family, task: TrainingTask, id2label: dict[int, str]
) -> PreTrainedModel:
    """From a plain ViT, DeiT or Swin. Fields that its weights were trained with must not change."""
    fixed = family.plain.fixed_fields - family.free_fields - task.resizes
    free = {name: value for name, value in config.model.items() if name not in fixed}
    labels = {} if task.keeps_source_labels and _has_classifier(config.from_vit) else _labels(id2label)
    model = family.from_plain(config.from_vit, task.name, **free, **labels)
    _check_unchanged(config.from_vit, model.config, {name: config.model[name] for name in config.model.keys() & fixed})
    return model


def _has_classifier(source: str) -> bool:
    """Whether a plain model was saved with a classifier, by its class; a bare `ViTModel` has none."""
    names = AutoConfig.from_pretrained(source).architectures
    return not names or any("ForImageClassification" in name for name in names)


def _from_pretrained(
    config: TrainingConfig,
    family: Family,
    task: TrainingTask,
    id2label: dict[int, str],
    report: Callable[[str], None],
) -> PreTrainedModel:
    """
    From a model of this package, with all of its weights, and freshly initialised ones of what fields add to it; from
    one for another task, with the weights of its backbone.
    """
    source = config.from_pretrained
    if is_official(source, {}):
        raise ValueError(
            f"`from_pretrained`: `{source}` is an official checkpoint, in the layout of its authors. `hf-thinkingvit "
            "convert` makes a folder of it that training starts from; `hf-thinkingvit finetune` does so itself."
        )
    saved = AutoConfig.from_pretrained(source)
    if saved.model_type != config.model_type:
        raise ValueError(f"`from_pretrained` is a {saved.model_type} model, but `model_type` is {config.model_type}.")
    if (constructor := task.constructor_from(saved)) is not None:
        report(f"`{source}` is of another task: its backbone is kept, and the rest is freshly initialised")
        return getattr(family.heads[task.name], constructor)(source, **config.model, **_labels(id2label))
    added = [name for name in family.added_parameters if config.model.get(name) and not getattr(saved, name)]
    allowed = family.free_fields | family.announced_fields | set(added)
    _check_unchanged(source, saved, {name: value for name, value in config.model.items() if name not in allowed})
    changed = [
        f"`{name}` {getattr(saved, name)} → {value}"
        for name, value in config.model.items()
        if name not in family.free_fields and _comparable(getattr(saved, name)) != _comparable(value)
    ]
    model, loading = family.heads[task.name].from_pretrained(
        source, **config.model, ignore_mismatched_sizes=True, output_loading_info=True
    )
    patterns = [family.added_parameters[name] for name in added]
    fresh = {name for name in loading["missing_keys"] if any(fnmatch(name, pattern) for pattern in patterns)}
    mismatched = [f"{name} {tuple(there)} → {tuple(here)}" for name, there, here in loading["mismatched_keys"]]
    problems = [
        f"{what}: {', '.join(sorted(names)[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for what, names in (
            ("not in it", set(loading["missing_keys"]) - fresh),
            ("of another shape", mismatched),
            ("in it, but not used", loading["unexpected_keys"]),
        )
        if names
    ]
    if problems:
        cause = f" after changing {', '.join(changed)}" if changed else ""
        raise ValueError(
            f"The weights of `{source}` do not fit{cause}: {'; '.join(problems)}. Only a classifier for other labels "
            "is replaced: leave these fields as they are, or train without `from_pretrained`."
        )
    if changed:
        report(f"the weights of `{source}` are used otherwise than they were trained: {', '.join(changed)}")
    return model


def _check_last_answer(model_config: PreTrainedConfig, why: str) -> None:
    """`ValueError`, which says `why`, if exits would learn from a last answer that nobody has trained."""
    if getattr(model_config, "self_distillation", False):
        raise ValueError(
            "`self_distillation` teaches the exits by the last answer, which it does not train, and that of this model "
            f"would be random: {why}. Start from a model that is trained on these labels, by `from_vit` or "
            "`from_pretrained`."
        )


def _check_unchanged(source: str, saved: Any, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if _comparable(getattr(saved, name)) != _comparable(value):
            raise ValueError(
                f"`model.{name}` is {value}, but starting from `{source}` it is {getattr(saved, name)}: its weights "
                "were trained so. Leave it as it is, or train from the beginning."
            )


def _comparable(value: Any) -> Any:
    """Sizes as pairs, and lists as tuples."""
    if isinstance(value, (list, tuple)) and any(isinstance(entry, (list, tuple)) for entry in value):
        return tuple(map(tuple, value))
    return as_pair(value) if isinstance(value, (int, list, tuple)) else value


def _labels(id2label: dict[int, str]) -> dict[str, dict]:
    return {"id2label": id2label, "label2id": label2id_of(id2label)}


def _kept(names: Sequence[str], known: Mapping[int, int]) -> str:
    listed = ", ".join(names[index] for index in list(known)[:5]) + (", ..." if len(known) > 5 else "")
    if len(known) == len(names):
        return f"the classifier keeps the rows of all {len(names)} labels ({listed}), which the source knows by name"
    return (
        f"the classifier keeps the rows of {len(known)} of {len(names)} labels, which the source knows by name "
        f"({listed}), and is freshly initialised for the others"
    )


def source_labels(config: TrainingConfig, id2label: dict[int, str]) -> dict[int, int]:
    """
    The labels of the data for which the classifier that `build_model` makes starts from the source's: for the index of
    each, that of the source's class.
    """
    source = config.from_pretrained or config.from_vit
    if source is None or (config.from_vit and not _has_classifier(source)):
        return {}
    saved = AutoConfig.from_pretrained(source)
    if training_task(config.task).constructor_from(saved) is not None:
        return {}
    return known_labels(label_names(id2label), label_names(saved.id2label), config.label_map)


@torch.no_grad()
def with_labels(
    model: PreTrainedModel,
    id2label: dict[int, str],
    label_map: str,
    report: Callable[[str], None],
    task: TrainingTask,
) -> PreTrainedModel:
    """
    The same model for other labels: with its classifier, in their order, if they are the same labels; else with one
    that is freshly initialised, except for the rows of the labels that the model knows by name.

    Args:
        model (`PreTrainedModel`): a classifier of this package.
        id2label (`dict[int, str]`): the new labels.
        label_map (`str`): how they are paired, by `"name"` or by `"index"`; see `match_labels`.
        report (`Callable`): told in words what becomes of the classifier.
        task (`TrainingTask`): says which modules depend on the labels.
    """
    names, own = label_names(id2label), label_names(model.config.id2label)
    match = match_labels(names, own, label_map)
    if match is not None and not match.same_order and not task.reorders_heads:
        match = None
    if match is None:
        if len(names) != len(own):
            why = f"it has {len(own)} labels, the data {len(names)}"
        else:
            index, name, other = first_difference(names, own)
            why = f"label {index} is {other!r} there and {name!r} in the data; `--label-map index` would keep it"
        known = known_labels(names, own, label_map) if task.reorders_heads else {}
        if len(known) < len(names):
            _check_last_answer(model.config, why)
        report(f"{_kept(names, known)}: {why}" if known else f"the classifier is freshly initialised: {why}")
        fresh = type(model)(type(model.config)(**{**model.config.to_dict(), **_labels(id2label)}))
        heads = tuple(f"{head}." for head in task.heads)
        body = {name: value for name, value in model.state_dict().items() if not name.startswith(heads)}
        missing, unexpected = fresh.load_state_dict(body, strict=False)
        odd = [*unexpected, *(name for name in missing if not name.startswith(heads))]
        if odd:
            raise ValueError(f"Only a classifier can be replaced, but other weights differ as well: {odd[:5]}.")
        for head in task.heads if known else ():
            if getattr(model, head, None) is not None:
                for parameter, kept in zip(getattr(fresh, head).parameters(), getattr(model, head).parameters()):
                    parameter[list(known)] = kept[list(known.values())]
        return fresh.train(model.training)
    if match.by_number:
        report("the classifier is kept, and its labels are taken by number")
    elif not match.same_order:
        report("the classifier is kept, and its labels are put into the order of the data's")
    if not match.same_order:
        order = torch.tensor(match.order)
        for head in task.heads:
            if getattr(model, head, None) is not None:
                for parameter in getattr(model, head).parameters():  # weight and bias of one classifier, or of several
                    parameter.copy_(parameter[order])
    labels = _labels(id2label)
    model.config.id2label, model.config.label2id = labels["id2label"], labels["label2id"]
    return model
