"""
Train a ThinkingViT or A-ViT, on one device or several:

    accelerate launch examples/train.py --config examples/configs/thinkingvit_3_6_imagenet.yaml
    accelerate launch examples/train.py --config examples/configs/thinkingvit_digits.yaml --epochs 5 --resume auto

The file configures the run. Every field of it is also a flag (`--help`), and so are the fields of the model's
configuration: `--model.patch_size 4`. Needs `pip install "hf-thinkingvit[train]"`.
"""

from hf_thinkingvit.training import parse_config, train


if __name__ == "__main__":
    train(parse_config())
