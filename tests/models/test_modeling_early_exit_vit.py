import pytest
import torch
import torch.nn.functional as F
from transformers.utils import is_onnx_available

from hf_thinkingvit import EarlyExitViTConfig, EarlyExitViTForImageClassification
from hf_thinkingvit.evaluation import published_stage_macs, stage_macs
from hf_thinkingvit.evaluation.calibration import threshold_grid
from hf_thinkingvit.evaluation.stages import measure_stages
from hf_thinkingvit.evaluation.sweep import StageAnswers
from hf_thinkingvit.inference import AdaptiveEngine
from hf_thinkingvit.inference.export import export_adaptive, export_onnx, export_stages
from hf_thinkingvit.models.staged_loop import MEMORY_PREFIX
from tests.models.staged_tests import StagedClassifierTests
from tests.models.test_weights_from_vit import trained_vit
from tests.reference import leading_linear, leading_norm, patch_embeddings
from tests.utils import counted_flops, lively, random_images


SIZES = {
    "num_attention_heads": 4,
    "hidden_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 12,
}
METHODS = ("branchynet", "vit_ee", "fastbert", "pabee", "act", "pondernet")


def lively_exits(**fields) -> EarlyExitViTForImageClassification:
    return lively(EarlyExitViTForImageClassification, EarlyExitViTConfig(**{"num_hidden_layers": 3, **SIZES, **fields}))


def lively_method(method: str, **fields) -> EarlyExitViTForImageClassification:
    config = getattr(EarlyExitViTConfig, method)(**{"num_hidden_layers": 4, **SIZES, **fields})
    model = lively(EarlyExitViTForImageClassification, config)
    if config.halting is not None:  # scores between 0 and 1 that differ between images
        with torch.no_grad():
            for gate in model.halting_gates:
                gate.weight.mul_(0.5)
                gate.bias.fill_(1.0 if method == "act" else -0.7)
    return model


def reference(model, pixel_values):
    """Logits and normalised tokens of every stage, with functions of torch and the weights by their names."""
    config, weights = model.config, dict(model.named_parameters())
    heads, norm = config.num_attention_heads, lambda x, name: leading_norm(weights, x, name, 1e-6)

    def linear(x, name):
        return leading_linear(weights, x, name, len(weights[name + ".weight"]))

    def layer(x, name):
        h = norm(x, name + "layernorm_before")
        q, k, v = (linear(h, f"{name}attention.{p}_proj").unflatten(-1, (heads, -1)) for p in "qkv")
        scores = torch.einsum("bqhc,bkhc->bhqk", q, k) / q.shape[-1] ** 0.5
        attended = torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), v).flatten(2)
        x = x + linear(attended, name + "attention.o_proj")
        return x + linear(F.gelu(linear(norm(x, name + "layernorm_after"), name + "mlp.fc1")), name + "mlp.fc2")

    prefix, patches = "early_exit_vit.", patch_embeddings(model, pixel_values).flatten(1, 2)
    x = torch.cat([weights[prefix + "embeddings.cls_token"].expand(len(patches), -1, -1), patches], 1)
    x = x + weights[prefix + "embeddings.position_embeddings"]
    output, left, all_logits, all_tokens = 0.0, 1.0, [], []
    for index in range(config.num_hidden_layers):
        x = layer(x, f"{prefix}layers.{index}.")
        if index + 1 not in (*config.exit_layers, config.num_hidden_layers):
            continue
        stage, y = len(all_logits), x
        is_exit = stage < len(config.exit_layers)
        if is_exit and config.exit_head == "transformer_layer":
            y = layer(x, f"exit_transformer_layers.{stage}.")
        if config.halting == "act":
            y = (output + left * x[:, 0])[:, None]
            if is_exit:
                weight = torch.minimum(linear(x[:, 0], f"halting_gates.{stage}").sigmoid(), torch.as_tensor(left))
                output, left = output + weight * x[:, 0], left - weight
        own = is_exit and config.exit_head != "shared"
        y = norm(y[:, 0], f"exit_layernorms.{stage}" if own else prefix + "layernorm")
        all_logits.append(linear(y, f"exit_classifiers.{stage}" if own else "classifier"))
        all_tokens.append(norm(x, prefix + "layernorm"))
    return all_logits, all_tokens


def reference_scores(model, pixel_values):
    """Halting scores `(images, stages)`."""
    class_tokens = []
    hooks = [gate.register_forward_pre_hook(lambda _, inputs: class_tokens.append(inputs[0])) for gate in gates(model)]
    model(pixel_values, output_stage_logits=True)
    for hook in hooks:
        hook.remove()
    scores = [torch.sigmoid(t @ gate.weight[0] + gate.bias) for t, gate in zip(class_tokens, gates(model))]
    return torch.stack([*scores, torch.ones(len(pixel_values))], dim=1)


