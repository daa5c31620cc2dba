"""`use_distillation_token`, which earlier versions called `distilled`."""

import copy
import json
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification

from hf_thinkingvit import AViTConfig, AViTForImageClassification
from tests.models.test_modeling_avit import lively_avit
from tests.utils import random_images


@pytest.fixture(params=[True, False])
def old_folder(request, tmp_path):
    """A model as versions before the renaming saved it, and whether it has a distillation token."""
    lively_avit(use_distillation_token=request.param).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields.pop("use_distillation_token") is request.param
    (tmp_path / "config.json").write_text(json.dumps({**fields, "distilled": request.param}))
    return tmp_path, request.param


@torch.no_grad()
def test_a_model_saved_under_the_former_name_loads(old_folder, tmp_path):
    folder, distilled = old_folder
    model, loading = AViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = lively_avit(use_distillation_token=distilled)(random_images()).logits
    assert torch.equal(model.eval()(random_images()).logits, expected)
    model.save_pretrained(tmp_path / "again")
    fields = json.loads((tmp_path / "again" / "config.json").read_text())
    assert fields["use_distillation_token"] is distilled and "distilled" not in fields


@pytest.mark.parametrize("name", ["distilled", "use_distillation_token"])
@pytest.mark.parametrize("value", [True, False])
def test_an_override_under_either_name_wins(old_folder, name, value):
    folder, _ = old_folder
    for config in (
        AutoConfig.from_pretrained(folder, **{name: value}),
        AViTConfig.from_pretrained(folder, **{name: value}),
    ):
        assert config.use_distillation_token is config.distilled is value
        assert config.num_prefix_tokens == 1 + value


@pytest.mark.parametrize("name", ["distilled", "use_distillation_token"])
def test_both_names_are_one_field(name):
    config = AViTConfig(**{name: True})
    copies = [copy.deepcopy(config), pickle.loads(pickle.dumps(config)), AViTConfig.from_dict(config.to_dict())]
    for each in (config, *copies):
        assert each.use_distillation_token is each.distilled is True
        assert "distilled" not in each.to_dict()
    setattr(config, name, False)
    assert config.use_distillation_token is config.distilled is False
    config.update({"distilled": True})
    assert config.num_prefix_tokens == 2
    assert hasattr(AutoModelForImageClassification.from_config(config), "distillation_classifier")
    assert AViTConfig().use_distillation_token is AViTConfig(distilled=None).use_distillation_token is False


@pytest.mark.parametrize("distilled", [True, False])
def test_contradictory_values_are_refused(distilled, tmp_path):
    both = {"distilled": distilled, "use_distillation_token": not distilled}
    AViTConfig().save_pretrained(tmp_path)
    refused = pytest.raises(ValueError, match="the former name of `use_distillation_token`")
    with refused:
        AViTConfig(**both)
    with refused:
        AViTConfig.from_dict(both)
    with refused:
        AViTConfig.from_pretrained(tmp_path, **both)
    assert AViTConfig(distilled=distilled, use_distillation_token=distilled).distilled is distilled


@pytest.mark.parametrize("name", ["use_distillation_token", "distilled"])
@pytest.mark.parametrize("value", ["false", 1, "no"])
def test_refuses_what_is_neither_true_nor_false(name, value):
    with pytest.raises(ValueError, match="`use_distillation_token` must be true or false"):
        AViTConfig(**{name: value})
