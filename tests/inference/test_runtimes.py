"""Stages in OpenVINO and ONNX Runtime: the same answers as PyTorch, by the same loop, from a folder without weights."""

import json
import pickle
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from PIL import Image

from hf_thinkingvit import AdaptiveImageClassificationPipeline, EarlyExitViTConfig, EarlyExitViTForImageClassification
from hf_thinkingvit.inference import AdaptiveEngine, export_model, from_exported, with_runtime
from hf_thinkingvit.inference.runtimes import RUNTIMES, programs
from hf_thinkingvit.inference.runtimes.folder import read_manifest, sha256
from tests.inference.conftest import NETWORKS, need_runtime, with_exits
from tests.models.segmentation_models import lively_segmenter
from tests.models.test_modeling_avit import lively_avit
from tests.utils import lively, lively_model, random_images


pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporters


@pytest.fixture(params=["openvino", "onnxruntime"])
def runtime(request):
    need_runtime(request.param)
    return request.param


class TestAnswers:
    @pytest.mark.parametrize("network", NETWORKS)
    def test_equal_pytorchs(self, exported, runtime, network):
        """In float32; exits too, since no score of these images lies within rounding of τ."""
        images, model = random_images(60), with_exits(NETWORKS[network]())
        with torch.no_grad():
            expected = model(images, output_stage_logits=True)
        loaded = exported.load(network, runtime, threads=1)
        found = loaded(images, output_stage_logits=True)
        assert type(found) is type(expected)
        assert found.exit_stage.unique().tolist() == [0, 1, 2]
        assert torch.equal(found.exit_stage, expected.exit_stage)
        for stage in range(3):
            torch.testing.assert_close(found.stage_logits[stage], expected.stage_logits[stage], atol=1e-4, rtol=0)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.entropy, expected.entropy, atol=1e-4, rtol=0)
        for arguments in ({"threshold": 0.0, "max_stages": 2}, {"threshold": [9.0, 0.0]}):
            with torch.no_grad():
                expected = model(images[:5], **arguments)
            found = loaded(images[:5], **arguments)
            assert torch.equal(found.exit_stage, expected.exit_stage)
            torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)

    def test_of_the_engine(self, exported, runtime):
        """A program runs once for each batch of its stage, and no other way to the same results."""
        images, model = random_images(60), with_exits(NETWORKS["vit"]())
        expected = list(AdaptiveEngine(model, batch_size=16)(images))
        engine = AdaptiveEngine(exported.load("vit", runtime, threads=1), batch_size=16)
        for result, other in zip(engine(images), expected, strict=True):
            assert (result.index, result.exit_stage) == (other.index, other.exit_stage)
            torch.testing.assert_close(result.logits, other.logits, atol=1e-4, rtol=0)
            assert result.entropy == pytest.approx(other.entropy, abs=1e-4)
        assert engine.model.calls == engine.stats.batches
        assert engine.stats.rows[0] == 60 > engine.stats.rows[1] > engine.stats.rows[2] > 0

    def test_results_do_not_change_with_later_batches(self, exported, runtime):
        """Outputs have memory of their own, although a runtime could write them over those of its call before."""
        loaded, images = exported.load("vit", runtime, threads=1), random_images(8)
        first = loaded(images, threshold=0.0)
        before = first.logits.clone()
        loaded(-images, threshold=0.0)
        assert torch.equal(first.logits, before)

    def test_of_several_threads(self, exported, runtime):
        loaded = exported.load("vit", runtime, threads=1)
        batches = [random_images(8, seed=seed) for seed in range(4)]
        expected = [loaded(batch).logits for batch in batches]
        equal = []

        def run(batch, logits):
            equal.extend(torch.equal(loaded(batch).logits, logits) for _ in range(20))

        threads = [threading.Thread(target=run, args=pair) for pair in zip(batches, expected)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert equal == [True] * 80

    def test_criteria_with_memory(self):
        """What the exit rule remembers travels with the state, beside what the programs return."""
        need_runtime("openvino")
        config = EarlyExitViTConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
            num_labels=3,
            exit_layers=[1, 2],
            exit_criterion="patience",
            threshold=1.5,
        )
        model, images = lively(EarlyExitViTForImageClassification, config), random_images(30)
        loaded = with_runtime(model, "openvino", threads=1)
        with torch.no_grad():
            expected = model(images)
        found = loaded(images)
        assert len(expected.exit_stage.unique()) > 1
        assert torch.equal(found.exit_stage, expected.exit_stage)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)

    def test_of_segmentation(self):
        """Scores over pixels are the task's own, taken in float32 from what the program answers."""
        need_runtime("openvino")
        model, images = lively_segmenter(thinking_stages=[1, 4]), random_images(8)
        with torch.no_grad():
            scores = model(images, max_stages=1).entropy.sort().values
            model.config.threshold = ((scores[3] + scores[4]) / 2).item()
            expected = model(images)
        found = with_runtime(model, "openvino", threads=1)(images)
        assert type(found) is type(expected)
        assert found.exit_stage.tolist() == expected.exit_stage.tolist() and expected.exit_stage.sum() == 4
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.entropy, expected.entropy, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_in_half_precision(self, exported, precision):
        """The state has the dtype that OpenVINO computes in; answers and exits are judged in float32."""
        need_runtime("openvino")
        from hf_thinkingvit.inference.runtimes import openvino_program

        if openvino_program.CAPABILITIES[precision] not in openvino_program.capabilities():
            pytest.skip(f"this CPU does not compute in {precision}")
        images = random_images(20)
        expected = exported.load("vit", "openvino", threads=1)(images, threshold=0.0)
        loaded = exported.load("vit", "openvino", threads=1, precision=precision)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        state = loaded.run_stage(0, loaded.begin(images))
        assert {name: state[name].dtype for name in ("key", "embeddings", "pixel_values", "_answer.logits")} == {
            "key": dtype,
            "embeddings": dtype,
            "pixel_values": torch.float32,
            "_answer.logits": torch.float32,
        }
        found = loaded(images, threshold=0.0)
        difference = (found.logits - expected.logits).abs().max()
        assert 0 < difference < 0.1 * expected.logits.std()