def gates(model):
    return list(model.halting_gates)


def drawing(model) -> dict:
    """Arguments that make random answers the same in every call; none where answers are not random."""
    return {"generator": torch.Generator().manual_seed(1)} if model.exit_rule().draws else {}


class TestLinearHeads(StagedClassifierTests):
    lively = staticmethod(lively_exits)
    reference = staticmethod(reference)
    tokens_shape = (17, 32)
    half_tolerance = {torch.float16: 5e-3, torch.bfloat16: 5e-2}


class TestTransformerLayerHeads(TestLinearHeads):
    lively = staticmethod(lambda: lively_exits(exit_head="transformer_layer"))


@pytest.mark.parametrize("method", METHODS)
def test_every_stage_equals_a_plain_reference(method):
    model, pixel_values = lively_method(method), random_images()
    with torch.no_grad():
        stage_logits = model(pixel_values, output_stage_logits=True).stage_logits
        tokens = model.base_model(pixel_values).last_hidden_state
        expected, expected_tokens = reference(model, pixel_values)
    for logits, expected_logits in zip(stage_logits, expected, strict=True):
        torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens, expected_tokens[-1], atol=1e-5, rtol=1e-5)


class TestFromVit:
    @pytest.mark.parametrize("method", [None, "branchynet", "vit_ee", "pabee", "pondernet"])
    def test_without_exits_it_is_the_plain_vit(self, method):
        vit, pixel_values = trained_vit().eval(), random_images()
        model = EarlyExitViTForImageClassification.from_vit(vit, method)
        never = 0.0 if method != "pabee" and method != "pondernet" else 1e9
        with torch.no_grad():
            torch.testing.assert_close(model(pixel_values, threshold=never).logits, vit(pixel_values).logits)

    def test_a_method_is_one_of_the_published(self):
        with pytest.raises(ValueError, match="`method` must be one of .*'pabee'"):
            EarlyExitViTForImageClassification.from_vit(trained_vit(), "from_pretrained")


class TestCosts:
    @pytest.mark.parametrize("method", METHODS)
    @torch.no_grad()
    def test_macs_are_those_of_the_forward(self, method):
        model, pixel_values = lively_method(method), random_images(1)
        never = 0.0 if method in ("branchynet", "vit_ee", "fastbert") else 1e9
        macs = stage_macs(model.config)
        for stages in range(1, model.config.num_stages + 1):
            spent = counted_flops(lambda stages=stages: model(pixel_values, threshold=never, max_stages=stages))
            assert spent == 2 * sum(macs[:stages])

    def test_a_published_exit_costs_a_plain_vit_as_deep(self):
        config = EarlyExitViTConfig(exit_layers=[6], num_labels=1000)
        assert sum(published_stage_macs(config)) / 1e9 == pytest.approx(1.25, abs=0.01)
        assert published_stage_macs(config)[0] > sum(stage_macs(config)[:1])


CRITERIA = {
    "normalised_entropy": ("fastbert", 0.72),
    "similarity": ("fastbert", 3.0),
    "patience": ("pabee", 1.0),  # with one head for all exits, whose predictions agree now and then
    "confident_twice": ("fastbert", 0.3),
    "act": ("act", 0.9),
    "pondernet": ("pondernet", 1.0),
    "q_exit": ("pondernet", 0.6),
}


@pytest.fixture(params=sorted(CRITERIA))
def deciding(request):
    """
    A model with a criterion and τ at which images differ in their exits, and those of each image computed alone, one
    after the other.
    """
    method, threshold = CRITERIA[request.param]
    model = lively_method(method, **({"exit_head": "shared"} if request.param == "patience" else {}))
    model.config.exit_criterion = request.param
    model.config.threshold = threshold
    images, draws = random_images(12), drawing(model)
    with torch.no_grad():
        alone = torch.cat([model(image, **draws).exit_stage for image in images.split(1)])
    assert len(alone.unique()) > 1
    return model, images, alone


