"""Exported classifiers without torch: the answers and exits of the loop with torch, from the same folder."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_thinkingvit import EXIT_CRITERIA
from hf_thinkingvit.inference import export_model, from_exported
from hf_thinkingvit.inference.class_scores import class_scores
from hf_thinkingvit.inference.judges import StageJudge
from hf_thinkingvit.inference.runtimes import RUNTIMES
from hf_thinkingvit.torch_free import load_exported, manifest, programs
from hf_thinkingvit.torch_free.settings import Settings
from tests.inference.conftest import RUNTIME_FORMATS, early_exits, need_runtime
from tests.utils import random_images


pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporters
EXAMPLE = Path(__file__).parents[2] / "examples" / "classify_without_torch.py"


def three_stages(exit_criterion: str, threshold: float, **fields):
    """So that there is a stage with a memory both from the one before and for the one after."""
    stages = {"num_hidden_layers": 3, "exit_layers": [1, 2]}
    return early_exits(exit_criterion=exit_criterion, threshold=threshold, **{**stages, **fields})


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    """The folders, by runtime, of a model whose exits remember what halted before, and a number for each image."""
    folders = {}

    def path(runtime: str) -> Path:
        if runtime not in folders:
            folder = tmp_path_factory.mktemp("drawing") / runtime
            model = three_stages("pondernet", 1.0, halting="pondernet")
            folders[runtime] = export_model(model, folder, RUNTIME_FORMATS[runtime])
        return folders[runtime]

    return path


def edited(folder: Path, target: Path, **fields) -> Path:
    """A copy of a folder with other fields in its configuration; `None` takes one out."""
    shutil.copytree(folder, target)
    config = {**json.loads((target / "config.json").read_text()), **fields}
    config = {name: value for name, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


def forged(folder: Path, target: Path, **facts) -> Path:
    """A copy of a folder whose manifest says something else, with checksums that fit."""
    shutil.copytree(folder, target)
    found = {name: value for name, value in manifest.read_manifest(folder).items() if name != "sha256"}
    manifest.write_manifest(target, {**found, **facts})
    return target


def assert_equal(found, expected, config) -> None:
    assert found.exit_stage.tolist() == expected.exit_stage.tolist()
    for name, values in (
        ("logits", expected.logits),
        ("entropy", expected.entropy),
        ("scores", class_scores(expected.logits, config)),
    ):
        np.testing.assert_allclose(getattr(found, name), values.numpy(), atol=1e-5, rtol=0)
        assert getattr(found, name).dtype == np.float32


class TestAnswers:
    def test_equal_those_with_torch(self, exported, runtime):
        images, folder = random_images(60), exported.path("vit", runtime)
        loaded, expected = load_exported(folder, threads=1), from_exported(folder, threads=1)
        assert loaded.threshold == tuple(expected.config.threshold) and loaded.id2label == expected.config.id2label
        found = loaded(images.numpy())
        assert sorted(set(found.exit_stage.tolist())) == [0, 1, 2]
        assert_equal(found, expected(images), expected.config)
        for arguments in ({"threshold": 0.0, "max_stages": 2}, {"threshold": [9.0, 0.0]}, {"threshold": np.float64(9)}):
            assert_equal(loaded(images.numpy(), **arguments), expected(images, **arguments), expected.config)
        for one in (images.double(), images.to(memory_format=torch.channels_last)):  # other dtypes and layouts
            assert_equal(loaded(one.numpy()), expected(images), expected.config)
        untouched = images.numpy().copy()
        untouched.flags.writeable = False
        assert_equal(loaded(untouched), expected(images), expected.config)

    def test_each_image_may_have_its_own_threshold(self, exported, runtime):
        loaded, images = (
            load_exported(exported.path("vit", runtime), threads=1),
            random_images(4).numpy(),
        )
        found = loaded(images, np.array([[9.0, 0.0], [0.0, 9.0], [0.0, 0.0], [9.0, 9.0]]))
        assert found.exit_stage.tolist() == [0, 1, 2, 0]
        assert loaded.calls == [1, 1, 1]
        every = loaded(images, 0.0)
        np.testing.assert_allclose(found.logits[2], every.logits[2], atol=1e-5)

    def test_of_a_rule_that_remembers_and_draws(self, drawing, runtime):
        """Exits at every stage, and logits, are those of torch's loop with the same numbers."""
        loaded, expected = load_exported(drawing(runtime), threads=1), from_exported(drawing(runtime), threads=1)
        images = random_images(60)
        noise = torch.rand(60, generator=torch.Generator().manual_seed(0)).numpy()
        found = loaded(images.numpy(), noise=noise)
        assert sorted(set(found.exit_stage.tolist())) == [0, 1, 2]
        assert_equal(found, expected(images, generator=torch.Generator().manual_seed(0)), expected.config)
        drawn = loaded(images.numpy(), generator=np.random.default_rng(0)).exit_stage
        assert drawn.tolist() == loaded(images.numpy(), generator=np.random.default_rng(0)).exit_stage.tolist()
        assert drawn.tolist() != loaded(images.numpy(), generator=np.random.default_rng(1)).exit_stage.tolist()
        with pytest.raises(ValueError, match=r"`noise` must be 2 numbers in \[0, 1\), one for each image"):
            loaded(images[:2].numpy(), noise=np.array([0.5, 1.0]))
        with pytest.raises(ValueError, match="not both"):
            loaded(images[:2].numpy(), noise=np.zeros(2), generator=np.random.default_rng(0))

    @pytest.mark.parametrize("criterion", [name for name, one in EXIT_CRITERIA.items() if not one.is_dense])
    def test_decisions_are_the_exit_rules(self, criterion):
        """Of every criterion: what is exported of a decision computes `ExitRule.judge`, with τ of each image."""
        halting = EXIT_CRITERIA[criterion].halting
        problem = "multi_label_classification" if EXIT_CRITERIA[criterion].multi_label else None
        head = "shared" if halting == "act" else "linear"
        model = three_stages(criterion, 0.0, halting=halting, problem_type=problem, exit_head=head)
        generator = torch.Generator().manual_seed(0)
        rule, taus = model.exit_rule(), torch.rand(64, generator=generator)
        memory = before = rule.first_memory(64, torch.Generator().manual_seed(0) if rule.draws else None)
        for stage in range(3):
            answer = {"logits": torch.randn(64, 3, generator=generator)}
            if halting is not None:
                answer["halting_score"] = torch.rand(64, generator=generator) / 2
            expected = replace(rule, thresholds=(taus,) * 2).judge(stage, answer, memory)
            judge = StageJudge(model, stage, answer, before)
            inputs = {
                name: taus if name == "threshold" else rows for name, rows in judge.inputs(answer, before).items()
            }
            verdict, after = judge(inputs).values()
            torch.testing.assert_close(verdict["entropy"], expected.entropy)
            torch.testing.assert_close(verdict["class_scores"], class_scores(answer["logits"], model.config))
            assert ("exits" in verdict) == (stage < 2)
            if stage < 2:
                assert torch.equal(verdict["exits"], expected.exits)
                before = {**{name: before[name] for name in judge.passed_on}, **after}
                assert before.keys() == expected.memory.keys()
            memory = expected.memory

    def test_broken_images_go_on_and_harm_no_others(self, exported, runtime):
        loaded, images = (
            load_exported(exported.path("vit", runtime), threads=1),
            random_images(3).numpy(),
        )
        expected = loaded(images, 9.0)
        images[1] = np.nan
        found = loaded(images, 9.0)
        assert found.exit_stage.tolist() == [0, 2, 0] and np.isnan(found.logits[1]).all()
        np.testing.assert_allclose(found.logits[::2], expected.logits[::2], atol=1e-5)

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_in_half_precision(self, exported, precision):
        """With the state in the dtype that OpenVINO computes in, for which NumPy may have no name."""
        need_runtime("openvino")
        from hf_thinkingvit.torch_free import openvino_program

        if openvino_program.CAPABILITIES[precision] not in openvino_program.capabilities():
            pytest.skip(f"this CPU does not compute in {precision}")
        folder, images = exported.path("vit", "openvino"), random_images(20)
        expected = from_exported(folder, precision, threads=1)
        found = load_exported(folder, precision, threads=1)(images.numpy(), 0.0)
        assert_equal(found, expected(images, threshold=0.0), expected.config)

    def test_float16_of_onnx(self, tmp_path):
        """Answers are judged in float32."""
        need_runtime("onnxruntime")
        images = random_images(20)
        model = three_stages("max_probability", 0.0, num_hidden_layers=2, exit_layers=[1])
        with torch.no_grad():
            scores = model(images, output_stage_logits=True).stage_logits[0].softmax(dim=1).amax(dim=1).sort().values
        model.config.threshold = scores[9:11].mean().item()
        folder = export_model(model, tmp_path / "half", "onnx", precision="fp16")
        loaded, expected = load_exported(folder, threads=1), from_exported(folder, threads=1)
        found, other = loaded(images.numpy()), expected(images)
        assert sorted(set(found.exit_stage.tolist())) == [0, 1]
        other.logits = other.logits.float()
        assert_equal(found, other, expected.config)