class TestState:
    def test_is_not_copied(self, exported, runtime, monkeypatch):
        """From stage to stage, a whole batch that goes on is handed over in the memory it was written to."""
        loaded, images = exported.load("vit", runtime, threads=1), random_images(4)
        state = loaded.run_stage(0, loaded.begin(images))
        assert state["pixel_values"].data_ptr() == images.data_ptr()
        following = loaded.recycle(0, state)
        assert "_answer.logits" not in following
        assert all(following[name].data_ptr() == state[name].data_ptr() for name in following)
        after = loaded.run_stage(1, following)
        assert after["pixel_values"].data_ptr() == images.data_ptr()


class TestFolder:
    def test_holds_what_a_service_needs(self, exported, runtime):
        folder = exported.path("vit", runtime)
        names = {path.name for path in folder.iterdir()}
        assert {"config.json", "preprocessor_config.json", "export.json"} <= names
        assert not any(name.endswith((".safetensors", ".pt")) for name in names)
        loaded = from_exported(folder)
        assert loaded.processor.crop_size["height"] == 32
        assert loaded.config.id2label[0] == "LABEL_0"
        assert loaded.exit_rule().thresholds == tuple(with_exits(NETWORKS["vit"]()).config.threshold)
        assert runtime in json.loads((folder / "export.json").read_text())["versions"]

    def test_says_nothing_of_the_machine(self, exported, runtime):
        folder = exported.path("vit", runtime)
        for path in folder.iterdir():
            content = path.read_bytes()
            assert b".py" not in content and str(folder.parent).encode() not in content

    def test_loads_and_runs_without_the_code_of_models(self, exported, runtime):
        """In a new process, with the classes of models out of reach."""
        code = (
            "import sys, torch\n"
            "from hf_thinkingvit.inference import from_exported\n"
            "from torch import nn\n"
            "def refuse(*args, **kwargs): raise AssertionError('a module was built')\n"
            "nn.Module.__init__ = refuse\n"
            f"print(from_exported({str(exported.path('vit', runtime))!r})(torch.zeros(2, 3, 32, 32)).logits.shape)"
        )
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ran.stdout.strip().endswith("torch.Size([2, 12])"), ran.stderr[-2000:]

    def test_threshold_is_the_configurations(self, exported, runtime, tmp_path):
        folder = shutil.copytree(exported.path("vit", runtime), tmp_path / "copy")
        config = json.loads((folder / "config.json").read_text())
        config["threshold"] = 0.0
        (folder / "config.json").write_text(json.dumps(config))
        assert from_exported(folder)(random_images(3)).exit_stage.tolist() == [2, 2, 2]

    def test_pickles_as_its_folder(self, exported, runtime):
        loaded, images = exported.load("vit", runtime, threads=1), random_images(3)
        again = pickle.loads(pickle.dumps(loaded))
        assert torch.equal(again(images).logits, loaded(images).logits)
        assert again.runtime == runtime

    def test_damaged_or_of_another_version(self, exported, runtime, tmp_path):
        original = exported.path("vit", runtime)
        suffix = {"openvino": "bin", "onnxruntime": "onnx"}[runtime]

        def broken(name, change):
            folder = shutil.copytree(original, tmp_path / name)
            change(folder)
            return folder

        def truncate(folder):
            path = folder / f"stage_1.{suffix}"
            path.write_bytes(path.read_bytes()[:-4])

        def other_version(folder):
            manifest = json.loads((folder / "export.json").read_text())
            (folder / "export.json").write_text(json.dumps({**manifest, "format_version": 0}))

        cases = {
            "cut off": (lambda folder: (folder / "export.json").unlink(), "no exported folder, or its export was cut"),
            "other version": (other_version, "version 0 of the format"),
            "not json": (lambda folder: (folder / "export.json").write_text("{"), "damaged: export the model anew"),
            "truncated": (truncate, rf"stage_1\.{suffix} .* is not the file that was exported"),
            "missing": (lambda folder: (folder / f"stage_2.{suffix}").unlink(), rf"lacks stage_2\.{suffix}"),
        }
        for name, (change, message) in cases.items():
            with pytest.raises(ValueError, match=message):
                from_exported(broken(name, change))
        with pytest.raises(ValueError, match="no exported folder"):
            from_exported(tmp_path / "nowhere")

    def test_checksums_are_of_all_programs(self, exported, runtime):
        folder = exported.path("vit", runtime)
        sums = read_manifest(folder)["sha256"]
        assert set(sums) == {path.name for path in folder.glob("stage_*")}
        assert all(sums[name] == sha256(folder / name) for name in sums)


