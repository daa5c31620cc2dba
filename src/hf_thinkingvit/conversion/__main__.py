"""`python -m hf_thinkingvit.conversion SOURCE OUTPUT_DIR`: convert an official checkpoint to a Transformers folder."""

import argparse

from .convert import convert_checkpoint


def _heads(word: str) -> list[int]:
    return [int(heads) for heads in word.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hf_thinkingvit.conversion",
        description="Convert an official checkpoint to a folder that from_pretrained and pipeline load.",
    )
    parser.add_argument("source", help="folder or Hub id in the timm-style layout, or a .pth / .pth.tar file")
    parser.add_argument("output_dir", help="folder to write")
    parser.add_argument(
        "--thinking-stages",
        type=int,
        nargs="+",
        metavar="HEADS",
        help="heads per stage, if the source does not state them",
    )
    parser.add_argument(
        "--head-rounds",
        type=_heads,
        nargs="+",
        metavar="HEADS,HEADS,...",
        help="of a Swin, heads per layer for each round, if the source does not state them: 3,3,6,12 3,6,12,24",
    )
    parser.add_argument("--gate-scale", type=float, metavar="γ", help="of an A-ViT, if the source does not state it")
    parser.add_argument("--gate-center", type=float, metavar="β", help="of an A-ViT, if the source does not state it")
    parser.add_argument(
        "--pruning-layers",
        type=int,
        nargs="+",
        metavar="LAYER",
        help="of a model that prunes tokens, the layers before which it does, if the source does not state them",
    )
    parser.add_argument(
        "--pruning-keep-rate",
        type=float,
        metavar="ρ",
        help="of a model that prunes tokens, the share that it keeps, if the source does not state it",
    )
    parser.add_argument("--threshold", type=float, nargs="+", metavar="τ", help="τ to store: one, or one per exit")
    arguments = parser.parse_args()
    stated = {
        name: getattr(arguments, name)
        for name in (
            "thinking_stages",
            "head_rounds",
            "gate_scale",
            "gate_center",
            "pruning_layers",
            "pruning_keep_rate",
        )
    }
    overrides = {name: value for name, value in stated.items() if value is not None}
    if arguments.threshold is not None:
        overrides["threshold"] = arguments.threshold if len(arguments.threshold) > 1 else arguments.threshold[0]
    try:
        model = convert_checkpoint(arguments.source, arguments.output_dir, **overrides)
    except (OSError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{type(model).__name__}, {model.num_parameters() / 1e6:.2f} M parameters, written to {arguments.output_dir}")


if __name__ == "__main__":
    main()
