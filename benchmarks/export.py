"""
The exported ONNX file under onnxruntime against the PyTorch model, one image at a time, taking turns:

    python -m benchmarks.export
    python -m benchmarks.export --family thinking_swin

Pixels in, logits out, 224 × 224, random weights, on the CPU in float32, at two τ: with one the image exits after the
first stage, with the other it runs all stages. That both give the same logits and exits is checked first.
"""

import argparse
import statistics
import tempfile

import numpy as np
import onnxruntime
import torch

from benchmarks.inference import spread_entropies
from benchmarks.measure import describe_run, measure, median_and_quartiles
from benchmarks.rivals import FAMILIES
from hf_thinkingvit.inference import export_onnx


# τ of `topk_entropy`: no entropy is below the first, and all are below the second.
NEVER, ALWAYS = 0.0, 1e3


def session_of(path: str, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Otherwise its idle threads spin on the cores that the PyTorch model is timed on.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options)


@torch.no_grad()
def compare(family: str, repeats: int, threads: int) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family].build().eval()
    spread_entropies(model)
    pixel_values = torch.randn(1, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder:
        session = session_of(str(export_onnx(model, folder).adaptive), threads)
    for name, threshold in {"first stage": ALWAYS, "all stages": NEVER}.items():
        thresholds = np.full(model.config.num_stages - 1, threshold, dtype=np.float32)
        feed = {"pixel_values": pixel_values.numpy(), "threshold": thresholds}
        expected = model(pixel_values, threshold=threshold)
        logits, exit_stage, _ = session.run(None, feed)
        np.testing.assert_allclose(logits, expected.logits, atol=1e-3, rtol=1e-3)
        assert exit_stage[0] == expected.exit_stage[0]
        rivals = {
            "model": lambda threshold=threshold: model(pixel_values, threshold=threshold),
            "onnxruntime": lambda feed=feed: session.run(None, feed),
        }
        seconds = measure(rivals, repeats, pixel_values.device)
        ours, theirs = (statistics.median(seconds[rival]) * 1e3 for rival in rivals)
        ratio = median_and_quartiles([one / other for one, other in zip(seconds["model"], seconds["onnxruntime"])])
        print(f"| {family} | {name} | {ours:.1f} | {theirs:.1f} | {ratio} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(FAMILIES), default="thinkingvit")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"onnxruntime {onnxruntime.__version__}, {describe_run(torch.device('cpu'), 'float32')}")
    print("| family | until | model, ms | onnxruntime, ms | model / onnxruntime |\n|---|---|---|---|---|")
    compare(arguments.family, arguments.repeats, arguments.threads)


if __name__ == "__main__":
    main()
