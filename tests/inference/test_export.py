import copy
import json

import numpy as np
import pytest
import torch

from hf_thinkingvit import EXIT_CRITERIA
from hf_thinkingvit.inference import export_adaptive, export_onnx, export_stages
from tests.models.test_modeling_avit import lively_avit
from tests.utils import lively_model, lively_swin, random_images


def exits_at_every_stage(images: torch.Tensor, make=lively_model, **config):
    """A model, with τ at which some images exit at each stage."""
    model = make(**config)
    with torch.no_grad():
        stage_logits = model(images, output_stage_logits=True).stage_logits
    score = EXIT_CRITERIA[model.config.exit_criterion].score
    scores = [score(logits, model.config.entropy_top_k).sort().values for logits in stage_logits[:-1]]
    middle = len(images) // 2
    model.config.threshold = [float((score[middle - 1] + score[middle]) / 2) for score in scores]
    with torch.no_grad():
        assert model(images).exit_stage.unique().numel() == model.config.num_stages
    return model


MODELS = {
    "three stages, margin, distillation token, pruning": {
        "num_hidden_layers": 1,
        "pruning_layers": [0],
        "pruning_keep_rate": 0.3,
        "exit_criterion": "margin",
        "use_distillation_token": True,
    },
    "swin": {"make": lively_swin, "head_rounds": [[1, 2], [2, 4]], "window_size": 3},
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_stage_programs_give_the_models_answers(name):
    images = random_images(9)
    model = exits_at_every_stage(images, **MODELS[name])
    expected = model(images)
    programs = [program.module() for program in export_stages(model)]
    threshold = torch.tensor(model.config.threshold)
    state, rows = {"pixel_values": images}, torch.arange(len(images))
    logits, exit_stage = torch.zeros_like(expected.logits), torch.zeros_like(expected.exit_stage)
    for stage, program in enumerate(programs):
        answer = program(state, threshold)
        logits[rows], exit_stage[rows] = answer["logits"], stage
        rows = rows[~answer["exits"]]
        state = {name: tensor[~answer["exits"]] for name, tensor in answer["state"].items()}
    assert len(rows) == 0
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=0)
    assert torch.equal(exit_stage, expected.exit_stage)


@torch.no_grad()
def test_the_adaptive_program_gives_the_models_answers():
    images = random_images(9)
    model = exits_at_every_stage(images, thinking_stages=[2, 2], num_hidden_layers=2, exit_criterion="entropy")
    expected, program = model(images), export_adaptive(model).module()
    for index, image in enumerate(images.split(1)):
        answer = program(image, torch.tensor(model.config.threshold))
        torch.testing.assert_close(answer["logits"][0], expected.logits[index], atol=1e-5, rtol=0)
        assert answer["exit_stage"].item() == expected.exit_stage[index]
        torch.testing.assert_close(answer["entropy"][0], expected.entropy[index], atol=1e-5, rtol=0)


@pytest.fixture(
    scope="module", params=[pytest.param(fields, marks=pytest.mark.slow) for fields in MODELS.values()], ids=MODELS
)
def exported(request, tmp_path_factory):
    """A model, images, the model's answers, and the ONNX files."""
    pytest.importorskip("onnxscript")
    images = random_images(9)
    model = exits_at_every_stage(images, **request.param)
    with torch.no_grad():
        expected = model(images)
    # With gradients enabled, because exporters then decompose operations differently.
    return model, images, expected, export_onnx(model, tmp_path_factory.mktemp("onnx") / "exported")


