"""`hf-thinkingvit COMMAND ...`, or `python -m hf_thinkingvit.commands COMMAND ...`."""

import difflib
import sys
from importlib import import_module

from ..flags import quiet_pipe
from ..version import __version__
from . import COMMANDS, options
from .command import run_command


@quiet_pipe()
def main(words: list[str] | None = None) -> None:
    """Run the command that the first word names; without one, list them."""
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
    elif words[0] == "--version":
        print(__version__)
    elif words[0] in COMMANDS:
        prog = f"hf-thinkingvit {words[0]}"
        if hasattr(options, words[0]):
            run_command(words[0], words[1:], prog)
        else:  # with the fields of a training run
            import_module(f".{words[0]}", __package__).main(words[1:], prog)
    else:
        nearest = difflib.get_close_matches(words[0], COMMANDS, n=1)
        suggestion = f" Did you mean `{nearest[0]}`?" if nearest else ""
        print(
            f"hf-thinkingvit: error: there is no command `{words[0]}`.{suggestion} There are {', '.join(COMMANDS)}.",
            file=sys.stderr,
        )
        raise SystemExit(2)


def _usage() -> str:
    lines = [f"  {name:<11}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: hf-thinkingvit COMMAND ... (`hf-thinkingvit COMMAND --help` lists its options)", "", *lines]
    )


if __name__ == "__main__":
    main()
