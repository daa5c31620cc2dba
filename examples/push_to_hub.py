"""
Publish a trained model: weights, image processor, code and a model card with the measured results.

    python examples/push_to_hub.py --model MODEL --repo-id org/name --results results.json --dry-run FOLDER
    python examples/push_to_hub.py --model MODEL --repo-id org/name --results results.json --license mit --space

`--space` also publishes a demo of the model as a Space. The same as `hf-thinkingvit push` (`--help` lists all options),
and as `push` and `push_space` of `hf_thinkingvit.hub` in Python.
"""

from hf_thinkingvit.commands.push import main


if __name__ == "__main__":
    main()
