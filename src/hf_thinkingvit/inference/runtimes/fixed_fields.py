"""The configuration of an exported folder, and which of its fields are fixed in the programs."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from ...families import FAMILIES
from ...torch_free.manifest import check_has_threshold, check_unchanged, damaged, read_fields


# What a decision computes, beside the logits and τ. Programs without torch have them built in; the loop of PyTorch
# models, which also drives exported stages, reads them from the configuration.
JUDGED_FIELDS = ("exit_criterion", "exit_at_threshold", "entropy_top_k", "problem_type")


def read_config(folder: Path, fixed: Mapping[str, Any]) -> PreTrainedConfig:
    """
    The configuration of a folder, of which the fields `fixed` must have these values.

    Raises:
        ValueError: if it is damaged, or says something else than the programs.
    """
    given = read_fields(folder)
    try:
        config_class = FAMILIES[given["model_type"]].config_class
    except (KeyError, TypeError) as error:
        raise damaged(folder / CONFIG_NAME) from error
    check_has_threshold(given, folder)
    # Transformers' errors say what is wrong with a value.
    config = config_class.from_pretrained(folder)
    check_fixed(config, fixed)
    return config


def fixed_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """
    The configuration's fields that are fixed in the programs of stages, as JSON has them: all of the family's own but
    those that only training and exits read, and the number of labels.
    """
    own = {field.name for field in fields(config)} - {field.name for field in fields(PreTrainedConfig)}
    names = [*sorted(own - FAMILIES[config.model_type].free_fields), "num_labels"]
    return _as_json(config, ["model_type", *names])


def judged_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The configuration's fields that are fixed in the programs of decisions, as JSON has them."""
    return _as_json(config, JUDGED_FIELDS)


def _as_json(config: PreTrainedConfig, names) -> dict[str, Any]:
    return json.loads(json.dumps({name: getattr(config, name) for name in names}))


def check_fixed(config: PreTrainedConfig, fixed: Mapping[str, Any]) -> None:
    """`ValueError` if fields of the configuration have other values than those that are fixed in the programs."""
    check_unchanged(
        fixed_fields(config),
        fixed,
        "Only τ, exit criterion and labels may be changed: undo it, or change the PyTorch model and export it.",
    )