class TestWork:
    def test_stages_run_for_the_images_that_go_on(self, exported, runtime):
        loaded, images = (
            load_exported(exported.path("vit", runtime), threads=1),
            random_images(60).numpy(),
        )
        rows = []
        for number, program in enumerate(loaded._stage_programs):

            class Counted:
                inputs, outputs = program.inputs, program.outputs

                def run(self, inputs, outputs, number=number, program=program):
                    rows.append((number, len(outputs[0])))
                    program.run(inputs, outputs)

            loaded._stage_programs[number] = Counted()
        exits = loaded(images).exit_stage
        assert rows == [(0, 60), (1, int((exits > 0).sum())), (2, int((exits > 1).sum()))]
        loaded(images, 99.0)
        assert loaded.calls == [2, 1, 1]
        loaded(images, 0.0, max_stages=2)
        assert loaded.calls == [3, 2, 1]

    def test_memory_that_runs_out_is_pythons_error(self):
        with pytest.raises(MemoryError), programs.memory_errors():
            raise RuntimeError("std::bad_alloc")


class TestClassify:
    def test_labels_scores_and_stages(self, exported, runtime, tmp_path):
        """Whatever the size of batches, of pictures and files, grey and transparent ones."""
        folder = exported.path("vit", runtime)
        loaded = load_exported(folder, threads=1)
        pictures = [Image.effect_noise((40, 50), sigma) for sigma in (20, 60, 90)]
        pictures[1] = pictures[1].convert("RGBA")
        pictures[0].save(tmp_path / "first.png")
        found = loaded.classify([tmp_path / "first.png", *pictures[1:]], top_k=2, batch_size=2)
        assert found == loaded.classify(pictures, top_k=2, batch_size=2)
        pixel_values = loaded.processor([one.convert("RGB") for one in pictures], return_tensors="np")["pixel_values"]
        answers = loaded(pixel_values)
        for one, scores, stage, entropy in zip(found, answers.scores, answers.exit_stage, answers.entropy):
            best = scores.argsort()[::-1][:2]
            assert one.labels == [f"LABEL_{place}" for place in best] and one.exit_stage == stage
            assert one.scores == pytest.approx(scores[best], abs=1e-5)
            assert one.entropy == pytest.approx(entropy, abs=1e-5)
        [alone] = loaded.classify(pictures[2], top_k=99, threshold=0.0, max_stages=2)
        assert len(alone.labels) == 12 and alone.exit_stage == 1
        assert loaded.classify([]) == []

    def test_without_torch_in_the_process(self, exported, runtime, tmp_path):
        """The example, in a process in which torch cannot be imported."""
        folder = exported.path("vit", runtime)
        Image.effect_noise((40, 50), 60).save(tmp_path / "noise.png")
        code = (
            "import runpy, sys\n"
            "blocked = ('torch', 'torchvision')\n"
            "sys.modules.update(dict.fromkeys(blocked))\n"
            f"sys.argv = ['classify', {str(folder)!r}, {str(tmp_path / 'noise.png')!r}, '--threads', '1']\n"
            f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')\n"
            "assert not [name for name in sys.modules if name.split('.')[0] in blocked and sys.modules[name]]\n"
            "import hf_thinkingvit\n"
            "assert not hasattr(hf_thinkingvit, '__wrapped__')\n"
            "for wanted in ('ThinkingViTConfig', 'inference'):\n"
            "    try: exec(f'from hf_thinkingvit import {wanted}')\n"
            "    except ImportError as error: assert 'needs torch, which is not installed' in str(error), error\n"
            "    else: raise AssertionError(wanted)\n"
        )
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-2000:]
        [expected] = load_exported(folder, threads=1).classify(tmp_path / "noise.png")
        said = f"{expected.labels[0]} ({expected.scores[0]:.3f}), stage {expected.exit_stage}"
        assert ran.stdout.strip() == f"{tmp_path / 'noise.png'}: {said}"

    def test_refusals(self, exported, runtime, tmp_path):
        loaded, picture = (
            load_exported(exported.path("vit", runtime), threads=1),
            Image.new("RGB", (40, 40)),
        )
        for arguments, message in (
            ({"top_k": 0}, "`top_k` must be an integer of at least 1"),
            ({"batch_size": 0}, "`batch_size` must be an integer of at least 1"),
            ({"generator": np.random.default_rng(0)}, "draws random numbers"),
        ):
            with pytest.raises(ValueError, match=message):
                loaded.classify([picture], **arguments)
        with pytest.raises(ValueError, match="There is no file `nowhere.png`"):
            loaded.classify(["nowhere.png"])
        (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        with pytest.raises(ValueError, match=r"Cannot read the image .*cut\.png: UnidentifiedImageError"):
            loaded.classify([picture, tmp_path / "cut.png"])
        with pytest.raises(ValueError, match="Cannot read the image at place 1: TypeError"):
            loaded.classify([picture, None])
        loaded.processor.do_resize = loaded.processor.do_center_crop = False
        with pytest.raises(ValueError, match="at place 1 has 40×40 pixels after the folder's image processor"):
            loaded.classify([Image.new("RGB", (32, 32)), picture])
        loaded.processor.do_resize = loaded.processor.do_center_crop = True
        bare = forged(exported.path("vit", runtime), tmp_path / "bare", has_processor=False)
        (bare / "preprocessor_config.json").unlink()
        with pytest.raises(ValueError, match=r"has no preprocessor_config\.json: export the model with its"):
            load_exported(bare, threads=1).classify([picture])
        loaded.processor.image_std = [1e-40] * 3
        with pytest.raises(ArithmeticError, match="not finite"):
            loaded.classify([Image.new("RGB", (40, 40), (255, 0, 0))])
        loaded._settings = replace(loaded._settings, is_regression=True)
        with pytest.raises(ValueError, match="A regression predicts values"):
            loaded.classify([picture])


class TestRefusals:
    def test_images_that_the_programs_do_not_take(self, exported, runtime):
        loaded = load_exported(exported.path("vit", runtime), threads=1)
        shape = r"\(batch_size, 3, 32, 32\), for which the programs were exported"
        for pixel_values, message in (
            (np.zeros((2, 3, 48, 48), np.float32), shape),
            (np.zeros((2, 32, 32, 3), np.float32), shape),
            (np.zeros((3, 32, 32), np.float32), shape),
            (torch.zeros(2, 3, 32, 32), f"`ndarray` of the shape {shape}, got Tensor"),
            (np.zeros((0, 3, 32, 32), np.float32), "at least one image"),
            (np.zeros((1, 3, 32, 32), np.uint8), "floating-point numbers, .* got uint8"),
        ):
            with pytest.raises(ValueError, match=message):
                loaded(pixel_values)

    def test_arguments_that_do_not_fit(self, exported, runtime):
        loaded, images = (
            load_exported(exported.path("vit", runtime), threads=1),
            random_images(2).numpy(),
        )
        for arguments, message in (
            ({"threshold": -1.0}, "`threshold` must be a number of at least 0"),
            ({"threshold": float("nan")}, "`threshold` must be a number of at least 0"),
            ({"threshold": "0.5"}, "`threshold` must be a number of at least 0"),
            ({"threshold": [0.5]}, "`threshold` must be one number or a list of 2"),
            ({"threshold": np.zeros((3, 2))}, r"here \(2, 2\), got \(3, 2\)"),
            ({"threshold": np.full((2, 2), -1.0)}, "`threshold` must be a number of at least 0"),
            ({"max_stages": 4}, "`max_stages` must be an integer from 1 to 3"),
            ({"noise": np.zeros(2)}, "draws random numbers .* not 'topk_entropy'"),
        ):
            with pytest.raises(ValueError, match=message):
                loaded(images, **arguments)
        regression = Settings((0.0,), {0: "LABEL_0"}, is_regression=True)
        with pytest.raises(ValueError, match="Regression has no criterion of certainty for early exits"):
            regression.thresholds(0.5, 2)

    def test_folders(self, exported, runtime, tmp_path):
        """Only τ and labels may be edited; what torch's loop would follow, programs of decisions cannot."""
        folder = exported.path("vit", runtime)
        labels = {str(place): f"class {place}" for place in range(12)}
        loaded = load_exported(edited(folder, tmp_path / "free", threshold=99.0, id2label=labels, label2id={}))
        assert loaded.id2label[3] == "class 3"
        assert loaded(random_images(3).numpy()).exit_stage.tolist() == [0, 0, 0]
        half = json.loads((folder / "config.json").read_text())["id2label"].copy()
        half.popitem()
        for name, fields, message in (
            (
                "criterion",
                {"exit_criterion": "entropy"},
                "`exit_criterion` is 'entropy' there and 'topk_entropy'",
            ),
            ("top_k", {"entropy_top_k": 5}, "`entropy_top_k` is 5 there .* only τ and labels may be changed"),
            ("equal", {"exit_at_threshold": True}, "`exit_at_threshold` is True there and False"),
            (
                "problem",
                {"problem_type": "multi_label_classification"},
                "`problem_type` is 'multi_label_classification'",
            ),
            ("size", {"image_size": 48}, "`image_size` is 48 there and 32 in the programs"),
            ("classes", {"id2label": half}, "`num_labels` is 11 there and 12"),
            ("tau", {"threshold": [0.5]}, "`threshold` must be one number or a list of 2"),
            ("no_tau", {"threshold": None}, "has no `threshold`"),
        ):
            with pytest.raises(ValueError, match=message):
                load_exported(edited(folder, tmp_path / name, **fields))
        for name, facts, message in (
            ("task", {"task": "image-segmentation"}, "only classifiers run without torch"),
            ("decisions", {"judges": []}, "exported without the programs of decisions"),
        ):
            with pytest.raises(ValueError, match=message):
                load_exported(forged(folder, tmp_path / name, **facts))
        with pytest.raises(ValueError, match="no exported folder"):
            load_exported(tmp_path)
        judge = next((tmp_path / "free").glob("judge_1.*"))
        judge.write_bytes(judge.read_bytes() + b" ")
        with pytest.raises(ValueError, match=rf"{judge.name} .* is not the file that was exported"):
            load_exported(tmp_path / "free")

    def test_runtimes_precisions_and_options(self, exported, runtime, monkeypatch):
        folder = exported.path("vit", runtime)
        for arguments, message in (
            ({"precision": "fp8"}, "`precision` must be one of"),
            ({"precision": "int8"}, "exported in"),
            ({"threads": 0}, "`threads` must be an integer of at least 1"),
            ({"devices": 1}, f"{runtime} has the options threads, .*config, got devices"),
        ):
            with pytest.raises(ValueError, match=message):
                load_exported(folder, **arguments)
        if runtime == "openvino":
            from hf_thinkingvit.torch_free import openvino_program

            monkeypatch.setattr(openvino_program, "capabilities", lambda: ["FP32"])
        with pytest.raises(ValueError, match=r"does not compute in bf16"):
            load_exported(folder, "bf16")
        monkeypatch.setattr(programs, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=rf'pip install "hf-thinkingvit\[{RUNTIMES[runtime].extra}\]"'):
            load_exported(folder)

    def test_copies(self, exported, runtime):
        loaded = load_exported(exported.path("vit", runtime), threads=1)
        for call in (lambda: copy.copy(loaded), lambda: copy.deepcopy(loaded), lambda: pickle.dumps(loaded)):
            with pytest.raises(TypeError, match="call `load_exported` with the folder in each process"):
                call()
