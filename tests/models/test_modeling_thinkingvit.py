import copy
import math

import pytest
import torch

from hf_thinkingvit import ThinkingViTConfig, ThinkingViTForImageClassification, ThinkingViTModel
from hf_thinkingvit.models.exit_scores import topk_entropy
from tests.models.staged_tests import StagedClassifierTests, assert_golden, assert_gradients
from tests.reference import thinkingvit_stages
from tests.utils import (
    HostSynchronisations,
    lively_model,
    middle_threshold,
    random_images,
    tiny_config,
)


SCHEDULES = [[4], [2, 2], [1, 4], [1, 2, 4], [2, 3, 3, 4]]


@pytest.mark.parametrize("golden", ["thinkingvit_2stage", "thinkingvit_3stage"])
def test_outputs_of_the_official_implementation(golden):
    assert_golden(golden, num_thresholds=4)


class TestStaged(StagedClassifierTests):
    lively, reference = staticmethod(lively_model), staticmethod(thinkingvit_stages)
    tokens_shape = (17, 32)
    half_tolerance = {torch.float16: 0.01, torch.bfloat16: 0.06}


class TestStages:
    """The computation, compared with a plain implementation of ThinkingViT."""

    @pytest.mark.parametrize("stages", SCHEDULES)
    @torch.no_grad()
    def test_logits_of_every_stage(self, stages):
        model, pixel_values = lively_model(thinking_stages=stages, num_attention_heads=4), random_images()
        expected, tokens = thinkingvit_stages(model, pixel_values)
        outputs = model(pixel_values, output_stage_logits=True)
        assert len(outputs.stage_logits) == len(stages)
        for index in range(len(stages)):
            torch.testing.assert_close(outputs.stage_logits[index], expected[index], atol=1e-5, rtol=1e-5)
            logits = model(pixel_values, threshold=0.0, max_stages=index + 1).logits  # last layer in two parts
            torch.testing.assert_close(logits, expected[index], atol=1e-5, rtol=1e-5)
            last_hidden_state = model.thinkingvit(pixel_values, max_stages=index + 1).last_hidden_state
            torch.testing.assert_close(last_hidden_state, tokens[index], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("stages", SCHEDULES)
    def test_gradients_in_training(self, stages):
        assert_gradients(lively_model(thinking_stages=stages, num_attention_heads=4), thinkingvit_stages)

    def test_gradients_through_the_two_part_last_layer(self):
        model, pixel_values = lively_model(), random_images()
        threshold = middle_threshold(model, pixel_values)
        outputs = model(pixel_values, threshold=threshold, max_stages=2)
        assert outputs.exit_stage.unique().tolist() == [0, 1]
        expected, _ = thinkingvit_stages(model, pixel_values)
        expected = torch.stack([expected[stage][row] for row, stage in enumerate(outputs.exit_stage)])
        gradients = torch.autograd.grad(outputs.logits.square().sum(), list(model.parameters()), allow_unused=True)
        references = torch.autograd.grad(expected.square().sum(), list(model.parameters()), allow_unused=True)
        for (name, _), gradient, reference in zip(model.named_parameters(), gradients, references):
            assert (gradient is None) == (reference is None), name
            if gradient is not None:
                torch.testing.assert_close(gradient, reference, atol=1e-3, rtol=1e-4, msg=lambda m: f"{name}: {m}")

    @torch.no_grad()
    def test_recycling_starts_without_effect(self):
        """α starts at 0: each stage of a new model is the plain sub-network."""
        model, pixel_values = ThinkingViTForImageClassification(tiny_config()).eval(), random_images()
        plain = copy.deepcopy(model.config)
        plain.thinking_stages = [4]
        alone = ThinkingViTForImageClassification(plain).eval()
        alone.load_state_dict(model.state_dict(), strict=False)
        torch.testing.assert_close(alone(pixel_values).logits, model(pixel_values, threshold=0.0).logits)


class TestEarlyExit:
    @staticmethod
    def count_rows(model, call):
        """The output of `call()`, and the output shapes of the embeddings, the first and the last layer in it."""
        computed = {"embeddings": [], "first": [], "last": []}
        modules = {
            "embeddings": model.thinkingvit.embeddings,
            "first": model.thinkingvit.layers[0],
            "last": model.thinkingvit.layers[-1],
        }

        def record(name):
            def hook(module, args, output):
                computed[name].append(tuple((output[0] if isinstance(output, tuple) else output).shape))

            return hook

        hooks = [module.register_forward_hook(record(name)) for name, module in modules.items()]
        try:
            return call(), computed
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def test_later_stages_see_only_the_images_that_go_on(self):
        model, pixel_values = lively_model(), random_images(8)
        entropies = [topk_entropy(logits) for logits in model(pixel_values, output_stage_logits=True).stage_logits]
        going_on = entropies[0] >= entropies[0].median() + 1e-4
        thresholds = [float(entropies[0].median()) + 1e-4, float(entropies[1][going_on].median()) + 1e-4]
        outputs, rows = self.count_rows(model, lambda: model(pixel_values, threshold=thresholds))

        expected_stage = torch.full((8,), 2)
        expected_stage[entropies[1] < thresholds[1]] = 1
        expected_stage[entropies[0] < thresholds[0]] = 0
        assert torch.equal(outputs.exit_stage, expected_stage)
        running = [8, int((expected_stage > 0).sum()), int((expected_stage > 1).sum())]
        assert running[0] > running[1] > running[2] > 0
        # Each channel of the embeddings is computed once: 8 of 32 for all images, 8 and 16 more for those that go on.
        assert rows["embeddings"] == [(running[0], 17, 8), (running[1], 17, 8), (running[2], 17, 16)]
        assert rows["first"] == [(running[0], 17, 8), (running[1], 17, 16), (running[2], 17, 32)]
        # The last layer: the class token for all that run the stage, the other 16 tokens for those that go on.
        assert rows["last"] == [
            (running[0], 1, 8),
            (running[1], 16, 8),
            (running[1], 1, 16),
            (running[2], 16, 16),
            (running[2], 1, 32),
        ]

    @torch.no_grad()
    def test_waits_for_the_device_once_an_exit(self):
        model, images = lively_model(), random_images(12)
        threshold = [middle_threshold(model, images), 0.0]
        with torch.no_grad(), HostSynchronisations() as counter:
            exit_stage = model(images, threshold=threshold).exit_stage
            assert counter.counts == ["nonzero", "nonzero"]  # which images go on, after each stage but the last
            model(images, max_stages=1)
            model(images, output_stage_logits=True)
            assert len(counter.counts) == 2
        assert exit_stage.unique().tolist() == [0, 2]

    @pytest.mark.parametrize("patch_size", [4, 8])  # more tokens than channels, and fewer
    @torch.no_grad()
    def test_pixels_wait_only_while_a_later_stage_is_wider(self, patch_size):
        model = lively_model(thinking_stages=[2, 4, 4], patch_size=patch_size)
        state = model.begin(random_images(2))
        waiting = ["pixel_values" in state]
        for stage in range(2):
            state = model.run_stage(stage, state, is_last=False)
            state = model.recycle(stage, state)
            waiting.append("pixel_values" in state)
        assert waiting == [True, False, False]

    def test_no_later_stage_runs_when_all_exit(self):
        model = lively_model()
        outputs, rows = self.count_rows(model, lambda: model(random_images(), threshold=10.0))
        assert outputs.exit_stage.tolist() == [0] * 6
        assert rows["first"] == [(6, 17, 8)] and rows["last"] == [(6, 1, 8)]

    @pytest.mark.parametrize("criterion", ["topk_entropy", "entropy", "max_probability", "margin"])
    @torch.no_grad()
    def test_logits_entropy_and_stage_belong_together(self, criterion):
        model, pixel_values = lively_model(exit_criterion=criterion), random_images(16)
        stage_logits, _ = thinkingvit_stages(model, pixel_values)
        outputs = model(pixel_values, threshold=middle_threshold(model, pixel_values))
        assert len(outputs.exit_stage.unique()) > 1
        accepted = torch.stack([stage_logits[stage][row] for row, stage in enumerate(outputs.exit_stage)])
        torch.testing.assert_close(outputs.logits, accepted, atol=1e-5, rtol=1e-5)
        probabilities = accepted.softmax(-1)
        if criterion != "entropy":
            probabilities = probabilities.topk(10).values / probabilities.topk(10).values.sum(-1, keepdim=True)
        expected_entropy = -(probabilities * probabilities.log()).sum(-1)
        torch.testing.assert_close(outputs.entropy, expected_entropy, atol=1e-5, rtol=1e-5)

    @torch.no_grad()
    def test_call_arguments_override_the_configuration(self):
        model, pixel_values = lively_model(threshold=10.0), random_images()
        assert model(pixel_values).exit_stage.tolist() == [0] * 6
        assert model(pixel_values, threshold=0.0).exit_stage.tolist() == [2] * 6
        assert model(pixel_values, threshold=[0.0, 10.0]).exit_stage.tolist() == [1] * 6
        assert model(pixel_values, threshold=0.0, max_stages=2).exit_stage.tolist() == [1] * 6
        assert model(pixel_values).exit_stage.tolist() == [0] * 6
        assert model.config.threshold == 10.0


class TestOutputs:
    @torch.no_grad()
    def test_recorded_outputs_have_the_images_that_ran_each_stage(self):
        model, pixel_values = lively_model(threshold=0.0), random_images(6)
        model.set_attn_implementation("eager")
        threshold = middle_threshold(model, pixel_values)
        plain = model(pixel_values, threshold=threshold)
        outputs = model(pixel_values, threshold=threshold, output_hidden_states=True, output_attentions=True)
        torch.testing.assert_close(outputs.logits, plain.logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(outputs.exit_stage, plain.exit_stage)
        running = [int((outputs.exit_stage >= stage).sum()) for stage in range(3)]
        assert running[0] > running[1] > 0
        shapes = [(running[stage], 17, width) for stage, width in enumerate([8, 16, 32]) for _ in range(3)]
        shapes = [shape for shape in shapes if shape[0]]
        assert [tuple(states.shape) for states in outputs.hidden_states] == [(6, 17, 8), *shapes]
        assert [tuple(weights.shape) for weights in outputs.attentions] == [
            (images, width // 8, 17, 17) for images, _, width in shapes
        ]
        # In batch order: stage 1 starts with the rows whose exit stage is 1 or more.
        full = model(pixel_values, threshold=0.0, output_hidden_states=True)
        expected = full.hidden_states[1 + 3][outputs.exit_stage >= 1]
        torch.testing.assert_close(outputs.hidden_states[1 + 3], expected, atol=1e-5, rtol=1e-5)

    def test_tuple_output(self):
        outputs = lively_model()(random_images(2), return_dict=False)
        assert isinstance(outputs, tuple) and [tuple(value.shape) for value in outputs] == [(2, 12), (2,), (2,)]

    @torch.no_grad()
    def test_other_resolutions_by_interpolation(self):
        model = lively_model()
        assert model(random_images(2, (48, 24)), interpolate_pos_encoding=True).logits.shape == (2, 12)
        pixel_values = random_images()
        same = model(pixel_values, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(same, model(pixel_values).logits)

    @torch.no_grad()
    def test_interpolated_position_embeddings_are_vits(self):
        from transformers import ViTConfig, ViTForImageClassification

        vit = ViTForImageClassification(
            ViTConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64, num_hidden_layers=2, image_size=32)
        ).eval()
        model = ThinkingViTForImageClassification.from_vit(vit, [4]).eval()
        pixel_values = random_images(2, (64, 96))
        expected = vit(pixel_values, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(model(pixel_values, interpolate_pos_encoding=True).logits, expected)

    @torch.no_grad()
    def test_images_and_patches_that_are_not_square(self):
        model = lively_model(image_size=(32, 48), patch_size=(8, 16))
        assert model(random_images(2, (32, 48))).logits.shape == (2, 12)
        assert model.thinkingvit.embeddings.position_embeddings.shape == (1, 1 + 4 * 3, 32)


class TestLoss:
    def test_weights_of_the_stages(self):
        pixel_values, labels = random_images(), torch.arange(6)
        model = lively_model(stage_loss_weights=[0.2, 0.0, 1.5]).train()
        outputs = model(pixel_values, labels=labels)
        losses = [torch.nn.functional.cross_entropy(logits, labels) for logits in outputs.stage_logits]
        torch.testing.assert_close(outputs.loss, 0.2 * losses[0] + 1.5 * losses[2])
        outputs.loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    @torch.no_grad()
    def test_training_mode_runs_every_stage_whatever_the_threshold(self):
        model = lively_model(threshold=10.0).train()
        outputs = model(random_images())
        assert outputs.loss is None and len(outputs.stage_logits) == 3
        assert outputs.exit_stage.tolist() == [2] * 6
        assert torch.equal(outputs.logits, outputs.stage_logits[-1])

    @torch.no_grad()
    def test_evaluation_loss_is_of_the_accepted_answers(self):
        model, pixel_values, labels = lively_model(), random_images(), torch.arange(6)
        outputs = model(pixel_values, labels=labels, threshold=middle_threshold(model, pixel_values))
        assert len(outputs.exit_stage.unique()) > 1
        torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, labels))

    def test_multi_label_and_regression(self):
        multi = lively_model(problem_type="multi_label_classification").train()
        targets = torch.randint(2, (6, 12)).float()
        outputs = multi(random_images(), labels=targets)
        expected = [torch.nn.functional.binary_cross_entropy_with_logits(z, targets) for z in outputs.stage_logits]
        torch.testing.assert_close(outputs.loss, sum(expected) / 3)
        regression = lively_model(num_labels=1).train()
        outputs = regression(random_images(), labels=torch.randn(6))
        assert outputs.loss.isfinite() and outputs.logits.shape == (6, 1)

    def test_drop_path_drops_whole_images_and_only_in_training(self):
        model, pixel_values = lively_model(drop_path_rate=0.9, thinking_stages=[4]), random_images(64)
        rates = [layer.dropout.drop_path_rate for layer in model.thinkingvit.layers]
        assert rates == pytest.approx([0.0, 0.45, 0.9])
        branch = torch.ones(64, 17, 32)
        dropped = model.thinkingvit.layers[2].dropout.train()(branch)
        images = dropped.flatten(1).amax(1)
        assert torch.equal(dropped.flatten(1).amin(1), images)
        assert 0 < (images == 0).sum() < 64
        torch.testing.assert_close(images[images != 0], torch.full_like(images[images != 0], 10.0))
        model.eval()
        assert torch.equal(model(pixel_values).logits, model(pixel_values).logits)


class TestBadInput:
    @pytest.mark.parametrize(
        "shape, message",
        [
            ((2, 1, 32, 32), r"`pixel_values`.*3 channels.*got \(2, 1, 32, 32\)"),
            ((3, 32, 32), r"`pixel_values` must have the shape"),
            ((2, 3, 40, 32), r"32×32 pixels.*got 40×32.*interpolate_pos_encoding=True"),
        ],
    )
    @pytest.mark.parametrize("model_class", [ThinkingViTModel, ThinkingViTForImageClassification])
    def test_pixel_values(self, model_class, shape, message):
        with pytest.raises(ValueError, match=message):
            model_class(tiny_config())(torch.zeros(shape))

    def test_no_pixel_values(self):
        with pytest.raises(ValueError, match="`pixel_values`.*got None"):
            lively_model()()

    def test_images_smaller_than_a_patch(self):
        with pytest.raises(ValueError, match=r"`pixel_values` of 4×32 pixels are smaller than a patch"):
            lively_model()(random_images(2, (4, 32)), interpolate_pos_encoding=True)

    @pytest.mark.parametrize("threshold", [-1.0, math.nan, [0.5], [0.5, 0.5, 0.5], "0.5"])
    def test_threshold(self, threshold):
        with pytest.raises(ValueError, match="`threshold`"):
            lively_model()(random_images(), threshold=threshold)

    @pytest.mark.parametrize("labels", [torch.arange(5), torch.zeros(6, 1, dtype=torch.long), torch.zeros(6)])
    @pytest.mark.parametrize("training", [True, False])
    def test_shape_of_labels(self, labels, training):
        with pytest.raises(ValueError, match=r"`labels` must have the shape.*got"):
            lively_model().train(training)(random_images(), labels=labels)

    @pytest.mark.parametrize("labels", [torch.arange(6).int(), torch.arange(6).to(torch.uint8), [0, 1, 2, 3, 4, 5]])
    def test_type_of_labels(self, labels):
        model = lively_model()
        with pytest.raises(ValueError, match=r"`labels` must be a tensor of class indices \(torch.long\)"):
            model(random_images(), labels=labels)
        assert model(random_images(), labels=torch.arange(6)).loss.isfinite()

    def test_unknown_classes(self):
        with pytest.raises(ValueError, match=r"`labels` must lie between 0 and 11, got \[-3, 12\]"):
            lively_model()(random_images(), labels=torch.tensor([0, 1, 12, -3, -100, 4]))

    def test_configuration_changed_into_nonsense(self, tmp_path):
        lively_model().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="`threshold`"):
            ThinkingViTForImageClassification.from_pretrained(tmp_path, threshold=-1)
        with pytest.raises(ValueError, match="`thinking_stages`"):
            ThinkingViTForImageClassification.from_pretrained(tmp_path, thinking_stages=[8])


def test_default_configuration_has_the_published_size():
    with torch.device("meta"):
        model = ThinkingViTForImageClassification(ThinkingViTConfig(num_labels=1000))
    assert model.num_parameters() / 1e6 == pytest.approx(22.12, abs=0.005)
