"""The record of each family is complete, and every model and configuration leads to its own."""

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import ConvNextConfig, PreTrainedModel, ViTConfig

import hf_thinkingvit
from hf_thinkingvit import AViTConfig, ThinkingViTConfig, convert_checkpoint
from hf_thinkingvit.conversion import convert
from hf_thinkingvit.evaluation import halting_macs, published_stage_macs, stage_macs
from hf_thinkingvit.families import FAMILIES, family_of
from hf_thinkingvit.families.record import Costs
from hf_thinkingvit.hub import model_card
from hf_thinkingvit.models.configuration_staged import thinks_in_stages
from tests.models.test_modeling_avit import lively_avit
from tests.models.test_modeling_early_exit_vit import lively_exits
from tests.models.test_modeling_elastic_vit import lively_elastic
from tests.utils import FIXTURES, lively_model, lively_swin


MODELS = {
    "thinkingvit": lively_model,
    "thinking_swin": lively_swin,
    "avit": lively_avit,
    "early_exit_vit": lively_exits,
    "elastic_vit": lively_elastic,
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def test_every_public_model_is_in_a_record():
    public = [getattr(hf_thinkingvit, name) for name in hf_thinkingvit.__all__]
    classes = {each for each in public if inspect.isclass(each) and issubclass(each, PreTrainedModel)}
    recorded = {model for family in FAMILIES.values() for model in (family.model_class, *family.heads.values())}
    recorded |= {family.backbone_class for family in FAMILIES.values()} - {None}
    bases = {family.model_class.__mro__[1] for family in FAMILIES.values()}  # the abstract `...PreTrainedModel`
    assert classes - bases == recorded


@every_family
class TestRecord:
    def test_is_of_one_model(self, family):
        assert FAMILIES[family.model_type] is family
        for model in (family.model_class, *family.heads.values()):
            assert model.config_class is family.config_class
        assert family.config_class.remote_code["AutoModel"].endswith(f".{family.model_class.__name__}")
        assert family.config_class.remote_code["AutoModelForImageClassification"].endswith(family.classifier.__name__)

    def test_names_fields_of_the_configuration(self, family):
        known = {field.name for field in dataclasses.fields(family.config_class)}
        assert family.free_fields | family.announced_fields <= known
        assert not family.free_fields & family.announced_fields
        assert known & family.plain.fixed_fields

    def test_counts_as_the_family_computes(self, family):
        staged = thinks_in_stages(family.config_class())
        assert (family.costs.stages is not None) == (family.costs.published_stages is not None) == staged
        assert staged or family.costs.halting is not None or family.costs.sub_networks is not None

    def test_starts_from_plain_models_with_every_head(self, family):
        assert all(callable(getattr(head, family.plain.constructor)) for head in family.heads.values())

    def test_is_found_from_models_and_configurations(self, family):
        model = MODELS[family.model_type]()
        for each in (model, model.base_model, model.config, nn.DataParallel(model), torch.compile(model)):
            assert family_of(each) is family
            assert thinks_in_stages(each) == (family.model_type not in ("avit", "elastic_vit"))

    def test_is_found_from_classes_of_others(self, family):
        """Remote code (the same model type, another class), and a subclass with another model type."""
        elsewhere = type("Elsewhere", (ViTConfig,), {"model_type": family.model_type})
        derived = type("Derived", (family.config_class,), {"model_type": "derived"})
        assert family_of(elsewhere()) is family_of(derived()) is family

    def test_is_what_the_card_says(self, family):
        text = str(model_card(MODELS[family.model_type](), name="animals"))
        assert family.card.description in text and family.card.limits in text and family.paper.bibtex in text


def test_a_model_of_no_family():
    for other in (ViTConfig(), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=f"families {', '.join(FAMILIES)}, got {type(other).__name__}"):
            family_of(other)


def test_models_of_transformers_do_not_think_in_stages():
    """Also those whose configuration defines stages of another kind."""
    assert ConvNextConfig().num_stages == 4
    assert not thinks_in_stages(ConvNextConfig())


def test_costs_of_another_kind_of_model():
    with pytest.raises(ValueError, match="A-ViT models do not think in stages"):
        stage_macs(AViTConfig())
    with pytest.raises(ValueError, match="A-ViT models do not think in stages"):
        published_stage_macs(AViTConfig())
    with pytest.raises(ValueError, match="ThinkingViT models do not halt tokens"):
        halting_macs(ThinkingViTConfig(), torch.ones(1, 197))


def test_a_family_without_official_checkpoints(monkeypatch, tmp_path):
    """Conversion skips it, and does not list it if no family matches."""
    ours = dataclasses.replace(FAMILIES["thinkingvit"], official=None, other_official=(), costs=Costs())
    monkeypatch.setattr(convert, "FAMILIES", {"ours": ours, "avit": FAMILIES["avit"]})
    assert type(convert_checkpoint(FIXTURES / "avit", tmp_path / "out")).__name__ == "AViTForImageClassification"
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"known families \(avit\)"):
        convert_checkpoint(tmp_path / "a.pth", tmp_path / "none")


def test_families_know_models_only():
    """Other folders import `families/`, so importing them here would be circular."""
    folder = Path(inspect.getfile(hf_thinkingvit)).parent / "families"
    siblings = {path.stem for path in folder.glob("*.py")}
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                top = (node.module or node.names[0].name).split(".")[0]
                assert top in ("models" if node.level == 2 else siblings), f"{path.name} imports {top}"
