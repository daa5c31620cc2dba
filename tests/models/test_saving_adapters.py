"""Saving and publishing models with adapters: nothing of them is left out without a word."""

import pytest
import torch

from hf_thinkingvit import ThinkingViTForSemanticSegmentation
from hf_thinkingvit.hub import push
from hf_thinkingvit.image_processing import evaluation_image_processor
from tests.models.adapters import adapted, assert_same, lora
from tests.models.every_family import EVERY_CLASS, EVERY_FAMILY, every_answer
from tests.utils import lively_model, lively_swin


peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def test_copies_of_the_weights_ask_to_merge_first(tmp_path):
    model = adapted(lively_model(), lora(["q_proj"]))
    with pytest.raises(ValueError, match="has adapters, which a copy of its weights would leave out.*merge_and_unload"):
        model.base_model.model.extract_stage(0)
    with pytest.raises(ValueError, match="has adapters, which a copy of its weights would leave out.*merge_and_unload"):
        ThinkingViTForSemanticSegmentation.from_thinkingvit(model.base_model.model, num_labels=3)
    with pytest.raises(ValueError, match="`source` must be a ThinkingViT.*PeftModel"):
        ThinkingViTForSemanticSegmentation.from_thinkingvit(model, num_labels=3)
    with pytest.raises(ValueError, match="its published weights.*merge_and_unload"):
        push(model.base_model.model, evaluation_image_processor(32), "org/name", dry_run=tmp_path / "push")
    assert not (tmp_path / "push").exists()
    assert model.merge_and_unload().extract_stage(0).config.num_attention_heads == 1


@pytest.mark.parametrize("family", EVERY_CLASS)
def test_saving_the_model_within_asks_to_merge_first(family, tmp_path):
    """Its layers have other names than those that a model without adapters reads."""
    wrapped = peft.get_peft_model(EVERY_FAMILY[family](), lora())
    model, message = wrapped.get_base_model(), r"the saved folder would leave out.*merge_and_unload.*save them alone"
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "saved", state_dict=model.state_dict())
    wrapped.merge_adapter()  # in place: the names stay
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("make", [lively_model, lambda: lively_swin(qkv_slicing="each_projection")])
@torch.no_grad()
def test_a_merged_model_is_saved(make, tmp_path):
    model = adapted(make(), lora(modules_to_save=["classifier"], target_modules=["fc1", "fc2"]))
    expected = every_answer(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    assert_same(every_answer(type(model.get_base_model()).from_pretrained(tmp_path)), expected)
