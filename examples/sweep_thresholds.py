"""
Accuracy and cost of a model at every τ, from one pass over the images:

    python examples/sweep_thresholds.py --model examples/checkpoints/thinkingvit-cifar10 --dataset uoft-cs/cifar10

The same as `hf-thinkingvit sweep` (`--help` lists all options). In Python, what it does begins with

    answers, rows = evaluate_thresholds(model, "uoft-cs/cifar10", processor, [0.5, 1.0])

of `hf_thinkingvit.evaluation`. Needs `pip install "hf-thinkingvit[examples]"`.
"""

from hf_thinkingvit.commands.sweep import main


if __name__ == "__main__":
    main()
