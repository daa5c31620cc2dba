"""Settings that a run takes from its starting point, and settings that it refuses to replace."""

import pytest
import torch

from hf_thinkingvit.training import TrainingConfig
from hf_thinkingvit.training.starting_point import build_model
from tests.models.test_modeling_avit import lively_avit
from tests.models.test_weights_from_vit import trained_vit
from tests.utils import lively_model, lively_swin, random_images


LABELS = {0: "cat", 1: "dog", 2: "owl"}
FAMILIES = {"thinkingvit": lively_model, "thinking_swin": lively_swin, "avit": lively_avit}


def named(*names: str) -> dict:
    id2label = dict(enumerate(names))
    return {"num_labels": len(names), "id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}


def start(source, model_type="thinkingvit", id2label=LABELS, label_map="name", attribute="from_pretrained", **model):
    """The model that a run starts with, and the messages printed."""
    said: list[str] = []
    settings = {attribute: str(source), "model": model, "label_map": label_map, "model_type": model_type}
    config = TrainingConfig(mixup=0.0, cutmix=0.0, **settings)
    config.check()
    return build_model(config, id2label, said.append), "\n".join(said)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of each family with three named labels."""
    folder = tmp_path_factory.mktemp("saved")
    for name, build in FAMILIES.items():
        build(**named(*LABELS.values())).save_pretrained(folder / name)
    return folder


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(random_images()).logits


class TestFields:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_all_weights_are_those_of_the_source(self, saved, family):
        model, said = start(saved / family, family, drop_path_rate=0.1)
        source = FAMILIES[family](**named(*LABELS.values()))
        for name, tensor in source.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        assert model.config.drop_path_rate == 0.1
        assert said == ""

    @pytest.mark.parametrize(
        "family, fields",
        [
            ("thinkingvit", {"patch_size": 4}),
            ("thinkingvit", {"image_size": 64}),
            ("thinkingvit", {"num_hidden_layers": 2}),
            ("thinkingvit", {"use_distillation_token": True}),
            # These change no shape, but make a different model.
            ("thinkingvit", {"num_attention_heads": 8}),
            ("thinkingvit", {"layer_norm_eps": 1e-3}),
            ("thinkingvit", {"hidden_act": "relu"}),
            ("avit", {"gate_channel": 1}),
            ("thinking_swin", {"qkv_slicing": "each_projection"}),
        ],
    )
    def test_what_the_weights_were_trained_with_cannot_change(self, saved, family, fields):
        (name,) = fields
        with pytest.raises(ValueError, match=rf"`model\.{name}` is .*, but starting from .* it is .*trained so"):
            start(saved / family, family, **fields)

    def test_the_same_value_is_no_change(self, saved):
        start(saved / "thinkingvit", patch_size=[8, 8], hidden_size=32, thinking_stages=[1, 2, 4])

    @pytest.mark.parametrize("name", ["distilled", "use_distillation_token"])
    def test_a_field_under_either_name(self, saved, name):
        start(saved / "avit", "avit", **{name: False})
        with pytest.raises(ValueError, match=rf"`model\.{name}` is True, but starting from .* it is False"):
            start(saved / "avit", "avit", **{name: True})

    def test_windows_fit_another_image_size(self, saved):
        model, said = start(saved / "thinking_swin", "thinking_swin", image_size=48)
        assert model.config.image_size == 48
        assert "`image_size` 32 → 48" in said

    def test_another_schedule_of_the_same_weights_is_announced(self, saved):
        model, said = start(saved / "thinkingvit", thinking_stages=[1, 2, 3])
        assert model.config.thinking_stages == [1, 2, 3]
        assert "`thinking_stages` [1, 2, 4] → [1, 2, 3]" in said
        _, said = start(saved / "avit", "avit", gate_center=20.0)
        assert "`gate_center`" in said

    @pytest.mark.parametrize(
        "stages, problem",
        [
            ([1, 1, 2, 4], r"not in it: thinkingvit\.recyclers\.2\.alpha"),
            ([2, 4], r"in it, but not used: thinkingvit\.recyclers\.1\.alpha"),
            ([2, 2, 4], r"of another shape: thinkingvit\.recyclers\.0\.projection\.weight \(32, 8\) → \(32, 16\)"),
        ],
    )
    def test_a_schedule_that_lacks_weights_is_refused(self, saved, stages, problem):
        with pytest.raises(ValueError, match=rf"after changing `thinking_stages` .*{problem}"):
            start(saved / "thinkingvit", thinking_stages=stages)

    def test_an_incomplete_checkpoint_is_refused(self, tmp_path):
        model = lively_model(**named(*LABELS.values()))
        weights = {name: tensor for name, tensor in model.state_dict().items() if "layernorm.bias" not in name}
        model.save_pretrained(tmp_path, state_dict=weights)
        with pytest.raises(ValueError, match=r"not in it: thinkingvit\.layernorm\.bias"):
            start(tmp_path)

    def test_a_plain_source_keeps_its_fields(self, tmp_path):
        trained_vit().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"`model\.hidden_act` is relu, but starting from .* it is gelu"):
            start(tmp_path, attribute="from_vit", hidden_act="relu")
        model, _ = start(tmp_path, attribute="from_vit", hidden_dropout_prob=0.1, patch_size=8)
        assert model.config.hidden_dropout_prob == 0.1

    def test_half_precision_is_trained_in_float32(self, tmp_path):
        lively_model(**named(*LABELS.values())).half().save_pretrained(tmp_path)
        model, _ = start(tmp_path)
        assert model.dtype == model.config.dtype == torch.float32

    def test_a_calibration_is_not_taken_over(self, tmp_path):
        model = lively_model(**named(*LABELS.values()))
        model.config.calibration = {"statement": "With probability at least 95 % ..."}
        model.save_pretrained(tmp_path)
        model, said = start(tmp_path)
        assert getattr(model.config, "calibration", None) is None
        assert "was calibrated" in said


class TestLabels:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_another_number_of_labels_gets_a_classifier_of_its_own(self, saved, family):
        model, said = start(saved / family, family, id2label=dict(enumerate("abcde")))
        source = FAMILIES[family](**named(*LABELS.values())).state_dict()
        replaced = {name for name, tensor in model.state_dict().items() if tensor.shape != source[name].shape}
        assert replaced == {"classifier.weight", "classifier.bias"}
        kept = [name for name in source if name not in replaced]
        assert all(torch.equal(model.state_dict()[name], source[name]) for name in kept)
        assert model.config.id2label == dict(enumerate("abcde"))
        assert "freshly initialised: it has 3 labels, the data 5" in said

    @pytest.mark.parametrize("attribute", ["from_pretrained", "from_vit"])
    def test_other_labels_of_the_same_number_do_not_inherit_the_classifier(self, tmp_path, attribute):
        source = lively_model(**named(*LABELS.values())) if attribute == "from_pretrained" else trained_vit()
        source.save_pretrained(tmp_path)
        others = {0: "cat", 1: "dog", 2: "fish"}
        model, said = start(tmp_path, id2label=others, attribute=attribute)
        rows = model.classifier.weight[:, : source.classifier.weight.shape[1]]
        assert not torch.equal(rows, source.classifier.weight)
        assert model.config.label2id == {"cat": 0, "dog": 1, "fish": 2}
        assert "label 2 is 'owl' there and 'fish' in the data" in said
        kept, said = start(tmp_path, id2label=others, attribute=attribute, label_map="index")
        rows = kept.classifier.weight[:, : source.classifier.weight.shape[1]]
        assert torch.equal(rows, source.classifier.weight)
        assert "taken by number" in said

    def test_the_same_labels_in_another_order_keep_their_rows(self, saved, tmp_path):
        reordered = {0: "owl", 1: "cat", 2: "dog"}
        model, said = start(saved / "thinkingvit", id2label=reordered)
        source = lively_model(**named(*LABELS.values()))
        torch.testing.assert_close(logits(model), logits(source)[:, [2, 0, 1]])
        assert model.config.id2label == reordered
        assert "order" in said
        distilled = lively_avit(distilled=True, **named(*LABELS.values()))
        distilled.save_pretrained(tmp_path)
        model, _ = start(tmp_path, "avit", id2label=reordered)
        torch.testing.assert_close(logits(model), logits(distilled)[:, [2, 0, 1]])

    def test_numbers_do_not_inherit_the_classifier_of_named_classes(self, saved):
        model, said = start(saved / "thinkingvit", id2label={0: "0", 1: "1", 2: "2"})
        source = lively_model(**named(*LABELS.values()))
        assert not torch.equal(model.classifier.weight, source.classifier.weight)
        assert "freshly initialised: label 0 is 'cat' there and '0' in the data; `--label-map index` would" in said

    def test_labels_without_names_are_taken_by_number(self, tmp_path):
        source = lively_model(num_labels=3)
        source.save_pretrained(tmp_path)
        model, said = start(tmp_path)
        assert torch.equal(model.classifier.weight, source.classifier.weight)
        assert model.config.id2label == LABELS
        assert "taken by number" in said
