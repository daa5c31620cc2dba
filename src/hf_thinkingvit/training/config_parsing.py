"""A training run from a command line: the file named by `--config`, and flags that override it."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..families import FAMILIES
from ..flags import as_flag, named_arguments, with_flags
from .config import TrainingConfig, unknown_field
from .config_help import NOTHING, RunParser, run_parser


def _flags(name: str, value: Any) -> list[str]:
    """A field of the file as command-line words, so that both go through one parser and one check of types."""
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)] if value else []
    default = TrainingConfig.__dataclass_fields__[name].default
    if value is None and default is None:
        return []
    if value is False and isinstance(default, str):  # YAML reads an unquoted `no` as False
        return [f"--{name}", "no"]
    return [f"--{name}", "none" if value is None else str(value)]


def parse_config(
    arguments: list[str] | None = None, prog: str | None = None, description: str | None = None
) -> TrainingConfig:
    """
    The configuration of a command line: the file named by `--config`, and flags that override it.

    Args:
        arguments (`list[str]`, *optional*): the words; by default those of this process.
        prog, description (`str`, *optional*): of `--help`.

    Raises:
        SystemExit: with code 2, for flags and fields that do not exist, with the nearest that does, for values of a
            wrong type, and for values that cannot work together. The message is one line and names the file if it is
            the file that is wrong.
    """
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", type=Path)
    files.add_argument("--model_type", "--model-type")
    chosen, _ = files.parse_known_args(arguments)
    parser = run_parser(prog, description, chosen.model_type if chosen.model_type in FAMILIES else None)
    fields = {} if chosen.config is None else _read_file(parser, chosen.config)
    model = fields.pop("model", None) or {}
    words = [word for name, value in fields.items() for word in _flags(name, value)]
    parser.where = f"{chosen.config}: "
    parser.parse_known_args(words)  # an error of the file is one of the file
    parser.where = ""
    words += sys.argv[1:] if arguments is None else arguments
    config, _, rest = parser.parse_args_into_dataclasses(words, return_remaining_strings=True, look_for_args_file=False)
    names = [entry.name for entry in dataclasses.fields(TrainingConfig)]
    for name in names:
        if getattr(config, name) in NOTHING:
            setattr(config, name, None)
    try:
        flags = _model_flags(rest, names)
        config.model = {name: _as_number(value) for name, value in {**model, **flags}.items()}
        config.check()
    except ValueError as error:
        message = str(error)
        given = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in arguments or sys.argv[1:]}
        of_file = {*fields, *(f"model.{name}" for name in model)} - given
        if of_file & set(named_arguments(message)):
            parser.where = f"{chosen.config}: "
        else:
            message = with_flags(message, parser)
        parser.error(message)
    return config


def fields_parser(prog: str | None, description: str | None, without: Sequence[str] = ()) -> RunParser:
    """A parser of the fields of a `TrainingConfig` that are given, without defaults; some fields may be left out."""
    parser = run_parser(prog, description, None)
    for action in list(parser._actions):
        if action.dest in (*without, "config"):
            parser._remove_action(action)
            for group in parser._action_groups:
                if action in group._group_actions:
                    group._group_actions.remove(action)
            for option in action.option_strings:
                parser._option_string_actions.pop(option)
        action.default = argparse.SUPPRESS
    return parser


def given_fields(parser: RunParser, namespace: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """
    The fields of a `TrainingConfig` that a command line gives, and no others: by name, `model` as a dict.

    Args:
        parser (`RunParser`): from `fields_parser`.
        namespace (`argparse.Namespace`), rest (`list[str]`): what its `parse_known_args` returned.

    Raises:
        SystemExit: with code 2, for flags that do not exist.
    """
    names = [entry.name for entry in dataclasses.fields(TrainingConfig)]
    fields = {name: value for name, value in vars(namespace).items() if name in names}
    fields = {name: None if value in NOTHING else value for name, value in fields.items()}
    try:
        model = _model_flags(rest, [option[2:] for option in parser._option_string_actions])
    except ValueError as error:
        parser.error(str(error))
    return {**fields, **({"model": {name: _as_number(value) for name, value in model.items()}} if model else {})}


def _read_file(parser: RunParser, path: Path) -> dict[str, Any]:
    """The fields of a YAML file."""
    if not path.is_file():
        parser.error(f"there is no configuration file {path}")
    parser.where = f"{path}: "
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f"line {mark.line + 1}: "
        parser.error(f"{line}no valid YAML: {getattr(error, 'problem', None) or error}")
    names = [entry.name for entry in dataclasses.fields(TrainingConfig)]
    if not isinstance(fields, dict):
        parser.error("it must hold `field: value` lines")
    for name in fields:
        if name not in names:
            parser.error(unknown_field(name, names))
    if not isinstance(fields.get("model") or {}, dict):
        parser.error("`model` must hold `field: value` lines of the model's configuration")
    parser.where = ""
    return fields


def _read(word: str) -> Any:
    try:
        return None if word.lower() in NOTHING else yaml.safe_load(word)
    except yaml.YAMLError:
        raise ValueError(f"`{word}` is no value: quote lists ('[3, 6]'), or leave out the brackets (3 6).") from None


def _as_number(value: Any) -> Any:
    """YAML reads 5e-4 and none as text."""
    if isinstance(value, list):
        return [_as_number(entry) for entry in value]
    if isinstance(value, str) and value.lower() in NOTHING:
        return None
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _model_flags(words: list[str], names: list[str]) -> dict[str, Any]:
    """`--model.name value ...`, the values read as YAML."""
    fields: dict[str, list] = {}
    values: list = []
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            if not name.startswith("model."):
                raise ValueError(unknown_field(name, [as_flag(known)[2:] for known in names], "flag", "--"))
            # As everywhere on a command line, a flag given twice means the second.
            name = name.removeprefix("model.").replace("-", "_")
            values = fields[name] = [_read(value)] if value else []
        elif not fields:
            raise ValueError(f"`{word}` belongs to no flag.")
        else:
            values.append(_read(word))
    for name, given in fields.items():
        if not given:
            raise ValueError(f"`{as_flag(f'model.{name}')}` needs a value.")
    return {name: given[0] if len(given) == 1 else given for name, given in fields.items()}
