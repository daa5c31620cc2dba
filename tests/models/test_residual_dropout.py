import pytest
import torch

from hf_thinkingvit.models.nested_layers import ResidualDropout


def test_residual_dropout_is_the_identity_in_evaluation():
    hidden_states = torch.randn(3, 4, 5)
    assert ResidualDropout(0.5, 0.5).eval()(hidden_states) is hidden_states


def test_residual_dropout_drops_nothing_by_default():
    hidden_states = torch.randn(3, 4, 5)
    assert torch.equal(ResidualDropout().train()(hidden_states), hidden_states)


def test_residual_dropout_keeps_the_mean():
    torch.manual_seed(0)
    hidden_states = torch.ones(20000, 1, 4)
    mean = ResidualDropout(0.3, 0.4).train()(hidden_states).mean().item()
    assert mean == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("shape", [(64, 3), (64, 3, 4), (64, 3, 2, 4)])
def test_stochastic_depth_drops_the_branches_of_whole_images(shape):
    torch.manual_seed(0)
    kept = ResidualDropout(drop_path_rate=0.5).train()(torch.ones(shape))
    assert kept.shape == shape
    values = kept.flatten(1)
    assert torch.equal(values.amin(1), values.amax(1))
    assert values.unique().tolist() == [0.0, 2.0]
