"""
Export a model to ONNX, and compare its predictions under onnxruntime with the PyTorch model's:

    python examples/export_onnx.py --model examples/checkpoints/thinkingvit-cifar10 --dataset examples/images

The same as `hf-thinkingvit export` (`--help` lists all options). In Python, `export_onnx(model, folder)` of
`hf_thinkingvit.inference` writes the files. Needs the extra `onnx`.
"""

from hf_thinkingvit.commands.export import main


if __name__ == "__main__":
    main()
