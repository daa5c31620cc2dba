"""
A page that shows the answers of a model's stages, the exit under any τ, and the compute spent:

    pip install ".[space]" && python examples/space/app.py

and open the address that it prints. Without options it shows the models and images of this repository; `--model` takes
any folders or Hub ids. `hf-thinkingvit push --space` publishes it for a model.
"""

from pathlib import Path


IMPORTS_HF_THINKINGVIT_LATER = True  # the page is painted before torch and Transformers are imported

if __name__ == "__main__":
    from hf_thinkingvit.demo.app import main

    main(Path(__file__).resolve().parent)
