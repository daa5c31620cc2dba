"""Semantic segmentation: exact early exit of whole images, sizes, starting points, and programs."""

import pytest
import torch
from transformers import AutoModelForSemanticSegmentation, ViTConfig, ViTForImageClassification

from hf_thinkingvit import ThinkingViTConfig, ThinkingViTForImageClassification, ThinkingViTForSemanticSegmentation
from hf_thinkingvit.inference import AdaptiveEngine
from hf_thinkingvit.inference.export import export_adaptive, export_stages
from tests.models.segmentation_models import lively_segmenter, spread_threshold
from tests.utils import lively_model, random_images, tiny_config


SIZE = (37, 30)  # 5 × 4 patches, padded


@pytest.fixture(params=["linear", "mask_transformer"])
def model(request):
    model = lively_segmenter(request.param)
    model.config.threshold = spread_threshold(model, random_images(9, SIZE))
    return model


class Calls:
    """Counts the images of each call of a module."""

    def __init__(self, module):
        self.images = []
        module.register_forward_hook(lambda module, args, output: self.images.append(len(args[0])))


@torch.no_grad()
def test_each_image_has_the_answer_of_its_own_exit_and_later_stages_see_no_others(model):
    images = random_images(9, SIZE)
    full = model(images, output_stage_logits=True)
    assert set(full.exit_stage.tolist()) == {0, 1, 2}
    decoder, layer = Calls(model.decoder), Calls(model.thinkingvit.layers[0])
    outputs = model(images)
    assert torch.equal(outputs.exit_stage, full.exit_stage)
    expected = torch.stack([full.stage_logits[stage][row] for row, stage in enumerate(full.exit_stage.tolist())])
    torch.testing.assert_close(outputs.logits, expected, atol=1e-5, rtol=1e-5)
    assert outputs.logits.shape == (9, model.config.num_labels, 5, 4)
    rows = [int((full.exit_stage >= stage).sum()) for stage in range(3)]
    assert decoder.images == layer.images == rows
    for row in range(9):
        alone = model(images[row : row + 1])
        assert alone.exit_stage[0] == outputs.exit_stage[row]
        torch.testing.assert_close(alone.logits[0], outputs.logits[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.entropy[0], outputs.entropy[row], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_only_the_stages_that_are_asked_for_run_the_decoder(model):
    decoder = Calls(model.decoder)
    model(random_images(4), max_stages=1)
    model(random_images(4), sub_network=2)
    assert decoder.images == [4, 4]


@torch.no_grad()
def test_each_channel_of_the_patch_embedding_is_computed_once(model):
    channels = []
    model.thinkingvit.embeddings.patch_embeddings.register_forward_hook(
        lambda module, args, output: channels.append(output.shape[-1])
    )
    model(random_images(4), threshold=0.0)
    assert sum(channels) == model.config.hidden_size


@torch.no_grad()
def test_zeros_are_added_right_and_below(model):
    images = random_images(2, (37, 30))
    padded = torch.zeros(2, 3, 40, 32)
    padded[:, :, :37, :30] = images
    torch.testing.assert_close(model(images).logits, model(padded).logits, atol=0, rtol=0)
    assert model(random_images(2, (3, 5))).logits.shape == (2, 7, 1, 1)  # smaller than a patch


@torch.no_grad()
def test_positions_follow_the_grid_and_not_the_number_of_patches():
    """2 × 8 patches are as many as the 4 × 4 of the configuration, in other places."""
    model = lively_segmenter()
    images = random_images(2, (16, 64))
    table = model.thinkingvit.embeddings.position_embeddings
    grid = table[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(2, 8), mode="bilinear", align_corners=False)
    expected = model.thinkingvit.embeddings.patch_embeddings(images, 0) + grid.flatten(2).transpose(1, 2)
    tokens = model.begin(images, stages=range(2, 3))["embeddings"]
    torch.testing.assert_close(tokens[:, 1:], expected)
    with pytest.raises(ValueError, match="must be images of 32×32 pixels"):
        model(images, interpolate_pos_encoding=False)


@pytest.mark.parametrize("shape", [(2, 3, 0, 8), (2, 1, 32, 32), (3, 32, 32)])
def test_what_is_no_batch_of_images_is_refused(shape):
    with pytest.raises(ValueError, match="`pixel_values` must have"):
        lively_segmenter()(torch.zeros(shape))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_an_empty_batch_gives_empty_outputs(model, mode):
    outputs = model.train(mode == "train")(torch.empty(0, 3, *SIZE))
    assert outputs.logits.shape == (0, 7, 5, 4) and outputs.exit_stage.shape == outputs.entropy.shape == (0,)


@torch.no_grad()
def test_the_engine_gives_the_same_for_images_of_several_sizes(model):
    small, wide = random_images(9, SIZE), random_images(5, (16, 40), seed=4)  # 5 × 4 patches and 2 × 5
    images = [image for pair in zip(small, [*wide, *wide[:4]]) for image in pair]
    results = list(AdaptiveEngine(model, batch_size=4)(images))
    for result, image in zip(results, images):
        expected = model(image[None])
        assert result.exit_stage == expected.exit_stage.item()
        torch.testing.assert_close(result.logits, expected.logits[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_compiled_stages_give_the_same(model):
    images = random_images(9, SIZE)
    expected = model(images)
    model.compile_stages([4], backend="eager")
    outputs = model(images)
    assert torch.equal(outputs.exit_stage, expected.exit_stage)
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_exported_programs_give_the_same():
    model = lively_segmenter()
    images = random_images(9)
    model.config.threshold = spread_threshold(model, images)
    expected = model(images)
    threshold, rows = torch.tensor(model.config.threshold), torch.arange(9)
    state = {"pixel_values": images}
    for stage, program in enumerate(export_stages(model)):
        outputs = program.module()(state, threshold)
        chosen = outputs["exits"]
        assert torch.equal(chosen, expected.exit_stage[rows] == stage)
        torch.testing.assert_close(outputs["logits"][chosen], expected.logits[rows[chosen]], atol=1e-5, rtol=1e-5)
        state = {name: tensor[~chosen] for name, tensor in outputs["state"].items()}
        rows = rows[~chosen]
    adaptive = export_adaptive(model).module()
    for row in range(9):
        outputs = adaptive(images[row : row + 1], threshold)
        assert outputs["exit_stage"].item() == expected.exit_stage[row]


@torch.no_grad()
def test_recorded_layers_and_attentions_are_the_backbones(model):
    model.set_attn_implementation("eager")
    outputs = model(random_images(2), threshold=0.0, output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in outputs.hidden_states[-3:]] == [(2, 17, 32)] * 3
    assert len(outputs.attentions) == 9 and len(outputs.hidden_states) == 10


def test_half_precision(model):
    images = random_images(4, SIZE)
    expected = model(images, threshold=0.0).logits
    outputs = model.to(torch.bfloat16)(images, threshold=0.0)
    assert outputs.logits.dtype == torch.bfloat16 and outputs.entropy.dtype == torch.float32
    assert (outputs.logits.float() - expected).abs().max() / expected.abs().max() < 0.1


def test_starts_from_a_classifier_at_another_image_size():
    classifier = lively_model()
    model = ThinkingViTForSemanticSegmentation.from_thinkingvit(
        classifier, "mask_transformer", num_labels=5, image_size=48, threshold=0.7
    )
    assert model.config.image_size == 48 and model.config.num_labels == 5
    assert (model.config.exit_criterion, model.config.threshold) == ("mean_pixel_entropy", 0.7)
    positions = model.thinkingvit.embeddings.position_embeddings
    assert positions.shape == (1, 1 + 36, 32)
    images = random_images(2)
    same_size = ThinkingViTForSemanticSegmentation.from_thinkingvit(classifier, id2label={0: "road", 1: "sky"})
    with torch.no_grad():
        tokens = same_size.base_model(images).last_hidden_state
        torch.testing.assert_close(tokens, classifier.base_model(images).last_hidden_state, atol=0, rtol=0)
    assert same_size.config.id2label == {0: "road", 1: "sky"} and same_size.decoder.head.out_features == 2


def test_starts_from_a_pruned_classifier_without_its_pruning():
    """Every patch is read; loading its weights as they are says how."""
    classifier = lively_model(pruning_layers=[1], pruning_keep_rate=0.5)
    model = ThinkingViTForSemanticSegmentation.from_thinkingvit(classifier, num_labels=5)
    assert model.config.pruning_layers is None and model.config.pruning_keep_rate is None
    images = random_images(2)
    with torch.no_grad():
        expected = classifier.base_model(images, max_stages=2).last_hidden_state
        assert torch.equal(model.base_model(images, max_stages=2).last_hidden_state, expected)
        assert model(images).logits.shape == (2, 5, 4, 4)
    with pytest.raises(ValueError, match=r"reads every patch.*pruning_layers=None, pruning_keep_rate=None"):
        ThinkingViTForSemanticSegmentation.from_thinkingvit(classifier, num_labels=5, pruning_layers=[1])


def test_starts_from_a_folder_and_from_a_plain_vit(tmp_path):
    classifier = lively_model()
    classifier.save_pretrained(tmp_path)
    loaded = ThinkingViTForSemanticSegmentation.from_thinkingvit(tmp_path, num_labels=5)
    for name, parameter in classifier.base_model.named_parameters():
        assert torch.equal(parameter, loaded.base_model.get_parameter(name)), name
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
    vit = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8)).eval()
    model = ThinkingViTForSemanticSegmentation.from_vit(vit, [2, 4], num_labels=5)
    images = random_images(2)
    with torch.no_grad():
        tokens = model.base_model(images, max_stages=1).last_hidden_state
        torch.testing.assert_close(tokens, vit.vit(images).last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({}, "classes of the masks must be given"),
        ({"num_labels": 5, "hidden_size": 64}, "`hidden_size` cannot be overridden"),
        ({"num_labels": 5, "thinking_stages": [1, 4]}, "`thinking_stages` cannot be overridden"),
        ({"num_labels": 5, "decoder_type": "upernet"}, "`decoder_type` must be one of"),
    ],
)
def test_a_start_that_cannot_work_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        ThinkingViTForSemanticSegmentation.from_thinkingvit(lively_model(), **overrides)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_type": "deep"}, "`decoder_type` must be one of"),
        ({"decoder_type": "linear", "exit_criterion": "entropy", "threshold": 0.5}, "judges one answer for each image"),
        ({"decoder_type": "linear", "exit_criterion": "mean_grid_entropy"}, "needs a `threshold`"),
        ({"decoder_type": "linear", "threshold": -0.1}, "`threshold` must be a number of at least 0"),
        ({"decoder_type": "linear", "semantic_loss_ignore_index": 2.5}, "`semantic_loss_ignore_index` must be an int"),
        ({"decoder_type": "linear", "semantic_loss_ignore_index": 4}, r"is one of the 5 classes \(`num_labels`\)"),
        ({"decoder_type": "mask_transformer", "decoder_num_hidden_layers": 0}, "`decoder_num_hidden_layers` must be"),
        ({"decoder_type": "mask_transformer", "decoder_num_attention_heads": 5}, "must be divisible by"),
        ({"position_interpolation": "nearest"}, "`position_interpolation` must be one of"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ThinkingViTConfig(num_labels=5, **fields)


def test_a_classifiers_configuration_says_how_to_get_a_decoder():
    with pytest.raises(ValueError, match="needs `decoder_type`.*from_thinkingvit"):
        AutoModelForSemanticSegmentation.from_config(tiny_config())
    with pytest.raises(ValueError, match="reads the entry `entropy`"):
        ThinkingViTForImageClassification(tiny_config(decoder_type="linear"))(random_images(1))
