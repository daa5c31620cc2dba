"""Exported folders: what they hold, what is refused of a damaged one, and what a model from one refuses."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.inference import AdaptiveEngine, export_model, from_exported, with_runtime
from hf_thinkingvit.inference.runtimes import RUNTIMES
from hf_thinkingvit.torch_free import load_exported, manifest, programs
from hf_thinkingvit.torch_free.manifest import read_manifest, sha256
from tests.inference.conftest import NETWORKS, need_runtime, with_exits
from tests.models.test_modeling_avit import lively_avit
from tests.utils import lively_model, random_images


pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporters


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

        def edit(folder, **fields):
            manifest = json.loads((folder / "export.json").read_text())
            (folder / "export.json").write_text(json.dumps({**manifest, **fields}))

        cases = {
            "cut off": (lambda folder: (folder / "export.json").unlink(), "no exported folder, or its export was cut"),
            "other version": (lambda folder: edit(folder, format_version=0), "version 0 of the format"),
            "edited": (lambda folder: edit(folder, stages=[]), "not as it was exported, it is damaged or edited"),
            "a list": (lambda folder: (folder / "export.json").write_text("[]"), "damaged: copy the folder anew"),
            "no configuration": (lambda folder: (folder / "config.json").unlink(), "lacks config.json"),
            "a broken configuration": (
                lambda folder: (folder / "config.json").write_text('{"model_type": '),
                r"config\.json' is damaged",
            ),
            "a foreign configuration": (
                lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'),
                r"config\.json' is damaged",
            ),
            "no threshold": (
                lambda folder: (folder / "config.json").write_text(
                    json.dumps({**json.loads((folder / "config.json").read_text()), "threshold": None})
                ),
                "has no `threshold`: set it",
            ),
            "no processor": (
                lambda folder: (folder / "preprocessor_config.json").unlink(),
                "lacks preprocessor_config.json",
            ),
            "another file's bytes": (
                lambda folder: shutil.copy(folder / f"stage_0.{suffix}", folder / f"stage_1.{suffix}"),
                rf"stage_1\.{suffix} .* is not the file that was exported",
            ),
            "not json": (lambda folder: (folder / "export.json").write_text("{"), "damaged: copy the folder anew"),
            "truncated": (truncate, rf"stage_1\.{suffix} .* is not the file that was exported"),
            "missing": (lambda folder: (folder / f"stage_2.{suffix}").unlink(), rf"lacks stage_2\.{suffix}"),
        }
        for name, (change, message) in cases.items():
            with pytest.raises(ValueError, match=message):
                from_exported(broken(name, change))
        with pytest.raises(ValueError, match="no exported folder"):
            from_exported(tmp_path / "nowhere")

    def test_no_files_of_other_folders(self, exported, runtime, tmp_path):
        """A forged `export.json` whose checksums fit reads no file outside of its folder."""
        folder = shutil.copytree(exported.path("vit", runtime), tmp_path / "copy")
        facts = read_manifest(folder)
        facts["stages"][0]["file"] = f"../copy/{facts['stages'][0]['file']}"
        manifest.write_manifest(folder, {name: facts[name] for name in facts if name != "sha256"})
        with pytest.raises(ValueError, match="names other files than those of the folder"):
            from_exported(folder)

    def test_fields_that_are_fixed_in_the_programs(self, exported, runtime, tmp_path):
        """An edit that programs cannot follow is refused, on loading and later; τ, criterion and labels may change."""
        folder = shutil.copytree(exported.path("vit", runtime), tmp_path / "copy")
        config = json.loads((folder / "config.json").read_text())
        for name, value in (("thinking_stages", [1, 2]), ("image_size", 48)):
            (folder / "config.json").write_text(json.dumps({**config, "threshold": 0.5, name: value}))
            with pytest.raises(ValueError, match=f"differs from the exported programs: `{name}` is"):
                from_exported(folder)
        labels = {str(place): f"class {place}" for place in range(12)}
        changed = {"threshold": 0.5, "exit_criterion": "max_probability", "id2label": labels, "label2id": {}}
        (folder / "config.json").write_text(json.dumps({**config, **changed}))
        loaded = from_exported(folder, threads=1)
        assert loaded.config.id2label[3] == "class 3" and loaded.exit_rule().criterion == "max_probability"
        loaded.config.image_size = 48
        for call in (lambda: loaded(random_images(2)), lambda: AdaptiveEngine(loaded)):
            with pytest.raises(ValueError, match="`image_size` is 48 there and 32 in the programs"):
                call()

    def test_exporting_again_leaves_nothing_of_before(self, tmp_path):
        """Another processor would prepare images for another model."""
        need_runtime("onnxruntime")
        model = lively_model(num_hidden_layers=1, thinking_stages=[1, 4])
        folder = export_model(model, tmp_path / "x", "onnx", processor=evaluation_image_processor(32))
        (folder / "stage_0.bin").write_bytes(b"of an export for OpenVINO")
        assert from_exported(export_model(model, folder, "onnx", with_decisions=False)).processor is None
        with pytest.raises(ValueError, match="without the programs of decisions"):
            load_exported(folder)
        (folder / "stage_0.bin").unlink()
        from_exported(folder)
        model.save_pretrained(tmp_path / "model")
        config = (tmp_path / "model" / "config.json").read_bytes()
        with pytest.raises(ValueError, match=r"holds the weights of a model \(model.safetensors\)"):
            export_model(model, tmp_path / "model", "onnx")
        assert (tmp_path / "model" / "config.json").read_bytes() == config

    def test_checksums_are_of_all_programs(self, exported, runtime):
        folder = exported.path("vit", runtime)
        sums = read_manifest(folder)["sha256"]
        assert set(sums) == {path.name for kind in ("stage", "judge") for path in folder.glob(f"{kind}_*")}
        assert all(sums[name] == sha256(folder / name) for name in sums)


class TestCopies:
    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_answer_as_the_original(self, exported, runtime, copied):
        """With what may be changed after loading: τ, exit criterion, labels, and the processor."""
        loaded, images = exported.load("vit", runtime, threads=1), random_images(3)
        loaded.config.exit_criterion, loaded.config.threshold = "max_probability", 0.0
        loaded.config.id2label = {place: f"class {place}" for place in range(12)}
        loaded.processor.image_mean = [0.1, 0.2, 0.3]
        again = copied(loaded)
        assert torch.equal(again(images).logits, loaded(images).logits)
        assert again(images).exit_stage.tolist() == loaded(images).exit_stage.tolist() == [0, 0, 0]
        assert again.exit_rule() == loaded.exit_rule()
        assert again.config.id2label[3] == "class 3" and again.processor.image_mean == [0.1, 0.2, 0.3]
        assert (again.runtime, again.precision) == (runtime, "fp32")

    def test_deep_ones_are_independent(self, exported, runtime):
        loaded = exported.load("vit", runtime, threads=1)
        copy.deepcopy(loaded).config.threshold = 0.0
        assert loaded.exit_rule().thresholds == tuple(with_exits(NETWORKS["vit"]()).config.threshold)

    def test_find_a_relative_folder_from_elsewhere(self, exported, runtime, tmp_path, monkeypatch):
        """A worker may have another working directory."""
        folder = exported.path("vit", runtime)
        monkeypatch.chdir(folder.parent)
        loaded = from_exported(folder.name, threads=1)
        monkeypatch.chdir(tmp_path)
        again = pickle.loads(pickle.dumps(loaded))
        assert torch.equal(again(random_images(3)).logits, loaded(random_images(3)).logits)

    def test_refuse_a_folder_with_other_programs(self, exported, runtime, tmp_path):
        """Which would answer otherwise than the original."""
        folder = shutil.copytree(exported.path("vit", runtime), tmp_path / "copy")
        loaded = from_exported(folder, threads=1)
        stored = pickle.dumps(loaded)
        pickle.loads(stored)
        shutil.rmtree(folder)
        shutil.copytree(exported.path("swin", runtime), folder)
        for call in (lambda: pickle.loads(stored), lambda: copy.deepcopy(loaded)):
            with pytest.raises(ValueError, match="was exported anew after the model was loaded"):
                call()


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
        with pytest.raises(ValueError, match=r"floating-point numbers, .* got torch\.uint8"):
            loaded(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        images = random_images(2)
        assert torch.equal(loaded(images.requires_grad_()).logits, loaded(images.detach()).logits)
        layout = images.detach().to(memory_format=torch.channels_last)
        assert torch.equal(loaded(layout).logits, loaded(images.detach()).logits)
        with pytest.raises(ValueError, match="for which the programs were exported"):
            list(AdaptiveEngine(loaded)([torch.zeros(3, 48, 48)]))

    def test_arguments_of_pytorch_models(self, exported, runtime):
        """Whatever asks for what programs do not compute is refused, wherever it is given."""
        loaded, images = exported.load("vit", runtime, threads=1), random_images(2)
        for name, value in (
            ("sub_network", 0),
            ("labels", torch.zeros(2, dtype=torch.long)),
            ("interpolate_pos_encoding", True),
            ("output_hidden_states", True),
            ("output_attentions", True),
            ("output_kept_tokens", True),
        ):
            with pytest.raises(ValueError, match=f"`{name}` is of PyTorch models, .* images of 32×32 pixels"):
                loaded(images, **{name: value})
            loaded(images, max_stages=1, **{name: None})
        with pytest.raises(ValueError, match="`interpolate_pos_encoding` is of PyTorch models"):
            list(AdaptiveEngine(loaded, interpolate_pos_encoding=True)(images))
        with pytest.raises(ValueError, match="run from the first stage on, not from stage 1"):
            loaded.begin(images, stages=range(1, 2))
        with pytest.raises(ValueError, match="`generator` is for an `exit_criterion` that draws"):
            loaded(images, generator=torch.Generator())
        with pytest.raises(TypeError, match="takes no 'treshold'"):
            loaded(images, treshold=0.5)
        outputs = loaded(images, return_dict=False)
        assert torch.equal(outputs[0], loaded(images).logits)

    def test_options_that_a_runtime_does_not_have(self, exported, runtime):
        for options, message in (
            ({"devices": 1}, f"{runtime} has the options threads, .*config, got devices"),
            ({"threads": 0}, "`threads` must be an integer of at least 1"),
        ):
            with pytest.raises(ValueError, match=message):
                exported.load("vit", runtime, **options)

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
        with pytest.raises(ValueError, match="got OptimizedModule"):
            export_model(torch.compile(model), tmp_path / "x", "onnx")
        with pytest.raises(ValueError, match="has no provider"):
            exported.load("vit", "onnxruntime", providers=["NoExecutionProvider"])
        assert not (tmp_path / "x").exists()

    def test_a_processor_of_another_size(self, tmp_path):
        need_runtime("onnxruntime")
        model = lively_model(num_hidden_layers=1)
        with pytest.raises(ValueError, match="makes images of 48×48 pixels, and the programs take 32×32"):
            export_model(model, tmp_path / "x", "onnx", processor=evaluation_image_processor(48))
        assert not (tmp_path / "x").exists()

    def test_what_cannot_be_copied(self, tmp_path):
        """The export needs a copy of the model."""
        need_runtime("onnxruntime")
        model = lively_model(num_hidden_layers=1)
        model.lock = threading.Lock()
        with pytest.raises(ValueError, match="exported from a copy, which cannot be made of this one .*lock"):
            export_model(model, tmp_path / "x", "onnx")
        assert not (tmp_path / "x").exists()

    def test_quantised_models(self, tmp_path):
        torchao = pytest.importorskip("torchao.quantization")
        model = lively_model(num_hidden_layers=1)
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        with pytest.raises(ValueError, match="quantised or distributed, .* export the original"):
            export_model(model, tmp_path / "x", "onnx")
        assert not (tmp_path / "x").exists()

    def test_a_precision_that_the_cpu_lacks(self, exported, monkeypatch):
        need_runtime("openvino")
        from hf_thinkingvit.torch_free import openvino_program

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
