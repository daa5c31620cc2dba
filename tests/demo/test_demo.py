"""The page: what it shows of an image, its files as a Space, and the page itself in a browser."""

import pickle
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from PIL import Image

import hf_thinkingvit
from benchmarks.demo import browser, browser_program
from hf_thinkingvit.commands.__main__ import main
from hf_thinkingvit.commands.loading import load_model
from hf_thinkingvit.demo import answers
from hf_thinkingvit.demo.answers import Answers, Models, slider_of, used_threshold
from hf_thinkingvit.demo.rendering import render
from hf_thinkingvit.evaluation.inspection import inspect_image
from hf_thinkingvit.hub import push_space
from hf_thinkingvit.hub.space import GRADIO_VERSION, REQUIREMENTS, write_page
from hf_thinkingvit.image_processing import evaluation_image_processor, segmentation_image_processor
from tests.models.segmentation_models import lively_segmenter
from tests.models.test_modeling_avit import lively_avit
from tests.utils import FIXTURES, lively_model


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SHIPPED = EXAMPLES / "checkpoints" / "thinkingvit-cifar10"
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="needs the extra `space`")
needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs the extra `space`")


@pytest.fixture(scope="module")
def ship():
    """Under the shipped model its stage 0 has an entropy of about 0.55, and τ is 1.04."""
    return inspect_image(*load_model(str(SHIPPED), dtype=torch.float32), Image.open(EXAMPLES / "images" / "ship.png"))


def badges(html: str) -> list[str]:
    return re.findall(r'tv-badge">([^<]*)<', html)


class TestRendering:
    def test_the_decision_follows_tau(self, ship):
        early, late = render(ship, 1.04), render(ship, 0.0)
        assert badges(early) == ["accepted", "not needed"] and 'data-accepted="0"' in early
        assert badges(late) == ["thinks again", "accepted"] and 'data-accepted="1"' in late
        assert "41.6 M of the full model's 207 M multiply-accumulates (20%)" in early
        assert "207 M of the full model's 207 M multiply-accumulates (100%)" in late

    def test_every_stage_has_its_scores_and_entropy(self, ship):
        html = render(ship, 1.04)
        for stage in range(2):
            assert f"entropy {float(ship.entropies[0, stage]):.2f}" in html
            for label, value in ship.best(stage, 5):
                assert f"<span>{label}</span><span>{value:.1%}</span>" in html

    def test_labels_are_escaped(self):
        names = {index: f"<b>{index}</b>" for index in range(12)}
        model = lively_model(id2label=names, label2id={name: index for index, name in names.items()})
        html = render(inspect_image(model, evaluation_image_processor(32), Image.new("RGB", (40, 40))), 0.5)
        assert "<b>" not in html and "&lt;b&gt;" in html

    @needs_matplotlib
    def test_tokens_of_an_avit(self):
        inspection = inspect_image(lively_avit(), evaluation_image_processor(32), Image.new("RGB", (40, 40), "red"))
        html = render(inspection, None)
        assert html.count("<img ") == 1 and f"mean {inspection.depth.mean():.1f}" in html and badges(html) == [""]

    def test_windows_of_a_segmentation_model(self):
        model = lively_segmenter()
        inspection = inspect_image(model, segmentation_image_processor(32), Image.new("RGB", (64, 40), "red"))
        threshold = float(inspection.scores.scores[:, 0].median()) + 1e-5
        html = render(inspection, threshold)
        assert html.count("<img ") == 2 + model.config.num_stages
        stages = inspection.exit_stages(threshold)
        assert f'data-accepted="{",".join(map(str, stages.tolist()))}"' in html
        assert f"{int((stages == 0).sum())} at stage 0" in html


