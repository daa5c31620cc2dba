"""
Classify images with an exported model where torch is not installed:

    pip install --no-deps hf-thinkingvit
    pip install openvino transformers pillow numpy
    python examples/classify_without_torch.py outputs/openvino examples/images/*.png

The folder is what `hf-thinkingvit export --runtime openvino` writes, or `export_model` of `hf_thinkingvit.inference`,
with an image processor; for one of ONNX Runtime, install `onnxruntime` instead of `openvino`.
"""

import argparse

from hf_thinkingvit.torch_free import load_exported


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the exported folder")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--threshold", type=float, help="τ; by default that of the folder's config.json")
    parser.add_argument("--threads", type=int, help="CPU threads; by default as the runtime chooses")
    arguments = parser.parse_args(words)
    model = load_exported(arguments.folder, threads=arguments.threads)
    found = model.classify(arguments.images, threshold=arguments.threshold)
    for image, one in zip(arguments.images, found):
        print(f"{image}: {one.labels[0]} ({one.scores[0]:.3f}), stage {one.exit_stage}")


if __name__ == "__main__":
    main()
