"""
Train a model as a YAML file and flags configure it, on one device or several:

    accelerate launch examples/train.py --config examples/configs/thinkingvit_3_6_imagenet.yaml
    accelerate launch examples/train.py --config examples/configs/thinkingvit_digits.yaml --epochs 5 --resume auto

The same as `hf-thinkingvit train` (`--help` lists all options). Needs `pip install "hf-thinkingvit[train]"`.
"""

from hf_thinkingvit.commands.train import main


if __name__ == "__main__":
    main()
