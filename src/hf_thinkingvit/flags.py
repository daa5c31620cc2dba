"""Command lines: parsers whose errors are one line, and messages that call arguments by their flags."""

import argparse
import re
import sys
from collections.abc import Iterable


class LineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage. `where`, such as the name of a file, begins them."""

    where = ""

    def error(self, message: str) -> None:
        print(f"{self.prog}: error: {self.where}{message} (--help lists the options)", file=sys.stderr)
        raise SystemExit(2)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and each option's default, where that says anything."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS) or action.default == []:
            return action.help
        return super()._get_help_string(action)


def with_flags(message: str, parser: argparse.ArgumentParser) -> str:
    """A message in which names of arguments between backticks are the parser's flags, where it has such."""
    flags, switches = {}, set()
    for action in parser._actions:
        for flag in reversed([option for option in action.option_strings if option.startswith("--")]):
            flags[flag[2:].replace("-", "_")] = flag
            if action.nargs == 0:  # given by itself, without a value
                switches.add(flag[2:].replace("-", "_"))

    def spell(found: re.Match) -> str:
        name, value = found["name"], "" if found["name"] in switches else found["value"]
        if name.startswith("model."):
            return f"`--{name}{value}`"
        return f"`{flags[name]}{value}`" if name in flags else found[0]

    return re.sub(r"`(?P<name>[a-z][a-z_0-9.]*)(?P<value>(?:=[^`]*)?)`", spell, message)


def named_arguments(message: str) -> Iterable[str]:
    """The names of arguments between backticks in a message."""
    return re.findall(r"`([a-z][a-z_0-9.]*)(?:=[^`]*)?`", message)
