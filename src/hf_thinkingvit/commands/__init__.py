"""
The commands of `hf-thinkingvit`, which the scripts in `examples/` run as well: one module each, with `main(words)`.

`options.py` states their options, which are read before anything large is imported; a module does the work (`run`) with
what the rest of the package offers. `train` and `finetune` take the fields of a training run as well. `command.py` has
what all of them share, `loading.py` and `evaluation.py` what commands with a model share.
"""

# What `hf-thinkingvit --help` lists, in the order in which they are needed. Imported when they are run.
COMMANDS = {
    "convert": "an official checkpoint to a folder that from_pretrained and pipeline load",
    "finetune": "a model for a folder of images, with a calibrated τ",
    "train": "a model as a YAML file and flags configure it",
    "sweep": "accuracy and cost at every τ",
    "analyze": "gains by class, entropies by stage, the easiest and the hardest images",
    "calibrate": "τ for a limit on the loss of accuracy, or for a budget",
    "classify": "a folder or dataset of images, to JSONL or Parquet",
    "segment": "the images of a folder in sliding windows",
    "export": "to ONNX",
    "push": "a model with its card to the Hub, or to a folder",
}
