"""
Classify many images with full batches at every stage, and write one line per image:

    python examples/classify_folder.py --model examples/checkpoints/thinkingvit-cifar10 --dataset examples/images

The same as `hf-thinkingvit classify` (`--help` lists all options). In Python, what it does is in essence

    for result in AdaptiveEngine(model, processor, batch_size=64, on_error="return")(paths):
        print(result.index, result.exit_stage, result.logits)

with the engine of `hf_thinkingvit.inference`.
"""

from hf_thinkingvit.commands.classify import main


if __name__ == "__main__":
    main()
