"""
The conditions under which a calibration is valid, and checks that they still hold.

A calibrated τ is valid for one model: its weights, dtype, labels and exit rule. `Calibration` stores these as
`conditions`. Code that shows or applies a calibration must compare them with the model first.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..families.record import TRAINING_FIELDS
from ..models.configuration_staged import thinks_in_stages
from ..models.staged_arguments import resolve_thresholds


# Configuration fields that do not affect answers in evaluation mode; and τ, which is compared separately.
NO_CONDITION = TRAINING_FIELDS | {"threshold", "stage_loss_weights", "pruning_ratio_loss_weight"}
# Those of token policies: how many tokens the same weights compute, and so what they answer and cost.
TOKEN_FIELDS = ("pruning_keep_rate", "halting_epsilon")
WORDS = {
    "exit_criterion": "the exit criterion",
    "dtype": "the dtype",
    "num_labels": "the number of labels",
    "preprocessing": "how images are resized and cut",
}
NOT_OF_MODEL = ("dtype", "preprocessing")  # conditions that a configuration does not record


def token_fields(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Of conditions, or of a configuration as a `dict`, the `TOKEN_FIELDS` that are set."""
    return {name: conditions[name] for name in TOKEN_FIELDS if conditions.get(name) is not None}


def weights_fingerprint(model: nn.Module) -> str | None:
    """
    SHA-256 over names, shapes, dtypes and bytes of the state dict, independent of the device.

    Returns:
        `str`: in hexadecimal; `None` if the bytes of a tensor cannot be read directly (sharded, quantized, sparse and
        meta tensors).
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):  # DeepSpeed's shards
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if type(tensor) not in (torch.Tensor, nn.Parameter):  # subclasses: DTensor, quantized weights
            return None
        if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
            return None
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        tensor = tensor.detach().cpu().contiguous()
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def model_conditions(model: PreTrainedModel) -> dict[str, Any]:
    """
    Everything that affects the answers of `model` in evaluation mode or their accuracy, as plain data.

    `dtype` names the dtype of the computation: under autocast, both that of the weights and autocast's. Device and
    attention backend are left out, because they change answers only by rounding errors of that dtype.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    conditions = _config_conditions(model.config)
    dtypes = sorted({_name(parameter.dtype) for parameter in model.parameters() if parameter.is_floating_point()})
    conditions["dtype"] = " and ".join(dtypes)
    device = next(model.parameters()).device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        conditions["dtype"] += f" under autocast to {_name(torch.get_autocast_dtype(device))}"
    conditions["weights"] = weights_fingerprint(model)
    return conditions


def _config_conditions(config: PreTrainedConfig) -> dict[str, Any]:
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    names = [field.name for field in dataclasses.fields(config) if field.name not in common | NO_CONDITION]
    labels = {str(index): label for index, label in (config.id2label or {}).items()}
    conditions = {name: getattr(config, name) for name in names}
    conditions["num_labels"] = config.num_labels
    conditions["labels"] = hashlib.sha256(json.dumps(labels, sort_keys=True).encode()).hexdigest()
    return json.loads(json.dumps(conditions, default=str))  # tuples as lists, as a saved configuration has them


@dataclass(frozen=True)
class CalibrationStatus:
    """
    Whether a calibration is valid for a model as it is now.

    Attributes:
        changed: what has changed since, in words.
        unverified: what cannot be compared, in words.
    """

    changed: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return not self.changed and not self.unverified

    def __str__(self) -> str:
        if self.changed:
            return f"since changed: {'; '.join(self.changed)}"
        if self.unverified:
            return f"whether that still holds cannot be verified: {'; '.join(self.unverified)}"
        return "holds"


