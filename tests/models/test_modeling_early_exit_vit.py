import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.utils import is_onnx_available

from hf_thinkingvit import EarlyExitViTConfig, EarlyExitViTForImageClassification
from hf_thinkingvit.evaluation import published_stage_macs, stage_macs
from hf_thinkingvit.evaluation.calibration import threshold_grid
from hf_thinkingvit.evaluation.stages import measure_stages
from hf_thinkingvit.evaluation.sweep import StageAnswers
from hf_thinkingvit.inference import AdaptiveEngine
from hf_thinkingvit.inference.export import export_adaptive, export_onnx, export_stages
from hf_thinkingvit.models.staged_loop import MEMORY_PREFIX, run_stages, step_stage
from tests.models.staged_tests import StagedClassifierTests, assert_gradients
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


class TestLosses:
    def test_equal_weights(self):
        assert_gradients(lively_exits(), reference)

    def test_pabee_weights_losses_by_layer(self):
        model, pixel_values, labels = lively_method("pabee").train(), random_images(), torch.arange(6)
        losses = [F.cross_entropy(logits, labels) for logits in reference(model, pixel_values)[0]]
        expected = sum(layer * loss for layer, loss in enumerate(losses, 1)) / 10
        torch.testing.assert_close(model(pixel_values, labels=labels).loss, expected)

    def test_act(self):
        model, pixel_values = lively_method("act", halting_loss_weight=0.3), random_images()
        scores, logits = reference_scores(model.train(), pixel_values), reference(model, pixel_values)[0]
        expected, stages = 0.0, set()
        for image in range(6):
            total, stage = 0.0, 0
            while stage < 3 and total + scores[image, stage].item() <= 0.99:
                total, stage = total + scores[image, stage], stage + 1
            stages.add(stage)
            task = F.cross_entropy(logits[stage][image], torch.tensor(image))
            expected = expected + (task + 0.3 * (stage + 1 + 1 - total)) / 6
        assert len(stages) > 1
        assert_loss_and_gradients(model, pixel_values, expected)

    def test_pondernet(self):
        model, pixel_values = lively_method("pondernet", halting_loss_weight=0.3, halting_prior=0.4), random_images()
        scores, logits = reference_scores(model.train(), pixel_values), reference(model, pixel_values)[0]
        prior = torch.tensor([0.4, 0.4 * 0.6, 0.4 * 0.6**2, 0.6**3])
        expected = 0.0
        for image in range(6):
            left, p = 1.0, []
            for score in scores[image, :3]:
                p.append(left * score)
                left = left * (1 - score)
            p = torch.stack([*p, left])
            losses = torch.stack([F.cross_entropy(each[image], torch.tensor(image)) for each in logits])
            expected = expected + ((p * losses).sum() + 0.3 * (p * (p / prior).log()).sum()) / 6
        assert_loss_and_gradients(model, pixel_values, expected)

    def test_self_distillation_trains_nothing_but_the_exits(self):
        model, pixel_values = lively_method("fastbert").train(), random_images()
        model.freeze_backbone()
        probabilities = [logits.softmax(-1) for logits in reference(model, pixel_values)[0]]
        divergences = [(p * (p / probabilities[-1]).log()).sum(-1).mean() for p in probabilities[:-1]]
        expected = sum(divergences) / 3
        assert_loss_and_gradients(model, pixel_values, expected)
        trained = {name.partition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {"exit_classifiers", "exit_layernorms"}
        assert not any(parameter.grad is not None for parameter in model.early_exit_vit.parameters())

    @pytest.mark.parametrize("method", ["act", "pondernet", "fastbert"])
    def test_parts_of_a_batch_sum_to_the_whole(self, method):
        model, pixel_values = lively_method(method).train(), random_images()
        labels = torch.tensor([3, -100, 0, 5, 7, -100])
        whole = model(pixel_values, labels=labels).loss
        parts = [
            model(pixel_values[rows], labels=labels[rows], num_items_in_batch=4).loss
            for rows in (slice(0, 2), slice(2, 6))
        ]
        torch.testing.assert_close(sum(parts), whole)

    def test_evaluation_measures_the_accepted_answers(self):
        model, labels = lively_method("pondernet"), torch.arange(6)
        with torch.no_grad():
            outputs = model(random_images(), labels=labels)
        torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))


def assert_loss_and_gradients(model, pixel_values, expected):
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(expected, list(trained.values()), allow_unused=True)
    loss = model(pixel_values, labels=torch.arange(6)).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    for (name, parameter), gradient in zip(trained.items(), gradients):
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, gradient, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


CRITERIA = {
    "normalised_entropy": ("fastbert", 0.72),
    "similarity": ("fastbert", 3.0),
    "patience": ("pabee", 1.0),  # with one head for all exits, whose predictions agree now and then
    "confident_twice": ("fastbert", 0.3),
    "act": ("act", 0.9),
    "pondernet": ("pondernet", 1.0),
    "q_exit": ("pondernet", 0.6),
}


def drawing(model) -> dict:
    """Arguments that make random answers the same in every call; none where answers are not random."""
    return {"generator": torch.Generator().manual_seed(1)} if model.exit_rule().draws else {}


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


