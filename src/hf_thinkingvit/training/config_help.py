"""The parser of a training run's fields: flags in groups, with defaults, and the model's own fields."""

import dataclasses
from collections.abc import Callable
from typing import Any

from transformers import HfArgumentParser, PreTrainedConfig

from ..families import FAMILIES
from ..flags import HelpFormatter, LineParser, as_flag
from .config import TrainingConfig


# The first field of each group, in the order of the class.
GROUPS = {
    "dataset": "input and output",
    "model_type": "model",
    "train_split": "data",
    "epochs": "optimisation",
    "image_mean": "augmentation and preprocessing",
    "label_smoothing": "loss",
    "mixed_precision": "machine",
    "save_steps": "checkpoints and reports",
}
NOTHING = ("none", "null")  # words for the value `None`, also in another case


class RunParser(LineParser, HfArgumentParser):
    """The parser of `TrainingConfig`."""


USAGE = "%(prog)s [--config FILE] [--FIELD VALUE ...] [--model.FIELD VALUE ...]"


def run_parser(prog: str | None, description: str | None, model_type: str | None) -> RunParser:
    """
    Args:
        prog, description (`str`, *optional*): of the help.
        model_type (`str`, *optional*): the family whose configuration's fields the help lists.
    """
    parser = RunParser(
        TrainingConfig,
        prog=prog,
        usage=USAGE,
        allow_abbrev=False,
        description=description,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--config", help="YAML file of the fields below; flags override it")
    _into_groups(parser)
    for action in parser._actions:
        field = TrainingConfig.__dataclass_fields__.get(action.dest)
        if field is not None and field.default is None and action.type is not None:
            action.type = _or_nothing(action.type)
    parser.epilog = model_fields_help(model_type or TrainingConfig.model_type)
    return parser


def _into_groups(parser: RunParser) -> None:
    """Move the fields' flags from argparse's one group of options to titled groups."""
    group = None
    for action in list(parser._optionals._group_actions):
        if action.dest in GROUPS:
            group = parser.add_argument_group(GROUPS[action.dest])
        if group is not None and action.dest in TrainingConfig.__dataclass_fields__:
            parser._optionals._group_actions.remove(action)
            group._group_actions.append(action)


def _or_nothing(type_: Callable[[str], Any]) -> Callable[[str], Any]:
    def convert(word: str) -> Any:
        return None if word.lower() in NOTHING else type_(word)

    convert.__name__ = getattr(type_, "__name__", "value")  # argparse names it in errors
    return convert


def model_fields_help(model_type: str) -> str:
    """The fields of a family's own configuration with their defaults, as text."""
    config_class = FAMILIES[model_type].config_class
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    lines = [f"fields of the model's configuration (--model-type {model_type}), with defaults:"]
    for field in dataclasses.fields(config_class):
        if field.name in common or field.name == "label_smoothing":
            continue
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        lines.append(f"  {as_flag(f'model.{field.name}')} {default}")
    return "\n".join(lines)
