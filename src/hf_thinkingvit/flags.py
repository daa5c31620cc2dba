"""Command lines: parsers whose errors are one line, and messages that call arguments by their flags."""

import argparse
import os
import re
import select
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class LineParser(argparse.ArgumentParser):
    """
    A parser whose errors are one line, without the usage. `where`, such as the name of a file, begins them.

    Flags are spelled with dashes, in the help and in messages; on a command line, underscores will do as well.
    """

    where = ""

    def add_argument(self, *names: str, **options) -> argparse.Action:
        return super().add_argument(*dict.fromkeys(map(with_dashes, names)), **options)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([with_dashes(str(word)) for word in words], namespace)

    def error(self, message: str) -> None:
        print(f"{self.prog}: error: {self.where}{message} (--help lists the options)", file=sys.stderr)
        raise SystemExit(2)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and each option's default, where that says anything."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS) or action.default == []:
            return action.help
        return super()._get_help_string(action)


def with_dashes(word: str) -> str:
    """A word of a command line with dashes instead of underscores in the name of a flag; others as they are."""
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if re.fullmatch(r"--[A-Za-z][\w.-]*", name) else word


def as_flag(name: str) -> str:
    """The flag of an argument or a field."""
    return f"--{name.replace('_', '-')}"


def stdout_is_closed() -> bool:
    """Whether nobody reads the output of this process any more; another pipe may have broken instead."""
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # not a file
        return False
    if not hasattr(select, "poll"):  # on Windows
        return True
    poll = select.poll()
    poll.register(descriptor, 0)  # errors are always reported
    return bool(poll.poll(0))


@contextmanager
def quiet_pipe() -> Iterator[None]:
    """A context, usable as a decorator too, that ends the process quietly if its output is not read to the end."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not stdout_is_closed():
            raise
        # Python flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # what a shell reports of programs that end so


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
            return f"`{as_flag(name)}{value}`"
        return f"`{flags[name]}{value}`" if name in flags else found[0]

    message = re.sub(r"`(?P<name>[a-z][a-z_0-9.]*)(?P<value>(?:=[^`]*)?)`", spell, message)
    return re.sub(r"`(--[a-z-]+)` \(\1\)", r"`\1`", message)  # of messages that name both


def named_arguments(message: str) -> Iterable[str]:
    """The names of arguments between backticks in a message."""
    return re.findall(r"`([a-z][a-z_0-9.]*)(?:=[^`]*)?`", message)
