"""
Convert an official checkpoint to a folder that from_pretrained and pipeline load:

    hf-thinkingvit convert NCPS/thinkingvit_deit-3h-6h-imagenet1k outputs/thinkingvit-3-6
"""

import argparse
import shlex
import sys

from ..conversion import convert_checkpoint
from . import command
from .evaluation import segments


# Fields that some official checkpoints do not state.
STATED = ("thinking_stages", "head_rounds", "gate_scale", "gate_center", "pruning_layers", "pruning_keep_rate")


def _heads(word: str) -> list[int]:
    return [int(heads) for heads in word.split(",")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="folder or Hub id in the timm-style layout, or a .pth / .pth.tar file")
    parser.add_argument("output_dir", help="folder to write")
    parser.add_argument("--threshold", type=float, nargs="+", metavar="τ", help="τ to store: one, or one per exit")
    unstated = parser.add_argument_group("what the source does not state")
    unstated.add_argument("--thinking-stages", type=int, nargs="+", metavar="HEADS", help="heads per stage")
    unstated.add_argument(
        "--head-rounds",
        type=_heads,
        nargs="+",
        metavar="HEADS,HEADS,...",
        help="of a Swin, heads per layer for each round: 3,3,6,12 3,6,12,24",
    )
    unstated.add_argument("--gate-scale", type=float, metavar="γ", help="of an A-ViT")
    unstated.add_argument("--gate-center", type=float, metavar="β", help="of an A-ViT")
    unstated.add_argument(
        "--pruning-layers",
        type=int,
        nargs="+",
        metavar="LAYER",
        help="of a model that prunes tokens, the layers before which it does",
    )
    unstated.add_argument(
        "--pruning-keep-rate", type=float, metavar="ρ", help="of a model that prunes tokens, the share that it keeps"
    )


def run(arguments: argparse.Namespace) -> None:
    overrides = {name: getattr(arguments, name) for name in STATED if getattr(arguments, name) is not None}
    if arguments.threshold is not None:
        overrides["threshold"] = command.one_or_list(arguments.threshold)
    model = convert_checkpoint(arguments.source, arguments.output_dir, **overrides)
    print(f"{type(model).__name__}, {model.num_parameters() / 1e6:.2f} M parameters, written to {arguments.output_dir}")
    following = "segment" if segments(model) else "classify"
    command.say(next=f"hf-thinkingvit {following} --model {shlex.quote(arguments.output_dir)} --dataset FOLDER")


def main(words: list[str] | None = None, prog: str | None = None) -> None:
    command.run_command(sys.modules[__name__], words, prog)


if __name__ == "__main__":
    main()