class TestSampledHalting:
    @torch.no_grad()
    def test_frequencies_are_the_probabilities(self):
        """Of one image, drawn often; within four standard deviations."""
        model, draws = lively_method("pondernet"), 4000
        image = random_images(1, seed=7)
        scores = reference_scores(model, image)[0]
        probabilities = scores * torch.cat([torch.ones(1), (1 - scores[:-1]).cumprod(0)])
        torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0))
        generator = torch.Generator().manual_seed(0)
        stages = model(image.expand(draws, -1, -1, -1), generator=generator).exit_stage
        shares = torch.bincount(stages, minlength=4) / draws
        assert ((shares - probabilities).abs() < 4 * (probabilities * (1 - probabilities) / draws).sqrt()).all()
        assert probabilities.min() > 0.03

    @torch.no_grad()
    def test_a_generator_makes_it_reproducible(self):
        model, images = lively_method("pondernet"), random_images(24)
        runs = [model(images, generator=torch.Generator().manual_seed(seed)).exit_stage for seed in (0, 0, 1)]
        assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])

    def test_a_generator_is_for_a_criterion_that_draws(self):
        for call in (lively_exits(), lambda images, generator: AdaptiveEngine(lively_exits(), generator=generator)):
            with pytest.raises(ValueError, match="`generator` is for an `exit_criterion` that draws .*'topk_entropy'"):
                call(random_images(), generator=torch.Generator())

    @torch.no_grad()
    def test_draws_do_not_depend_on_the_last_bits_of_pixels(self):
        """Nor on the dtype; images whose halting scores change with it could exit elsewhere, but none is so near."""
        model, images = lively_method("pondernet"), random_images(24)
        exits = model(images, generator=torch.Generator().manual_seed(0)).exit_stage
        moved = model(images * (1 + 1e-6), generator=torch.Generator().manual_seed(0)).exit_stage
        assert torch.equal(exits, moved)
        rounded = model.bfloat16()(images.bfloat16(), generator=torch.Generator().manual_seed(0)).exit_stage
        assert (exits == rounded).float().mean() > 0.9

    @torch.no_grad()
    def test_without_a_generator_the_global_one_draws(self):
        model, images = lively_method("pondernet"), random_images(24)
        runs = []
        for seed in (0, 0, None):
            if seed is not None:
                torch.manual_seed(seed)
            runs.append(model(images).exit_stage)
        assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[1], runs[2])

    def test_an_engines_generator_goes_on_and_starts_again(self):
        model, images = lively_method("pondernet"), random_images(24)
        generator = torch.Generator().manual_seed(3)

        def exits(batch_size):
            return [
                result.exit_stage
                for result in AdaptiveEngine(model, batch_size=batch_size, generator=generator)(images)
            ]

        first, second = exits(5), exits(5)
        generator.manual_seed(3)
        assert exits(24) == first != second

    def test_a_pipeline_takes_it(self):
        from hf_thinkingvit import AdaptiveImageClassificationPipeline
        from hf_thinkingvit.image_processing import evaluation_image_processor

        model = lively_method("pondernet")
        classifier = AdaptiveImageClassificationPipeline(model, image_processor=evaluation_image_processor(32))
        pixels = torch.randint(0, 256, (12, 32, 32, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
        images = [Image.fromarray(each) for each in pixels]
        stream, again, alone = (
            [result[0]["exit_stage"] for result in classify(torch.Generator().manual_seed(5))]
            for classify in (
                lambda generator: classifier(images, generator=generator, batch_size=5),
                lambda generator: classifier(images, generator=generator),
                lambda generator: [classifier(image, generator=generator) for image in images],
            )
        )
        assert stream == again == alone and len(set(stream)) > 1

    def test_q_exit_is_the_median_of_the_sampled_exits(self):
        """Balagansky and Gavrilov's deterministic criterion: the first stage by which F is above τ."""
        model, images = lively_method("pondernet", exit_criterion="q_exit"), random_images(24)
        assert model.config.threshold == 0.5
        with torch.no_grad():
            halted = 1 - (1 - reference_scores(model, images)).cumprod(dim=1)
            assert torch.equal(model(images).exit_stage, (halted > 0.5).int().argmax(dim=1))
            assert torch.equal(model(images).exit_stage, model(images).exit_stage)

    def test_one_measurement_repeats_and_does_not_depend_on_batches(self):
        model, images = lively_method("pondernet"), random_images(12)
        scores = [
            measure_stages(
                model, [{"pixel_values": part} for part in images.split(size)], lambda *_: {}, progress=False
            ).scores
            for size in (5, 5, 12)
        ]
        assert torch.equal(scores[0], scores[1])
        torch.testing.assert_close(scores[1], scores[2])


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


def test_a_drawn_number_decides(monkeypatch):
    """A number above any halting probability keeps an image from halting; 0 lets it halt at once."""
    model, images = lively_method("pondernet"), random_images(4)
    monkeypatch.setattr(torch, "rand", lambda count, **_: torch.tensor([0.0, 0.9999999, 0.0, 0.9999999]))
    with torch.no_grad():
        run = run_stages(model, model.exit_rule(), range(4), images)
    assert run.exit_stage.tolist() == [0, 3, 0, 3]


def test_a_stage_without_the_drawn_number_says_what_to_do():
    model = lively_method("pondernet")
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="let the first stage start with the state that `first_state`"),
    ):
        step_stage(model, model.exit_rule(), range(4), 0, {"pixel_values": random_images()})
