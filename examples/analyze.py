"""
Look at a model's answers image by image: which classes gain from the later stages (or how deep an A-ViT goes for them),
the entropies of right and wrong answers at every stage, and the images that leave first and go on longest.

    python examples/analyze.py --model examples/checkpoints/thinkingvit-cifar10 --dataset uoft-cs/cifar10

The same as `hf-thinkingvit analyze` (`--help` lists all options).
"""

from hf_thinkingvit.commands.analyze import main


if __name__ == "__main__":
    main()
