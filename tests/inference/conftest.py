"""Models whose stages every runtime runs: exported once a session, since that is the slow part."""

from functools import partial

import pytest
import torch

from hf_thinkingvit import EXIT_CRITERIA, EarlyExitViTConfig, EarlyExitViTForImageClassification
from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.inference import export_model, from_exported
from tests.utils import lively, lively_model, lively_swin, random_images


RUNTIME_FORMATS = {"openvino": "openvino", "onnxruntime": "onnx"}
NETWORKS = {"vit": partial(lively_model, num_hidden_layers=1), "swin": partial(lively_swin, depths=[1, 1])}


def need_runtime(runtime: str) -> None:
    """Skip the test where the runtime, or what exports to it, is not installed."""
    for package in {"openvino": ["openvino"], "onnxruntime": ["onnxruntime", "onnxscript"]}[runtime]:
        pytest.importorskip(package, reason=f"the runtime {runtime} needs {package}")


def with_exits(network):
    """The network, with τ at which some images exit and some go on."""
    images = random_images(60)
    with torch.no_grad():
        stage_logits = network(images, output_stage_logits=True).stage_logits
    scores = [EXIT_CRITERIA["topk_entropy"].score(logits, 10) for logits in stage_logits[:-1]]
    network.config.threshold = [score.quantile(0.4).item() for score in scores]
    return network


def early_exits(**fields) -> EarlyExitViTForImageClassification:
    """Two stages of one layer each, unless `fields` say otherwise."""
    config = EarlyExitViTConfig(
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=3,
        **{"num_hidden_layers": 2, "exit_layers": [1], "threshold": 0.5, **fields},
    )
    return lively(EarlyExitViTForImageClassification, config)


class ExportedNetworks:
    """The folders of networks exported so far, and models loaded from them."""

    def __init__(self, folder):
        self.folder, self.folders = folder, {}

    def path(self, network: str, runtime: str):
        need_runtime(runtime)
        if (network, runtime) not in self.folders:
            output_dir = self.folder / f"{network}-{runtime}"
            processor = evaluation_image_processor(32)
            model = with_exits(NETWORKS[network]())
            self.folders[network, runtime] = export_model(
                model, output_dir, RUNTIME_FORMATS[runtime], processor=processor
            )
        return self.folders[network, runtime]

    def load(self, network: str, runtime: str, **options):
        return from_exported(self.path(network, runtime), **options)


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) for name in ("openvino", "onnxruntime")])
def runtime(request):
    need_runtime(request.param)
    return request.param


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> ExportedNetworks:
    return ExportedNetworks(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="session")
def compiled():
    """A network with compiled stages, which tests share: compilation is slow."""
    network = with_exits(NETWORKS["vit"]())
    network.compile_stages([4, 16], backend="eager")
    return network


def give_little_memory(model, most: int, device: str, ran: list[int]) -> None:
    """Let steps of more than `most` images run out of memory as on `device`; `ran` gets the sizes of the others."""
    run_stage = model.run_stage

    def of_little_memory(stage_index, state, *args, **kwargs):
        rows = len(next(iter(state.values())))
        if rows > most:
            if device == "cpu":
                torch.empty(2**50)  # raises
            raise torch.OutOfMemoryError("CUDA out of memory")
        ran.append(rows)
        return run_stage(stage_index, state, *args, **kwargs)

    model.run_stage = of_little_memory


def iter_into(stream, found: list) -> None:
    """Append the results before an exception to `found`."""
    for result in stream:
        found.append(result)  # noqa: PERF402  extend() would lose the results before the exception
