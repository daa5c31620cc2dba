"""
From a folder of images to a calibrated adaptive model, card and reports in one folder:

    hf-thinkingvit finetune photos/ --source examples/checkpoints/thinkingvit-cifar10

`photos/` holds one folder of images a label; any dataset that `datasets` reads will do. The source is a plain ViT, DeiT
or Swin, an official checkpoint, or a model of this package. Epochs, batch, learning rates, augmentation and the rest
follow from the number of images; each can be given as a flag of `hf-thinkingvit train`, such as `--epochs 20`,
`--learning-rate 5e-4`, `--horizontal-flip 0`, `--mixed-precision bf16`, `--seed 1` or `--model.threshold 0.5`.
"""

import argparse
import sys
from collections.abc import Callable

from ..flags import LineParser
from . import command


def build_parser(prog: str | None) -> LineParser:
    from ..training.config_parsing import fields_parser
    from ..training.finetuning import RESERVED

    parser = fields_parser(prog, __doc__, without=[name for name in RESERVED if name not in ("dataset", "output_dir")])
    parser.usage = (
        "%(prog)s DATASET --source SOURCE [--output-dir FOLDER] [--FIELD VALUE ...] [--model.FIELD VALUE ...]"
    )
    own = parser.add_argument_group("fine-tuning")
    own.add_argument(
        "images", nargs="?", metavar="DATASET", help="folder of images (one folder a label), Hub id, Parquet"
    )
    own.add_argument("--source", help="what to start from: folder, file or Hub id")
    own.add_argument(
        "--held-out", type=float, default=0.2, help="share of the images to choose the epoch and τ by (default: 0.2)"
    )
    own.add_argument(
        "--max-drop", type=float, default=0.02, help="greatest fall of accuracy that τ may cause (default: 0.02)"
    )
    own.add_argument(
        "--delta", type=float, default=0.1, help="probability with which it may fall by more (default: 0.1)"
    )
    own.add_argument("--debug", action="store_true", help=command.DEBUG_HELP)
    parser._action_groups.remove(own)
    parser._action_groups.insert(0, own)  # first in the help
    return parser


def run(finetune: Callable, parser: LineParser, arguments: argparse.Namespace, rest: list[str]) -> None:
    from accelerate import PartialState

    from ..training.config_parsing import given_fields

    fields = given_fields(parser, arguments, rest)
    dataset, output_dir = fields.pop("dataset", arguments.images), fields.pop("output_dir", "outputs/finetuned")
    if dataset is None:
        raise ValueError("Name the images: `hf-thinkingvit finetune FOLDER --source SOURCE`.")
    if arguments.source is None:
        raise ValueError(
            "Name what to start from with --source: a plain ViT, DeiT or Swin, an official checkpoint, or a model of "
            "this package, such as examples/checkpoints/thinkingvit-cifar10."
        )
    choices = {"held_out": arguments.held_out, "max_drop": arguments.max_drop, "delta": arguments.delta}
    done = finetune(dataset, arguments.source, output_dir, **choices, **fields)
    if PartialState().is_main_process:
        print(done.summary)


def check_paths(words: list[str], prog: str | None) -> None:
    """`FileNotFoundError` for a missing source or folder of images; before the fields of a run are known."""
    parser = LineParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--source")
    parser.add_argument("--dataset", default=words[0] if words and not words[0].startswith("-") else None)
    command.check_paths(parser.parse_known_args(words)[0])


@command.quiet_pipe()
def main(words: list[str] | None = None, prog: str | None = None) -> None:
    words = sys.argv[1:] if words is None else list(words)
    with command.user_errors(LineParser(prog=prog), "--debug" in words):
        check_paths(words, prog)
        command.import_package()
        from ..training import finetune  # first, because it says which package is missing

        parser = build_parser(prog)
    arguments, rest = parser.parse_known_args(words)
    with command.user_errors(parser, arguments.debug):
        run(finetune, parser, arguments, rest)


if __name__ == "__main__":
    main()