class TestPipeline:
    def test_takes_a_runtime(self, exported, runtime):
        images = [Image.effect_noise((40, 50), sigma).convert("RGB") for sigma in (20, 60, 90)]
        loaded = exported.load("vit", runtime, threads=1)
        model = with_exits(NETWORKS["vit"]())
        expected = AdaptiveImageClassificationPipeline(model=model, image_processor=loaded.processor)(images, top_k=2)
        pipe = AdaptiveImageClassificationPipeline(model=loaded)
        for found, other in zip([*pipe(images, top_k=2), pipe(images[0], top_k=2)], [*expected, expected[0]]):
            assert [entry["label"] for entry in found] == [entry["label"] for entry in other]
            assert found[0]["exit_stage"] == other[0]["exit_stage"]
            assert found[0]["score"] == pytest.approx(other[0]["score"], abs=1e-4)
        with pytest.raises(ValueError, match="copy its folder"):
            pipe.model.save_pretrained("anywhere")


class TestRefusals:
    def test_a_runtime_that_is_not_installed(self, exported, runtime, monkeypatch):
        folder = exported.path("vit", runtime)
        monkeypatch.setattr(programs, "find_spec", lambda name: None)
        extra = RUNTIMES[runtime].extra
        for call in (lambda: from_exported(folder), lambda: with_runtime(lively_model(), runtime)):
            with pytest.raises(ImportError, match=rf'pip install "hf-thinkingvit\[{extra}\]"'):
                call()

    def test_images_that_the_programs_do_not_take(self, exported, runtime):
        loaded = exported.load("vit", runtime)
        for pixel_values in (torch.zeros(2, 3, 48, 48), torch.zeros(2, 1, 32, 32), torch.zeros(3, 32, 32), "image"):
            with pytest.raises(ValueError, match=r"\(batch_size, 3, 32, 32\), for which the programs were exported"):
                loaded(pixel_values)
        with pytest.raises(ValueError, match="at least one image"):
            loaded(torch.zeros(0, 3, 32, 32))
        with pytest.raises(ValueError, match="images of 32×32 pixels only"):
            loaded(torch.zeros(1, 3, 32, 32), interpolate_pos_encoding=True)
        with pytest.raises(ValueError, match="for which the programs were exported"):
            list(AdaptiveEngine(loaded)([torch.zeros(3, 48, 48)]))

    def test_precisions(self, exported, tmp_path, monkeypatch):
        need_runtime("onnxruntime")
        model = lively_model(num_hidden_layers=1)
        for runtime, precision, message in (
            ("onnxruntime", "bf16", "does not compute in bf16"),
            ("openvino", "fp8", "`precision` must be one of"),
            ("torch", "bf16", r"model\.to\(torch\.bfloat16\)"),
            ("openvino", "int8", "int8 needs images to calibrate with"),
            ("tensorrt", None, "`runtime` must be one of"),
        ):
            if runtime == "openvino":
                need_runtime(runtime)
            with pytest.raises(ValueError, match=message):
                AdaptiveEngine(model, runtime=runtime, precision=precision)
        with pytest.raises(ValueError, match="has the precision that it was exported in"):
            exported.load("vit", "onnxruntime", precision="fp16")
        with pytest.raises(ValueError, match="chosen on loading"):
            export_model(model, tmp_path / "x", "openvino", precision="bf16")
        with pytest.raises(ValueError, match="`format` must be one of"):
            export_model(model, tmp_path / "x", "coreml")
        with pytest.raises(ValueError, match="does not think in stages"):
            export_model(lively_avit(), tmp_path / "x", "onnx")
        with pytest.raises(ValueError, match="has no provider"):
            exported.load("vit", "onnxruntime", providers=["NoExecutionProvider"])
        assert not (tmp_path / "x").exists()

    def test_a_precision_that_the_cpu_lacks(self, exported, monkeypatch):
        need_runtime("openvino")
        from hf_thinkingvit.inference.runtimes import openvino_program

        folder = exported.path("vit", "openvino")
        monkeypatch.setattr(openvino_program, "capabilities", lambda: ["FP32", "INT8"])
        for precision in ("bf16", "fp16"):
            with pytest.raises(ValueError, match=f"does not compute in {precision}.* of 'fp32', 'int8'"):
                from_exported(folder, precision=precision)
        with pytest.raises(ValueError, match="exported in fp32, so it cannot run in int8"):
            from_exported(folder, precision="int8")

    def test_a_second_runtime(self, exported, runtime):
        loaded = exported.load("vit", runtime)
        other = {"openvino": "onnxruntime", "onnxruntime": "openvino"}[runtime]
        with pytest.raises(ValueError, match=f"was loaded for {runtime}"):
            AdaptiveEngine(loaded, runtime=other)
        assert AdaptiveEngine(loaded, runtime=runtime).model is loaded


def test_the_model_stays_as_it_was():
    """In bfloat16, in training mode, with another implementation of attention."""
    need_runtime("onnxruntime")
    model = lively_model(num_hidden_layers=1, thinking_stages=[1, 4]).to(torch.bfloat16).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = with_runtime(model, "onnxruntime", threads=1)
    assert model.training and model.dtype == torch.bfloat16 and model.config._attn_implementation == "sdpa"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    images = random_images(4)
    with torch.no_grad():
        expected = model.float().eval()(images, threshold=0.0).logits
    torch.testing.assert_close(loaded(images, threshold=0.0).logits, expected, atol=1e-4, rtol=0)
    with pytest.raises(TypeError, match="folder that was temporary"):
        pickle.dumps(loaded)
