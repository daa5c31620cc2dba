"""Converts an official checkpoint. `options.py` has its options and description."""

import argparse
import shlex

from ..conversion import convert_checkpoint
from . import command
from .evaluation import segments


# Fields that some official checkpoints do not state.
STATED = ("thinking_stages", "head_rounds", "gate_scale", "gate_center", "pruning_layers", "pruning_keep_rate")


def run(arguments: argparse.Namespace) -> None:
    overrides = {name: getattr(arguments, name) for name in STATED if getattr(arguments, name) is not None}
    if arguments.threshold is not None:
        overrides["threshold"] = command.one_or_list(arguments.threshold)
    model = convert_checkpoint(arguments.source, arguments.output_dir, **overrides)
    print(f"{type(model).__name__}, {model.num_parameters() / 1e6:.2f} M parameters, written to {arguments.output_dir}")
    following = "segment" if segments(model) else "classify"
    command.say(next=f"hf-thinkingvit {following} --model {shlex.quote(arguments.output_dir)} --dataset FOLDER")


def main(words: list[str] | None = None, prog: str | None = None) -> None:
    command.run_command("convert", words, prog)


if __name__ == "__main__":
    main()
