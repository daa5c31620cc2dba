"""At what layer patches leave: of halting and of pruning, beside what the models say themselves."""

import pytest
import torch

from hf_thinkingvit.evaluation import token_depths
from tests.models.test_modeling_avit import lively_avit
from tests.utils import lively_model, random_images


PRUNING = {"pruning_layers": [1, 2], "pruning_keep_rate": 0.5}


@torch.no_grad()
def test_of_halting():
    model, images = lively_avit(), random_images()
    found, expected = token_depths(model, images), model(images, output_token_depth=True)
    assert len(expected.token_depth.unique()) > 1
    assert torch.equal(found.depth.flatten(1), expected.token_depth[:, model.config.num_prefix_tokens :])
    assert torch.equal(found.predicted, expected.logits.argmax(1))
    assert [len(scores) for scores in found.halting_scores] == [
        int((expected.token_depth > layer).sum()) for layer in range(model.config.num_hidden_layers)
    ]
    assert token_depths(model, images, halting_epsilon=0.9).depth.sum() < found.depth.sum()


@torch.no_grad()
def test_of_pruning():
    model, images = lively_model(**PRUNING), random_images()
    depth, (first, second) = token_depths(model, images).depth, model(images, output_kept_tokens=True).kept_tokens
    assert depth.shape == (6, 4, 4) and sorted(depth.unique().tolist()) == [1, 2, 3]
    for patches, kept, further in zip(depth.flatten(1), first, second):
        assert set((patches > 1).nonzero().flatten().tolist()) == set(kept.tolist())
        assert set((patches > 2).nonzero().flatten().tolist()) == set(further.tolist())
    assert (token_depths(model, images, keep_rate=[0.25, 0.125]).depth > 2).sum() == 6 * 2


@torch.no_grad()
def test_every_image_runs_the_last_stage():
    """Also those whose entropy is 0, which `exit_at_threshold` lets leave even at τ = 0."""
    model = lively_model(exit_criterion="entropy", exit_at_threshold=True, threshold=0.0, **PRUNING)
    model.classifier.weight.mul_(100.0)  # certain beyond what float32 can tell
    images = random_images()
    assert 0 < (model(images).exit_stage < 2).sum() < 6
    found = token_depths(model, images)
    kept = model(images, output_kept_tokens=True, output_stage_logits=True).kept_tokens[1]
    assert [set((row > 2).nonzero().flatten().tolist()) for row in found.depth.flatten(1)] == [
        set(row.tolist()) for row in kept
    ]
    assert torch.equal(found.predicted, model(images, output_stage_logits=True).stage_logits[-1].argmax(1))


def test_models_and_arguments_that_do_not_fit():
    images = random_images(1)
    with pytest.raises(ValueError, match="No patch leaves this model"):
        token_depths(lively_model(), images)
    with pytest.raises(ValueError, match="`halting_epsilon` is of an A-ViT"):
        token_depths(lively_model(**PRUNING), images, halting_epsilon=0.1)
    with pytest.raises(ValueError, match="`keep_rate` is of models that prune tokens"):
        token_depths(lively_avit(), images, keep_rate=0.5)
    with pytest.raises(ValueError, match="`keep_rate`"):
        token_depths(lively_model(**PRUNING), images, keep_rate=2.0)
    with pytest.raises(ValueError, match="evaluation mode"):
        token_depths(lively_model(**PRUNING).train(), images)
