"""
Fine-tune a model on a folder of images, calibrate its τ, and write model, card and reports to one folder:

    python examples/finetune.py photos/ --source examples/checkpoints/thinkingvit-cifar10

The same as `hf-thinkingvit finetune` (`--help` lists all options), and in Python:

    from hf_thinkingvit.training import finetune

    done = finetune("photos", "examples/checkpoints/thinkingvit-cifar10", "outputs/finetuned")

Needs `pip install "hf-thinkingvit[train]"`.
"""

from hf_thinkingvit.commands.finetune import main


if __name__ == "__main__":
    main()
