"""Arguments that `forward` does not declare."""

import pytest
import torch

from tests.models.test_modeling_avit import lively_avit
from tests.utils import lively_model, lively_swin, random_images


MODELS = {"thinkingvit": lively_model, "thinking_swin": lively_swin, "avit": lively_avit}
MISSPELT = {
    "thinkingvit": ("treshold", "threshold"),
    "thinking_swin": ("max_stage", "max_stages"),
    "avit": ("halting_eps", "halting_epsilon"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", MODELS)
def test_a_misspelt_argument_names_the_nearest(family, training):
    model, (wrong, right) = MODELS[family]().train(training), MISSPELT[family]
    with pytest.raises(
        TypeError, match=f"ForImageClassification.forward.. got an .* '{wrong}'. Did you mean '{right}'"
    ):
        model(random_images(), **{wrong: 0.5})
    with pytest.raises(TypeError, match="unexpected keyword argument 'interpolate_pos'.*'interpolate_pos_encoding'"):
        model.base_model(random_images(), interpolate_pos=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'labels'"):
        model.base_model(random_images(), labels=torch.arange(6))


@pytest.mark.parametrize("family", MODELS)
def test_what_transformers_passes_is_known(family):
    model = MODELS[family]()
    known = {"output_hidden_states": False, "output_attentions": False, "num_items_in_batch": 6, "return_dict": True}
    expected = model(random_images(), labels=torch.arange(6))
    outputs = model(random_images(), labels=torch.arange(6), **known)
    torch.testing.assert_close(outputs.loss, expected.loss)
    assert isinstance(model.base_model(random_images(), return_dict=False), tuple)


def test_none_under_a_name_of_another_kind_of_model():
    images = random_images()
    assert torch.equal(lively_model()(images, attention_mask=None).logits, lively_model()(images).logits)
    with pytest.raises(TypeError, match="attention_mask"):
        lively_model()(images, attention_mask=torch.ones(6))
