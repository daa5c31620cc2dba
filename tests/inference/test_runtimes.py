"""Stages in OpenVINO and ONNX Runtime: the same answers as PyTorch, by the same loop, from a folder without weights."""

import pickle
import threading
from functools import partial

import pytest
import torch
from PIL import Image

from hf_thinkingvit import AdaptiveImageClassificationPipeline
from hf_thinkingvit.evaluation import compare_precisions
from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.inference import AdaptiveEngine, with_runtime
from hf_thinkingvit.inference.runtimes import writing
from hf_thinkingvit.models.staged_loop import run_stages
from tests.inference.conftest import NETWORKS, early_exits, need_runtime, with_exits
from tests.models.segmentation_models import lively_segmenter
from tests.utils import lively_model, random_images


pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporters


# Two stages of one layer, since exports are slow; those of NETWORKS are not here.
TWO_STAGES = {"thinking_stages": [1, 4], "num_hidden_layers": 1}
FAMILIES = {
    "act": partial(early_exits, halting="act", exit_criterion="act", exit_head="shared"),
    "pondernet": partial(early_exits, halting="pondernet", exit_criterion="pondernet"),
    "segmentation": partial(lively_segmenter, **TWO_STAGES),
    "mask transformer": partial(lively_segmenter, "mask_transformer", **TWO_STAGES),
}


def with_runtime_of(model, runtime):
    return with_runtime(model, runtime, threads=1)


@torch.no_grad()
def assert_equal_in_float32(model, loaded) -> None:
    """
    Every answer of every stage to 1e-4, and exits except where a score lies within rounding of τ, which is counted: τ
    is set to the very score of one of the images.
    """
    images, stages = random_images(16), range(model.config.num_stages)

    def drawn():
        return {"generator": torch.Generator().manual_seed(0)} if model.exit_rule().draws else {}

    def run(network):
        return run_stages(network, network.exit_rule(), stages, images, run_all=True, **drawn())

    expected, found = run(model), run(loaded)
    for step, other in zip(found.steps, expected.steps, strict=True):
        assert step.answer.keys() == other.answer.keys()
        for name in step.answer:
            torch.testing.assert_close(step.answer[name], other.answer[name], atol=1e-4, rtol=0)
        torch.testing.assert_close(step.score, other.score, atol=1e-4, rtol=0)
    ranked = expected.steps[-2].score.sort().values
    tau = ranked[8].item()
    model.config.threshold = loaded.config.threshold = tau
    report = compare_precisions(model, loaded, [{"pixel_values": images}])
    assert report.near_threshold >= 1 and report.unexplained_exit == 0
    output, same = loaded(images, **drawn()), model(images, **drawn())
    assert type(output) is type(same)
    every = loaded(images, output_stage_logits=True, **drawn()), model(images, output_stage_logits=True, **drawn())
    for name in ("stage_logits", "halting_scores"):
        torch.testing.assert_close(*(one.get(name) for one in every), atol=1e-4, rtol=0)
    here = output.exit_stage == same.exit_stage
    assert here.sum() >= 16 - report.near_threshold
    torch.testing.assert_close(output.logits[here], same.logits[here], atol=1e-4, rtol=0)


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

    @pytest.mark.parametrize("family", FAMILIES)
    def test_of_every_family_and_head(self, runtime, family):
        """Whatever stages answer and exits remember."""
        model = FAMILIES[family]()
        assert_equal_in_float32(model, with_runtime_of(model, runtime))

    def test_of_token_pruning(self, runtime):
        """The share of patches that remain is fixed; another one is refused wherever it can be given."""
        model, images = lively_model(pruning_layers=[0], pruning_keep_rate=0.5, **TWO_STAGES), random_images(2)
        loaded = with_runtime_of(model, runtime)
        assert_equal_in_float32(model, loaded)
        pipe = AdaptiveImageClassificationPipeline(model=loaded, image_processor=evaluation_image_processor(32))
        picture = Image.effect_noise((40, 50), 50).convert("RGB")
        for call in (
            lambda: loaded(images, keep_rate=0.7),
            lambda: AdaptiveEngine(loaded, keep_rate=0.7),
            lambda: pipe(picture, keep_rate=0.7),
            lambda: list(pipe([picture], keep_rate=0.7)),
        ):
            with pytest.raises(ValueError, match=r"exported programs keep `pruning_keep_rate` = 0\.5"):
                call()
        loaded.config.pruning_keep_rate = 0.7
        with pytest.raises(ValueError, match=r"`pruning_keep_rate` is 0\.7 there and 0\.5 in the programs"):
            loaded(images)

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_in_half_precision(self, exported, precision):
        """The state has the dtype that OpenVINO computes in; answers and exits are judged in float32."""
        need_runtime("openvino")
        from hf_thinkingvit.torch_free import openvino_program

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


def test_the_model_stays_as_it_was(monkeypatch):
    """
    In bfloat16, partly in training mode, with another implementation of attention; also while it is exported, when
    another thread may use it.
    """
    need_runtime("onnxruntime")
    model = lively_model(num_hidden_layers=1, thinking_stages=[1, 4]).to(torch.bfloat16).train()
    model.base_model.eval()

    def facts():
        tensors = {name: (tensor.dtype, tensor.data_ptr()) for name, tensor in model.state_dict(keep_vars=True).items()}
        modes = {name: module.training for name, module in model.named_modules()}
        return tensors, modes, model.config._attn_implementation

    meanwhile, export_program = [], writing.export_program

    def export_and_look(module, *arguments):
        meanwhile.append(facts())
        return export_program(module, *arguments)

    monkeypatch.setattr(writing, "export_program", export_and_look)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected_facts = facts()
    loaded = with_runtime(model, "onnxruntime", threads=1)
    assert meanwhile == [expected_facts] * 2 and facts() == expected_facts
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    images = random_images(4)
    with torch.no_grad():
        expected = model.float().eval()(images, threshold=0.0).logits
    torch.testing.assert_close(loaded(images, threshold=0.0).logits, expected, atol=1e-4, rtol=0)
    with pytest.raises(TypeError, match="folder that was temporary"):
        pickle.dumps(loaded)
