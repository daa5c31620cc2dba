"""
Train a model as a YAML file and flags configure it, on one device or several:

    hf-thinkingvit train --config examples/configs/thinkingvit_digits.yaml --epochs 5 --resume auto
    accelerate launch -m hf_thinkingvit.commands train --config examples/configs/thinkingvit_3_6_imagenet.yaml

Every field of the file is also a flag, and so are the fields of the model's configuration: `--model.patch-size 4`. The
defaults are the published recipe for ImageNet; `finetune` chooses them for a folder of images.
"""

import sys

from ..flags import LineParser
from . import command


@command.quiet_pipe()
def main(words: list[str] | None = None, prog: str | None = None) -> None:
    words = sys.argv[1:] if words is None else list(words)
    debug = "--debug" in words
    parser = LineParser(prog=prog, allow_abbrev=False)  # for the name in errors that come later
    with command.user_errors(parser, debug):
        command.import_package()
        from ..training import parse_config, train

        config = parse_config([word for word in words if word != "--debug"], prog, __doc__)
        train(config)


if __name__ == "__main__":
    main()
