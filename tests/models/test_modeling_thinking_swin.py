import copy
import pickle

import pytest
import torch

from hf_thinkingvit import ThinkingSwinConfig, ThinkingSwinForImageClassification, ThinkingSwinModel
from hf_thinkingvit.inference import AdaptiveEngine
from tests.models.staged_tests import StagedClassifierTests, assert_golden, assert_gradients
from tests.reference import thinking_swin_stages
from tests.utils import lively_swin, middle_threshold, random_images, tiny_swin_config


SCHEDULES = [[[2, 4]], [[1, 2], [1, 2]], [[1, 2], [2, 4]], [[1, 1], [1, 2], [2, 4]], [[1, 1], [1, 2], [1, 2], [2, 3]]]


@pytest.mark.parametrize("golden", ["thinkingswin"])
def test_outputs_of_the_official_implementation(golden):
    assert_golden(golden, num_thresholds=3)


class TestStaged(StagedClassifierTests):
    lively, reference = staticmethod(lively_swin), staticmethod(thinking_swin_stages)
    tokens_shape = (16, 16)
    half_tolerance = {torch.float16: 0.02, torch.bfloat16: 0.1}


class TestRounds:
    """The computation, compared with a plain implementation of ThinkingSwin."""

    @pytest.mark.parametrize("rounds", SCHEDULES)
    @torch.no_grad()
    def test_logits_of_every_round(self, rounds):
        model, pixel_values = lively_swin(head_rounds=rounds), random_images()
        expected, tokens = thinking_swin_stages(model, pixel_values)
        outputs = model(pixel_values, output_stage_logits=True)
        assert len(outputs.stage_logits) == len(rounds)
        for index in range(len(rounds)):
            torch.testing.assert_close(outputs.stage_logits[index], expected[index], atol=1e-5, rtol=1e-5)
            last_hidden_state = model.thinking_swin(pixel_values, max_stages=index + 1).last_hidden_state
            torch.testing.assert_close(last_hidden_state, tokens[index].flatten(1, 2), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("rounds", SCHEDULES)
    def test_gradients_in_training(self, rounds):
        assert_gradients(lively_swin(head_rounds=rounds), thinking_swin_stages)

    @torch.no_grad()
    def test_both_slicings_are_the_same_at_full_width(self):
        pixel_values, heads = random_images(), [[2, 4]]
        official = lively_swin(head_rounds=heads, qkv_slicing="leading_rows")
        plain = lively_swin(head_rounds=heads, qkv_slicing="each_projection")
        torch.testing.assert_close(official(pixel_values).logits, plain(pixel_values).logits)
        official, plain = (lively_swin(qkv_slicing=slicing) for slicing in ("leading_rows", "each_projection"))
        assert not torch.allclose(official(pixel_values).logits, plain(pixel_values).logits)

    @torch.no_grad()
    def test_each_projection_slices_each_third(self):
        """At one width, `each_projection` equals `leading_rows` with the rows permuted accordingly."""
        pixel_values, heads = random_images(), [[1, 2], [1, 2]]
        plain = lively_swin(head_rounds=heads, qkv_slicing="each_projection")
        official = lively_swin(head_rounds=heads, qkv_slicing="leading_rows")
        state = plain.state_dict()
        for name, tensor in state.items():
            if ".qkv." in name:
                thirds = tensor.unflatten(0, (3, -1))
                half = thirds.shape[1] // 2
                state[name] = torch.cat([thirds[:, :half].flatten(0, 1), thirds[:, half:].flatten(0, 1)])
        official.load_state_dict(state)
        torch.testing.assert_close(plain(pixel_values).logits, official(pixel_values).logits, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("window_size", [2, 3, 5, 16])
    @torch.no_grad()
    def test_an_image_is_answered_alike_whatever_ran_before(self, window_size):
        """Cached biases, masks and orders fit the grid of the image, also for grids with equally many patches."""
        model = lively_swin(window_size=window_size, depths=[2, 2])
        for size in ((32, 32), (48, 24), (24, 48), (64, 16), (16, 64), (32, 32), (24, 48)):
            expected = lively_swin(window_size=window_size, depths=[2, 2])(random_images(2, size)).logits
            torch.testing.assert_close(model(random_images(2, size)).logits, expected)

    @torch.no_grad()
    def test_grids_smaller_than_a_window(self):
        """4 × 4 and 2 × 2 patches, which read the middle of the bias table. Transformers' Swin fails on them."""
        model, pixel_values = lively_swin(window_size=5, depths=[1, 2], image_size=16), random_images(6, 16)
        expected, _ = thinking_swin_stages(model, pixel_values)
        logits = model(pixel_values, output_stage_logits=True).stage_logits
        torch.testing.assert_close(torch.stack(logits), torch.stack(expected), atol=1e-5, rtol=1e-5)


class TestCaches:
    """Tensors that inference caches are updated with the weights."""

    def assert_fresh(self, model):
        twin = type(model)(model.config).eval().to(model.dtype)
        twin.load_state_dict(model.state_dict())
        pixel_values = random_images().to(model.dtype)
        torch.testing.assert_close(model(pixel_values).logits, twin(pixel_values).logits)

    @torch.no_grad()
    def test_changed_weights(self):
        model = lively_swin()
        table = model.thinking_swin.layers[0].blocks[1].attention.relative_position_bias_table
        before = model(random_images()).logits
        table.mul_(3)
        assert not torch.allclose(model(random_images()).logits, before)
        self.assert_fresh(model)
        table.data.mul_(3)  # `.data` does not increase the tensor's version
        self.assert_fresh(model)
        for parameter in model.parameters():  # as when averaged weights are swapped in
            parameter.data.copy_(torch.randn_like(parameter))
        self.assert_fresh(model)
        model.load_state_dict(lively_swin(initializer_range=0.5).state_dict())
        self.assert_fresh(model)
        table.data = torch.randn_like(table)
        self.assert_fresh(model)
        model.to(torch.float64)
        self.assert_fresh(model)

    def test_a_training_step(self):
        model, pixel_values = lively_swin(), random_images()
        with torch.no_grad():
            model(pixel_values)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model.train()(pixel_values, labels=torch.arange(6)).loss.backward()
        optimizer.step()
        with torch.no_grad():
            self.assert_fresh(model.eval())

    def test_training_after_inference_mode(self):
        model, pixel_values = lively_swin(), random_images()
        with torch.inference_mode():
            model(pixel_values)
        model.train()(pixel_values, labels=torch.arange(6)).loss.backward()
        expected = lively_swin().train()
        expected(pixel_values, labels=torch.arange(6)).loss.backward()
        for parameter, other in zip(model.parameters(), expected.parameters()):
            torch.testing.assert_close(parameter.grad, other.grad)

    @torch.no_grad()
    def test_do_not_travel_with_the_model(self):
        model = lively_swin()
        size = len(pickle.dumps(model))
        expected = model(random_images()).logits
        assert len(pickle.dumps(model)) == size
        torch.testing.assert_close(copy.deepcopy(model)(random_images()).logits, expected)


class TestEarlyExit:
    @torch.no_grad()
    def test_later_rounds_see_only_the_images_that_go_on(self):
        model, pixel_values, rows = lively_swin(), random_images(8), []
        for part in (model.thinking_swin.embeddings, *model.thinking_swin.recyclers, *model.thinking_swin.layers):
            part.register_forward_hook(lambda module, args, output: rows.append((type(module).__name__, len(output))))
        threshold = middle_threshold(model, pixel_values)
        rows.clear()
        outputs = model(pixel_values, threshold=[threshold, 10.0])
        assert outputs.exit_stage.tolist().count(0) == 4 and set(outputs.exit_stage.tolist()) == {0, 1}
        layers = [("NestedSwinLayer", 8)] * 2, [("NestedSwinLayer", 4)] * 2
        assert rows == [("NestedSwinEmbeddings", 8), *layers[0], ("ThinkingSwinRecycler", 4), *layers[1]]
        rows.clear()
        model(pixel_values, threshold=10.0)
        assert rows == [("NestedSwinEmbeddings", 8), *layers[0]]


class TestOutputs:
    @torch.no_grad()
    def test_recorded_outputs_have_the_images_that_ran_each_round(self):
        model, pixel_values = lively_swin(), random_images(6)
        model.set_attn_implementation("eager")
        threshold = middle_threshold(model, pixel_values)
        plain = model(pixel_values, threshold=threshold)
        outputs = model(pixel_values, threshold=threshold, output_hidden_states=True, output_attentions=True)
        torch.testing.assert_close(outputs.logits, plain.logits, atol=1e-5, rtol=1e-5)
        running = [int((outputs.exit_stage >= index).sum()) for index in range(3)]
        assert running[0] > running[1] > 0
        shapes = [(running[0], 64, 4)]
        for images, widths in zip(running, [(4, 4), (4, 8), (8, 16)]):
            shapes += [(images, 64, widths[0]), (images, 16, widths[1])] if images else []
        assert [tuple(states.shape) for states in outputs.hidden_states] == shapes
        shapes = []
        for images, heads in zip(running, model.config.head_rounds):
            shapes += [(4 * images, heads[0], 16, 16)] * 2 + [(images, heads[1], 16, 16)] if images else []
        assert [tuple(weights.shape) for weights in outputs.attentions] == shapes

    @torch.no_grad()
    def test_recycling_starts_without_effect(self):
        """α starts at 0: each round of a new model is the plain sub-network."""
        model = ThinkingSwinForImageClassification(tiny_swin_config()).eval()
        plain = ThinkingSwinForImageClassification(tiny_swin_config(head_rounds=[[2, 4]])).eval()
        plain.load_state_dict(model.state_dict(), strict=False)
        torch.testing.assert_close(plain(random_images()).logits, model(random_images()).logits)

    def test_drop_path_rises_over_all_blocks(self):
        model = lively_swin(drop_path_rate=0.3, depths=[2, 2])
        rates = [block.dropout.drop_path_rate for layer in model.thinking_swin.layers for block in layer.blocks]
        assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


class TestBadInput:
    @pytest.mark.parametrize("shape", [(2, 1, 32, 32), (3, 32, 32), (2, 3, 0, 32)])
    def test_pixel_values(self, shape):
        for model_class in (ThinkingSwinModel, ThinkingSwinForImageClassification):
            with pytest.raises(ValueError, match="`pixel_values`"):
                model_class(tiny_swin_config())(torch.zeros(shape))
        with pytest.raises(ValueError, match="`pixel_values`.*got None"):
            lively_swin()()
        with pytest.raises(ValueError, match="`pixel_values` of 0×32 pixels are no images"):
            lively_swin()(torch.zeros(2, 3, 0, 32))

    @pytest.mark.parametrize("size, works", [((36, 32), False), ((32, 40), True), ((30, 29), True), ((24, 28), False)])
    @torch.no_grad()
    def test_grids_that_tokens_cannot_be_recycled_to(self, size, works):
        """With two layers, the grid of 4 × 4 pixel patches (with padding) must have even sides."""
        model, pixel_values = lively_swin(), random_images(2, size)
        one_round = lively_swin(head_rounds=[[2, 4]])
        assert one_round(pixel_values).logits.shape == (2, 12)
        assert model(pixel_values, max_stages=1).logits.shape == (2, 12)
        if works:
            assert model(pixel_values).exit_stage.tolist() == [2, 2]
            return
        message = rf"{size[0]}×{size[1]} pixels give .* patches.*multiples of 2.*height .* multiple of 8 and.*8 pixels"
        for call in (model, model.thinking_swin, AdaptiveEngine(model)):
            with pytest.raises(ValueError, match=message):
                list(call(pixel_values))
        results = list(AdaptiveEngine(model, max_stages=1)(pixel_values))
        assert [result.exit_stage for result in results] == [0, 0]

    @torch.no_grad()
    def test_images_of_a_pixel(self):
        """They are padded to a patch, as in Transformers' Swin; only empty images are refused."""
        model = lively_swin(head_rounds=[[2, 4]])
        padded = torch.zeros(2, 3, 4, 8)
        padded[:, :, :1, :7] = random_images(2, (1, 7))
        torch.testing.assert_close(model(random_images(2, (1, 7))).logits, model(padded).logits)

    def test_sizes_that_position_embeddings_are_not_made_for(self):
        model = lively_swin(use_absolute_embeddings=True)
        with pytest.raises(ValueError, match=r"32×32 pixels.*got 64×32.*interpolate_pos_encoding=True"):
            model(random_images(2, (64, 32)))
        assert model(random_images(2, (64, 32)), interpolate_pos_encoding=True).logits.shape == (2, 12)


def test_default_configuration_has_the_size_of_swin_s():
    """The 49.61 M parameters of Swin-S, and the recycler's."""
    with torch.device("meta"):
        model = ThinkingSwinForImageClassification(ThinkingSwinConfig(num_labels=1000))
    recycler = 1 + 8 * 8 * 384 + 384 * 96 + 96
    assert (model.num_parameters() - recycler) / 1e6 == pytest.approx(49.606, abs=0.001)