class TestExits:
    @torch.no_grad()
    def test_forward_and_every_answer(self, deciding):
        model, images, stages = deciding
        accepted = model(images, **drawing(model))
        assert torch.equal(accepted.exit_stage, stages)
        outputs = model(images, output_stage_logits=True, **drawing(model))
        assert torch.equal(outputs.exit_stage, stages)
        of_its_stage = torch.stack(outputs.stage_logits)[stages, torch.arange(12)]
        torch.testing.assert_close(accepted.logits, of_its_stage)

    def test_engine(self, deciding):
        model, images, stages = deciding
        engine = AdaptiveEngine(model, batch_size=5, in_order=False, **drawing(model))
        results = {result.index: result.exit_stage for result in engine(images)}
        assert [results[index] for index in range(12)] == stages.tolist()

    @torch.no_grad()
    def test_compiled_stages(self, deciding):
        model, images, stages = deciding
        model.compile_stages([4], backend="eager")
        assert torch.equal(model(images, **drawing(model)).exit_stage, stages)

    def test_one_pass_serves_every_threshold(self, deciding):
        model, images, stages = deciding
        batches = [{"pixel_values": images[:7]}, {"pixel_values": images[7:]}]
        measured = measure_stages(model, batches, lambda answer, batch: {}, progress=False, **drawing(model))
        right = torch.ones(12, 4, dtype=torch.bool)
        config = model.config
        macs = tuple(torch.tensor(stage_macs(config)).cumsum(0).tolist())
        answers = StageAnswers(measured.scores, right, right, macs, config.exit_criterion, 10, 12, "images")
        assert torch.equal(answers.exit_stages(config.threshold), stages)
        # From no early exit to none that can exit earlier; calibration searches between the two.
        ends = answers.exit_stages_of_each([threshold_grid(answers)[0], threshold_grid(answers)[-1]])
        assert ends[0].eq(3).all()
        earliest = config.exit_criterion in ("similarity", "confident_twice")  # which compare two stages
        assert ends[1].eq(int(earliest)).all()

    @pytest.mark.parametrize("broken", [torch.nan, torch.inf])
    @torch.no_grad()
    def test_broken_pixels_run_all_stages(self, deciding, broken):
        model, images, stages = deciding
        images[4, 0, 3, 3] = broken
        stages[4] = 3
        assert torch.equal(model(images, **drawing(model)).exit_stage, stages)

    @pytest.mark.parametrize("deciding", ["act", "pondernet"], indirect=True)
    def test_exported_programs(self, deciding):
        model, images, stages = deciding
        threshold = torch.tensor(model.exit_rule().thresholds)
        state, rows = {"pixel_values": images}, torch.arange(12)
        if model.exit_rule().draws:  # programs take the numbers that `forward` draws
            state[MEMORY_PREFIX + "noise"] = torch.rand(12, **drawing(model))
        for stage, program in enumerate(export_stages(model)):
            outputs = program.module()(state, threshold)
            assert torch.equal(outputs["exits"], stages[rows] == stage)
            state = {name: tensor[~outputs["exits"]] for name, tensor in outputs["state"].items()}
            rows = rows[~outputs["exits"]]
            if len(rows) < 2:
                break

    @pytest.mark.parametrize("deciding", ["act"], indirect=True)
    def test_adaptive_program(self, deciding):
        model, images, stages = deciding
        threshold = torch.tensor(model.exit_rule().thresholds)
        adaptive = export_adaptive(model).module()
        assert [adaptive(image, threshold)["exit_stage"].item() for image in images.split(1)] == stages.tolist()

    @pytest.mark.parametrize("deciding", ["pondernet"], indirect=True)
    @pytest.mark.skipif(not is_onnx_available(), reason="needs onnx")
    def test_onnx_files(self, deciding, tmp_path):
        onnxruntime = pytest.importorskip("onnxruntime")
        model, images, stages = deciding
        session = onnxruntime.InferenceSession(export_onnx(model, tmp_path).adaptive)
        threshold = torch.tensor(model.exit_rule().thresholds).numpy()
        place = [output.name for output in session.get_outputs()].index("exit_stage")
        noise = torch.rand(12, **drawing(model)).split(1)
        inputs = [
            {"pixel_values": image.numpy(), "threshold": threshold, "noise": drawn.numpy()}
            for image, drawn in zip(images.split(1), noise)
        ]
        assert [session.run(None, each)[place].item() for each in inputs] == stages.tolist()


@torch.no_grad()
def test_recordings_are_of_the_layers_in_order():
    """Also where exits have layers of their own."""
    model, images = lively_method("vit_ee", threshold=0.0), random_images()
    model.set_attn_implementation("eager")
    outputs = model(images, output_hidden_states=True, output_attentions=True)
    bare = model.base_model(images, output_hidden_states=True)
    assert len(outputs.hidden_states) == 5 and len(outputs.attentions) == 4
    for found, expected in zip(outputs.hidden_states, bare.hidden_states, strict=True):
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_act_weights_sum_to_one():
    """With ACT every answer is a weighted mean: of equal class tokens it is that token."""
    model = lively_method("act")
    state = model.begin(random_images())
    for stage in range(4):
        token = torch.full((6, 17, 32), 0.3) + torch.arange(32)
        state = {**model.run_stage(stage, state, is_last=True), "tokens": token}
        state.pop("key", None)
        expected = model.classifier(model.base_model.layernorm(token[:, 0]))
        torch.testing.assert_close(model.answer(stage, state)["logits"], expected, atol=1e-4, rtol=1e-4)
        state = model.recycle(stage, state)