def calibration_status(
    model: PreTrainedModel, calibration: Any, preprocessing: Mapping[str, Any] | None = None
) -> CalibrationStatus:
    """
    Compare a model with the one that was calibrated: τ, exit rule, labels, dtype, weights, and every other field of the
    configuration that the answers depend on. Nothing is cached, so the next call notices weights edited in place.

    Args:
        model (`PreTrainedModel`): a model that thinks in stages.
        calibration ([`Calibration`] or its `dict`): for instance `model.config.calibration`.
        preprocessing (`dict`, *optional*): how images are resized and cut for the model, where that is to be compared
            as well: the `facts` of a [`~hf_thinkingvit.windows.WindowPlan`].

    Returns:
        [`CalibrationStatus`]; its `holds` is true only if everything could be compared and is equal. It does not cover
        a τ or a keep rate passed to `forward`, a pipeline or an engine instead of the configuration's, nor, without
        `preprocessing`, images that are prepared otherwise.
    """
    calibration = calibration if isinstance(calibration, Mapping) else calibration.to_dict()
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if not thinks_in_stages(model):
        return CalibrationStatus(changed=("the model, which does not think in stages",))
    changed, unverified = [], []
    threshold, conditions = calibration.get("threshold"), calibration.get("conditions")
    if threshold is None:
        unverified.append("its τ was not recorded")
    elif not _same_thresholds(threshold, model.config):
        changed.append(f"τ ({threshold} then, {model.config.threshold} now)")
    if not conditions:
        unverified.append("which weights, dtype and exit criterion it was measured with was not recorded")
    else:
        now = model_conditions(model)
        if preprocessing is not None:
            now["preprocessing"] = dict(preprocessing)
            if "preprocessing" not in conditions:
                unverified.append("how images were resized and cut was not recorded")
        changed += differences(with_present_names(conditions, model.config), now)
        if conditions.get("weights") is None or now["weights"] is None:
            unverified.append("the weights cannot be compared (sharded, quantized, or not loaded)")
    return CalibrationStatus(tuple(changed), tuple(unverified))


def _same_thresholds(threshold: Any, config: PreTrainedConfig) -> bool:
    exits = config.num_stages - 1
    try:
        return resolve_thresholds(threshold, exits) == resolve_thresholds(config.threshold, exits)
    except ValueError:  # for another number of exits
        return False


def with_present_names(conditions: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """`conditions` with fields that earlier versions saved under other names renamed to the present ones."""
    return {config.attribute_map.get(name, name): value for name, value in conditions.items()}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which conditions differ, in words. If either weights fingerprint is missing, the weights are not compared."""
    found = []
    for name, value in then.items():
        if name == "weights":
            if value is not None and now.get(name, value) not in (value, None):
                found.append("the weights")
        elif name == "labels":
            if now.get(name, value) != value:
                found.append("the labels")
        elif name in now and now[name] != value:
            before, after = _unequal(value, now[name])
            found.append(f"{WORDS.get(name, f'`{name}`')} ({before} then, {after} now)")
        elif name not in now and name not in NOT_OF_MODEL:
            found.append(f"`{name}` ({value} then, no such field now)")
    return found


def _unequal(then: Any, now: Any) -> tuple[Any, Any]:
    """Of two mappings, the entries that differ; other values as they are."""
    if not isinstance(then, Mapping) or not isinstance(now, Mapping):
        return then, now
    names = [name for name in sorted({**then, **now}) if then.get(name) != now.get(name)]
    return tuple(", ".join(f"{name} {facts.get(name)}" for name in names) for facts in (then, now))


def check_same_model(conditions: Mapping[str, Any], model_or_config: PreTrainedModel | PreTrainedConfig) -> None:
    """
    Refuse a model other than the measured one. For a configuration alone, dtype and weights are not compared.

    Raises:
        ValueError: if they differ; the message names what differs.
    """
    if isinstance(model_or_config, nn.Module):
        now = model_conditions(model_or_config)
        config = extract_model_from_parallel(model_or_config, keep_torch_compile=False).config
    else:
        now, config = _config_conditions(model_or_config), model_or_config
    if found := differences(with_present_names(conditions, config), now):
        raise ValueError(
            f"This calibration was measured on another model; different are: {'; '.join(found)}. Apply it to the model "
            "that was measured, as it was then, or calibrate this one."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
