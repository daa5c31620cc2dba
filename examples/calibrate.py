"""
Choose τ for a limit on the loss of accuracy, or for a budget of compute:

    python examples/calibrate.py --model MODEL --dataset uoft-cs/cifar10 --max-drop 0.01 --delta 0.05
    python examples/calibrate.py --model MODEL --dataset uoft-cs/cifar10 --gmacs 0.03

The same as `hf-thinkingvit calibrate` (`--help` lists all options). In Python, what it does is in essence

    answers, _ = evaluate_thresholds(model, "uoft-cs/cifar10", processor)
    calibrate_risk(answers, epsilon=0.01, delta=0.05).apply(model)

with functions of `hf_thinkingvit.evaluation`.
"""

from hf_thinkingvit.commands.calibrate import main


if __name__ == "__main__":
    main()