class TestSpace:
    def test_the_example_is_what_is_published(self, tmp_path):
        """But for the command that starts it, and the models."""
        write_page(tmp_path)
        for name in ("README.md", "requirements.txt"):
            assert (EXAMPLES / "space" / name).read_text() == (tmp_path / name).read_text(), name
        code = (EXAMPLES / "space" / "app.py").read_text()
        assert code.partition('"""\n\n')[2] == (tmp_path / "app.py").read_text().partition('"""\n\n')[2]

    def test_requirements_are_those_of_the_package(self):
        tomllib = pytest.importorskip("tomllib")
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extra = [name for name in project["optional-dependencies"]["space"] if name != "gradio"]
        assert list(REQUIREMENTS) == [*project["dependencies"], *extra]

    def test_a_dry_run_has_everything_that_the_page_needs(self, tmp_path):
        samples = sorted((EXAMPLES / "images").glob("*.png"))[:2]
        folder = push_space("org/demo", ["org/animals"], samples=samples, dry_run=tmp_path / "space")
        data = metadata_load(folder / "README.md")
        assert (data["sdk"], data["sdk_version"], data["app_file"]) == ("gradio", GRADIO_VERSION, "app.py")
        assert data["models"] == ["org/animals"] and "org/animals](https://hf" not in data["title"]
        assert sorted(path.name for path in (folder / "images").iterdir()) == [path.name for path in samples]
        written = {path.relative_to(folder / "hf_thinkingvit") for path in (folder / "hf_thinkingvit").rglob("*.*")}
        package = Path(hf_thinkingvit.__file__).parent
        expected = {path.relative_to(package) for path in package.rglob("*.*") if "__pycache__" not in path.parts}
        assert written == expected

    @pytest.mark.parametrize("models, message", [([], "got none"), (["folder"], "`models` must be of the form")])
    def test_models_must_be_on_the_hub(self, models, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            push_space("org/demo", models, dry_run=tmp_path / "space")
        assert not (tmp_path / "space").exists()

    def test_the_command_writes_model_and_space(self, tmp_path, capsys):
        model = tmp_path / "model"
        lively_model(thinking_stages=[1, 4], num_hidden_layers=1).save_pretrained(model)
        evaluation_image_processor(32).save_pretrained(model)
        words = ["push", "--model", str(model), "--repo-id", "org/animals", "--dry-run", str(tmp_path / "out")]
        main([*words, "--space", "--space-images", str(EXAMPLES / "images")])
        assert f"Space written to {tmp_path / 'out' / 'space'}" in capsys.readouterr().out
        assert metadata_load(tmp_path / "out" / "space" / "README.md")["models"] == ["org/animals"]
        assert (tmp_path / "out" / "model.safetensors").is_file()
        with pytest.raises(SystemExit):
            main([*words, "--space-images", str(EXAMPLES / "images")])
        assert "give --space as well" in capsys.readouterr().err


class TestModels:
    def test_a_public_page_takes_no_other_folders(self):
        public = Models(hub_only=True, listed=[str(SHIPPED)])
        assert public.get(str(SHIPPED))[0].config.num_stages == 2
        for name in (str(EXAMPLES / "checkpoints" / "avit-cifar10"), "/etc", "~/model"):
            with pytest.raises(ValueError, match="is no id of a model on the Hub"):
                public.get(name)

    def test_the_range_of_the_slider_is_that_of_the_criterion(self):
        properties = slider_of(lively_model(exit_criterion="max_probability", threshold=[0.9, 0.8]).config)
        assert (properties["minimum"], properties["maximum"], properties["value"]) == (0.0, 1.0, 0.9)
        assert "is above τ" in properties["info"]
        assert slider_of(lively_avit().config) == {"visible": False}
        regression = lively_model(problem_type="regression", threshold=0.0)
        assert slider_of(regression.config) == {"visible": False}

    @pytest.mark.parametrize("threshold, maximum", [(2.0, 4.0), (1e-5, 2e-5), (0.0, 3.0), (float("inf"), 3.0)])
    def test_the_slider_of_scores_without_bound(self, threshold, maximum):
        config = lively_model(thinking_stages=[1, 2, 4], exit_criterion="similarity", threshold=threshold).config
        properties = slider_of(config)
        assert properties["maximum"] == pytest.approx(maximum) and 0 < properties["step"] < maximum
        assert properties["value"] <= properties["maximum"]

    def test_a_slider_that_was_not_moved_leaves_each_exit_its_own_threshold(self):
        model = lively_model(thinking_stages=[1, 2, 4], num_labels=5, threshold=[0.0, 10.0])
        inspection = inspect_image(model, evaluation_image_processor(32), Image.new("RGB", (40, 40), "red"))
        properties = slider_of(model.config)
        assert "τ = 0, 10" in properties["info"]
        assert inspection.exit_stages(used_threshold(inspection, properties["value"])).tolist() == [1]
        assert inspection.exit_stages(used_threshold(inspection, 1e-9)).tolist() == [2]

    def test_a_public_page_reads_other_models_without_its_token(self, monkeypatch):
        given, nothing = {}, (torch.nn.Identity(), None)
        monkeypatch.setattr(answers, "load_model", lambda name, **options: given.setdefault(name, options) and nothing)
        for public in (True, False):
            models = Models(hub_only=public, listed=["org/listed"])
            for name in ("org/listed", "org/other"):
                models.get(name)
            tokens = {name: options.get("token") for name, options in given.items()}
            assert tokens == {"org/listed": None, "org/other": False if public else None}
            given.clear()

    def test_official_checkpoints_are_taken(self):
        source = FIXTURES / "thinkingvit_2stage"
        model, processor = Models().get(str(source))
        assert slider_of(model.config)["visible"]
        assert len(inspect_image(model, processor, Image.new("RGB", (40, 40))).entropies[0]) == 2
        with pytest.raises(ValueError, match="no id of a model on the Hub"):
            Models(hub_only=True).get(str(source / "model.safetensors"))


class TestAnswers:
    def test_a_model_runs_once_for_each_image_among_the_last(self, tmp_path, monkeypatch):
        model, inspected = lively_model(thinking_stages=[1, 4], num_hidden_layers=1), []
        monkeypatch.setattr(Models, "get", lambda self, name: (model, evaluation_image_processor(32)))
        monkeypatch.setattr(
            answers, "inspect_image", lambda *inputs: inspected.append(inputs[2]) or inspect_image(*inputs)
        )
        monkeypatch.setattr(answers, "INSPECTED_IMAGES", 2)
        paths = [str(tmp_path / f"{colour}.png") for colour in ("red", "green", "blue")]
        for path in paths:
            Image.new("RGB", (40, 40), Path(path).stem).save(path)
        found = Answers(Models())
        early, late = found.html("m", paths[0], 9.0), found.html("m", paths[0], 0.0)
        assert (badges(early), badges(late)) == (["accepted", "not needed"], ["thinks again", "accepted"])
        assert len(inspected) == 1
        for path in (paths[1], paths[2], paths[1], paths[0]):  # the first one again, which is no longer kept
            found.html("m", path, 0.0)
        assert len(inspected) == 4
        Path(paths[1]).unlink()
        assert badges(found.html("m", paths[1], 0.0)) == ["thinks again", "accepted"]
        assert "no longer kept" in found.html("m", str(tmp_path / "none.png"), 0.0)

    def test_answers_hold_no_model(self):
        class Finder(pickle.Pickler):
            modules = 0

            def persistent_id(self, value):
                self.modules += isinstance(value, torch.nn.Module)

        model, image = lively_segmenter(), Image.new("RGB", (64, 40), "red")
        for held, expected in ((inspect_image(model, segmentation_image_processor(32), image), 0), ([model], 1)):
            finder = Finder(BytesIO())
            finder.dump(held)
            assert min(finder.modules, 1) == expected


@needs_gradio
class TestPage:
    def test_sessions_hold_no_answers(self):
        import gradio

        from hf_thinkingvit.demo.app import LaterAnswers, build_demo

        demo = build_demo(LaterAnswers([str(SHIPPED)]), [EXAMPLES / "images" / "ship.png"])
        assert not any(isinstance(block, gradio.State) for block in demo.blocks.values())

    def test_a_folder_without_a_model_is_refused_before_the_page_is_there(self, tmp_path, capsys):
        from hf_thinkingvit.demo import app

        with pytest.raises(SystemExit, match="2"):
            app.main(tmp_path, ["--model", str(tmp_path)])
        assert "has no model (there is no config.json in it)" in capsys.readouterr().err

    def test_the_page_is_there_before_torch_is_imported(self):
        code = (EXAMPLES / "space" / "app.py").read_text().partition('if __name__ == "__main__":')[0]
        code += f"""
import sys
from hf_thinkingvit.demo.app import LaterAnswers, build_demo, launch_demo

demo = build_demo(LaterAnswers([{str(SHIPPED)!r}]))
launch_demo(demo, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
print(*sorted({{"torch", "transformers", "datasets"}} & sys.modules.keys()))
"""
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr


@needs_gradio
@pytest.mark.skipif(find_spec("selenium") is None, reason="needs selenium")
@pytest.mark.skipif(
    browser_program("chromium") is None or shutil.which("chromedriver") is None, reason="needs chromium and its driver"
)
def test_the_slider_decides_again_in_a_browser(tmp_path, monkeypatch):
    from selenium.webdriver.common.action_chains import ActionChains

    from hf_thinkingvit.demo import app

    inspected = []
    monkeypatch.setattr(answers, "inspect_image", lambda *inputs: inspected.append(inputs) or inspect_image(*inputs))
    demo = app.build_demo(app.LaterAnswers([str(SHIPPED)]), [EXAMPLES / "images" / "ship.png"])
    _, address, _ = app.launch_demo(demo, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        with browser(tmp_path / "profile") as driver:

            def accepted() -> str | None:
                script = "return document.querySelector('#answer [data-accepted]')?.dataset.accepted"
                return driver.execute_script(script)

            def wait_for(stage: str) -> None:
                deadline = time.monotonic() + 120
                while accepted() != stage:
                    assert time.monotonic() < deadline, f"stage {accepted()} is accepted instead of {stage}"
                    time.sleep(0.05)

            driver.get(address)
            wait_for("0")  # at the model's own τ
            computed = len(inspected)
            slider = driver.find_element("css selector", "#threshold input[type=range]")
            near_zero = -slider.size["width"] // 2 + 12
            ActionChains(driver).move_to_element_with_offset(slider, near_zero, 0).click().perform()
            wait_for("1")
            assert float(slider.get_attribute("value")) < 0.3
            ActionChains(driver).click_and_hold(slider).move_by_offset(slider.size["width"] // 2, 0).release().perform()
            wait_for("0")
            assert len(inspected) == computed  # no model has run again
            loaded = driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
            assert loaded and all(url.startswith((address.rstrip("/"), "data:")) for url in loaded), loaded
    finally:
        demo.close()