class TestOnnx:
    """The files, run by onnxruntime."""

    @staticmethod
    def session(path):
        onnxruntime = pytest.importorskip("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(path, options)

    @staticmethod
    def threshold(model) -> np.ndarray:
        return np.array(model.config.threshold, dtype=np.float32)

    def test_the_adaptive_file(self, exported):
        model, images, expected, files = exported
        session = self.session(files.adaptive)
        for index, image in enumerate(images.split(1)):
            feed = {"pixel_values": image.numpy(), "threshold": self.threshold(model)}
            logits, exit_stage, entropy = session.run(None, feed)
            np.testing.assert_allclose(logits[0], expected.logits[index], atol=1e-4)
            np.testing.assert_allclose(entropy[0], expected.entropy[index], atol=1e-4)
            assert exit_stage[0] == expected.exit_stage[index]

    def test_the_adaptive_file_takes_a_threshold(self, exported):
        model, images, _, files = exported
        num_exits = model.config.num_stages - 1
        never = 2.0 if model.config.exit_criterion == "margin" else 0.0
        with torch.no_grad():
            expected = model(images[:1], threshold=never)
        feed = {"pixel_values": images[:1].numpy(), "threshold": np.full(num_exits, never, np.float32)}
        logits, exit_stage, _ = self.session(files.adaptive).run(None, feed)
        np.testing.assert_allclose(logits, expected.logits, atol=1e-4)
        assert exit_stage[0] == num_exits

    def test_threshold_is_required(self, exported):
        """With a default, OpenVINO would drop the input and always use that τ."""
        onnx = pytest.importorskip("onnx")
        _, images, _, files = exported
        with pytest.raises(ValueError, match="threshold"):
            self.session(files.adaptive).run(None, {"pixel_values": images[:1].numpy()})
        for path in (*files.stages, files.adaptive):
            graph = onnx.load(path).graph
            assert "threshold" in {value.name for value in graph.input}
            assert "threshold" not in {value.name for value in graph.initializer}

    def test_later_stages_lie_behind_a_conditional(self, exported):
        onnx = pytest.importorskip("onnx")
        model, _, _, files = exported
        graph, depth = onnx.load(files.adaptive).graph, 0
        num_attentions = model.config.num_hidden_layers
        while branches := [node for node in graph.node if node.op_type == "If"]:
            assert sum(node.op_type == "Softmax" for node in graph.node) <= 2 * num_attentions + 2  # those of one stage
            (graph,) = [a.g for a in branches[0].attribute if a.name == "else_branch"]
            depth += 1
        assert depth == model.config.num_stages - 1

    def test_the_stage_files(self, exported):
        model, images, expected, files = exported
        feed, rows = {"pixel_values": images.numpy()}, np.arange(len(images))
        logits = np.zeros(expected.logits.shape, np.float32)
        exit_stage, threshold = np.zeros(len(images), np.int64), self.threshold(model)
        for stage, path in enumerate(files.stages):
            session = self.session(path)
            outputs = dict(
                zip(
                    [output.name for output in session.get_outputs()],
                    session.run(None, {**feed, "threshold": threshold}),
                )
            )
            logits[rows], exit_stage[rows] = outputs["logits"], stage
            going_on = ~outputs["exits"]
            rows = rows[going_on]
            feed = {name: value[going_on] for name, value in outputs.items() if name.startswith("stage_")}
        np.testing.assert_allclose(logits, expected.logits, atol=1e-4)
        assert exit_stage.tolist() == expected.exit_stage.tolist()

    def test_the_first_stage_file_holds_only_what_it_reads(self, exported):
        onnx = pytest.importorskip("onnx")
        model, _, _, files = exported
        narrow, *_, wide = [stage.hidden_size for stage in model.config.stages]
        sizes = [
            sum(int(np.prod(weight.dims)) for weight in onnx.load(path).graph.initializer if weight.data_type == 1)
            for path in (files.stages[0], files.stages[-1])
        ]
        assert sizes[0] < 1.1 * narrow / wide * sizes[1]

    def test_files_say_nothing_of_the_machine(self, exported):
        *_, files = exported
        for path in (*files.stages, files.adaptive):
            assert b".py" not in path.read_bytes()

    def test_metadata(self, exported):
        onnx = pytest.importorskip("onnx")
        model, *_, files = exported
        metadata = {entry.key: entry.value for entry in onnx.load(files.adaptive).metadata_props}
        assert metadata["exit_criterion"] == model.config.exit_criterion
        assert metadata["model_type"] == model.config.model_type
        assert json.loads(metadata["threshold"]) == pytest.approx(model.config.threshold)
        assert '"0": "LABEL_0"' in metadata["id2label"]
        rate = getattr(model.config, "pruning_keep_rate", None)
        assert metadata.get("pruning_keep_rate") == (None if rate is None else json.dumps(rate))


def test_the_model_stays_as_it_was():
    model, images = lively_model(thinking_stages=[1, 4], num_hidden_layers=1), random_images(2)
    model.compile_stages([2], backend="eager")
    with torch.no_grad():
        expected = model(images).logits
    model.train()
    model.thinkingvit.layers[0].eval()
    export_adaptive(model)
    assert model.training
    assert not model.thinkingvit.layers[0].training
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images).logits, expected)


