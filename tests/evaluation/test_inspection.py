"""What a model says of one image: the same as the model itself under any τ, computed once."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_thinkingvit import ElasticViTConfig, ElasticViTForImageClassification
from hf_thinkingvit.evaluation import stage_macs
from hf_thinkingvit.evaluation.inspection import inspect_image
from hf_thinkingvit.image_processing import evaluation_image_processor, segmentation_image_processor
from hf_thinkingvit.inference import SlidingWindowSegmenter
from tests.models.segmentation_models import lively_segmenter
from tests.models.test_modeling_avit import lively_avit
from tests.utils import lively, lively_model, lively_swin


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))


def thresholds_between(scores: torch.Tensor) -> list[float]:
    """0, and τ above each of the scores."""
    return [0.0, *(float(score) + 1e-4 for score in scores.flatten())]


@pytest.mark.parametrize("make", [lively_model, lively_swin])
def test_exits_are_those_of_the_model(make, image):
    model, processor = make(), evaluation_image_processor(32)
    inspection = inspect_image(model, processor, image)
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    macs = torch.tensor(stage_macs(model.config)).cumsum(0).tolist()
    exits = set()
    for threshold in thresholds_between(inspection.scores.scores):
        with torch.no_grad():
            outputs = model(pixel_values, threshold=threshold)
        stage = int(outputs.exit_stage)
        exits.add(stage)
        assert inspection.exit_stages(threshold).tolist() == [stage]
        assert inspection.spent(threshold) == (macs[stage], macs[-1])
        torch.testing.assert_close(inspection.probabilities[stage], outputs.logits[0].softmax(dim=0))
        assert float(inspection.entropies[0, stage]) == pytest.approx(float(outputs.entropy), abs=1e-6)
    assert len(exits) > 1
    assert inspection.exit_stages().tolist() == inspection.exit_stages(model.config.threshold).tolist()


def test_windows_leave_as_in_the_segmenter(image):
    model, processor = lively_segmenter(), segmentation_image_processor(32)
    inspection = inspect_image(model, processor, image)
    pixel_values = processor(image, do_resize=False, return_tensors="pt")["pixel_values"][0]
    threshold = float(inspection.scores.scores[:, 0].median()) + 1e-5
    (expected,) = SlidingWindowSegmenter(model, threshold=threshold)([pixel_values])
    stages = inspection.exit_stages(threshold)
    assert stages.tolist() == [window.exit_stage for window in expected.windows] and len(set(stages.tolist())) > 1
    result = inspection.segmented(stages)
    assert result.labels.shape == (40, 56) and torch.equal(result.labels, expected.labels)
    assert [window.entropy for window in result.windows] == pytest.approx([each.entropy for each in expected.windows])


def test_tokens_of_an_avit(image):
    model, processor = lively_avit(), evaluation_image_processor(32)
    inspection = inspect_image(model, processor, image)
    with torch.no_grad():
        outputs = model(processor(image, return_tensors="pt")["pixel_values"], output_token_depth=True)
    assert inspection.depth.flatten().tolist() == outputs.token_depth[0, model.config.num_prefix_tokens :].tolist()
    assert inspection.spent()[0] == int(outputs.macs) < inspection.full_macs
    assert inspection.scores is None and inspection.exit_stages().tolist() == [0]


def test_tokens_that_are_pruned(image):
    model = lively_model(pruning_layers=[1, 2], pruning_keep_rate=0.5)
    depth = inspect_image(model, evaluation_image_processor(32), image).depth
    assert [int((depth > layer).sum()) for layer in (0, 1, 2)] == [16, 8, 4]


def test_sub_networks(image):
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    config = ElasticViTConfig.hydravit(num_attention_heads=4, num_labels=5, default_sub_network=1, **sizes)
    model, processor = lively(ElasticViTForImageClassification, config), evaluation_image_processor(32)
    inspection = inspect_image(model, processor, image)
    assert inspection.num_answers == len(config.networks) and inspection.exit_stages().tolist() == [1]
    with torch.no_grad():
        logits = model(processor(image, return_tensors="pt")["pixel_values"], sub_network=2).logits
    torch.testing.assert_close(inspection.probabilities[2], logits[0].softmax(dim=0))


def test_labels_are_each_by_themselves_where_there_are_several(image):
    model = lively_model(problem_type="multi_label_classification", threshold=0.1)
    inspection = inspect_image(model, evaluation_image_processor(32), image)
    assert inspection.probabilities[0].sum() > 1.5
    (label, value), *others = inspection.best(0, 3)
    assert len(others) == 2 and value == inspection.probabilities[0].max() and label in model.config.label2id