@torch.no_grad()
def test_one_stage_and_batches_of_any_size():
    model, images = lively_model(thinking_stages=[4], num_hidden_layers=1), random_images(17)
    (program,) = (program.module() for program in export_stages(model))
    expected = model(images).logits
    for count in (1, 2, 3, 17):
        logits = program({"pixel_values": images[:count]}, torch.zeros(0))["logits"]
        torch.testing.assert_close(logits, expected[:count], atol=1e-5, rtol=0)


def test_onnx_in_half_precision(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, images = lively_swin(head_rounds=[[2]], num_heads=[2], depths=[1]).half(), random_images(3).half()
    session = onnxruntime.InferenceSession(export_onnx(model, tmp_path, dtype=torch.float16).adaptive)
    assert model.config._attn_implementation == "sdpa"  # restored
    with torch.no_grad():
        expected = model(images, threshold=0.0)
    for image, logits, entropy in zip(images.split(1), expected.logits, expected.entropy, strict=True):
        feed = {"pixel_values": image.numpy(), "threshold": np.zeros(model.config.num_stages - 1, np.float32)}
        found, exit_stage, found_entropy = session.run(None, feed)
        np.testing.assert_allclose(found[0], logits, atol=2e-2)
        np.testing.assert_allclose(found_entropy[0], entropy, atol=2e-2)
        assert exit_stage[0] == model.config.num_stages - 1


def test_refuses_a_model_without_stages(tmp_path):
    for export in (export_stages, export_adaptive, lambda model: export_onnx(model, tmp_path / "onnx")):
        with pytest.raises(ValueError, match="does not think in stages"):
            export(lively_avit())
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_onnx_is_in_float32_whatever_the_model_is_in(dtype, tmp_path):
    """Checkpoints are often stored in half precision. The weights of the model itself do not change by a bit."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, images = lively_model(thinking_stages=[1, 4], num_hidden_layers=1).to(dtype), random_images(1)
    before = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in model.state_dict().items()}
    session = onnxruntime.InferenceSession(export_onnx(model, tmp_path).adaptive)
    feed = {"pixel_values": images.numpy(), "threshold": np.zeros(1, np.float32)}
    logits = session.run(None, feed)[0]
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype and tensor.data_ptr() == before[name][1] and torch.equal(tensor, before[name][0])
    with torch.no_grad():
        expected = model.float()(images, threshold=0.0).logits
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_exports_between_two_steps_of_training(tmp_path):
    """Gradients in the weights' dtype are restored after the export and accumulate further."""
    pytest.importorskip("onnxscript")
    model, images = lively_model(thinking_stages=[1, 4], num_hidden_layers=1), random_images(2)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        each(images, labels=torch.tensor([0, 1])).loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    export_onnx(model, tmp_path, dtype=torch.float16)
    for name, parameter in model.named_parameters():
        assert parameter.grad is grads[name] and parameter.dtype == torch.float32
    for each in (model, twin):
        each(images, labels=torch.tensor([2, 3])).loss.backward()
        torch.optim.SGD(each.parameters(), 0.1).step()
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)


def test_refuses_to_export_in_bfloat16(tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(ValueError, match=r"must be torch\.float32 or torch\.float16.*bfloat16"):
        export_onnx(lively_model(num_hidden_layers=1), tmp_path / "onnx", dtype=torch.bfloat16)
    assert not (tmp_path / "onnx").exists()
