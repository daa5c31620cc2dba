"""τ, exit criterion and problem type must fit together, however a configuration is made."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification, ConvNextConfig, PreTrainedConfig

from hf_thinkingvit import (
    AViTConfig,
    ExitRule,
    ThinkingSwinConfig,
    ThinkingViTConfig,
    ThinkingViTForImageClassification,
)
from hf_thinkingvit.inference import AdaptiveEngine
from hf_thinkingvit.models.configuration_staged import thinks_in_stages
from tests.models.test_weights_from_vit import trained_vit
from tests.utils import lively_model, lively_swin, random_images, tiny_config


MULTI_LABEL = {"problem_type": "multi_label_classification"}
CONFIGS = [ThinkingViTConfig, ThinkingSwinConfig]


class TestDefaults:
    @pytest.mark.parametrize("config_class", CONFIGS)
    @pytest.mark.parametrize(
        "fields, criterion, threshold",
        [
            ({}, "topk_entropy", 0.5),
            ({"threshold": 0.9}, "topk_entropy", 0.9),
            ({"exit_criterion": "topk_entropy"}, "topk_entropy", 0.5),
            (MULTI_LABEL, "mean_binary_entropy", 0.1),
            ({**MULTI_LABEL, "threshold": 0.3}, "mean_binary_entropy", 0.3),
            ({**MULTI_LABEL, "num_labels": 1}, "mean_binary_entropy", 0.1),
            ({"exit_criterion": "mean_binary_entropy"}, "mean_binary_entropy", 0.1),
            ({"exit_criterion": "margin", "threshold": 0.9}, "margin", 0.9),
            ({"num_labels": 1}, "topk_entropy", 0.0),
            ({"id2label": {0: "age"}}, "topk_entropy", 0.0),
            ({"id2label": {0: "cat", 1: "dog"}, "num_labels": 1}, "topk_entropy", 0.0),
            ({"problem_type": "regression", "num_labels": 3}, "topk_entropy", 0.0),
        ],
    )
    def test_criterion_by_problem_type_and_threshold_by_criterion(self, config_class, fields, criterion, threshold):
        config = config_class(**fields)
        assert (config.exit_criterion, config.threshold) == (criterion, threshold)

    @pytest.mark.parametrize("config_class", CONFIGS)
    @pytest.mark.parametrize("criterion", ["entropy", "max_probability", "margin"])
    def test_a_criterion_without_default_needs_a_threshold(self, config_class, criterion):
        with pytest.raises(ValueError, match="give both `exit_criterion` and `threshold`"):
            config_class(exit_criterion=criterion)

    def test_one_stage_has_no_exit_to_need_a_threshold_for(self):
        assert ThinkingViTConfig(thinking_stages=[6], exit_criterion="margin").num_stages == 1
        assert lively_model(thinking_stages=[4], num_labels=1, threshold=0.5)(random_images()).logits.shape == (6, 1)


class TestProblemType:
    @pytest.mark.parametrize("criterion", ["topk_entropy", "entropy", "max_probability", "margin"])
    def test_multi_label_has_no_softmax(self, criterion):
        with pytest.raises(ValueError, match=r"a softmax.* to one of \['mean_binary_entropy'\]"):
            ThinkingViTConfig(exit_criterion=criterion, threshold=0.5, **MULTI_LABEL)

    def test_single_label_is_not_judged_label_by_label(self):
        with pytest.raises(ValueError, match="each label by itself, not the answer of single_label"):
            ThinkingViTConfig(exit_criterion="mean_binary_entropy", problem_type="single_label_classification")

    @pytest.mark.parametrize("fields", [{"num_labels": 1}, {"problem_type": "regression", "num_labels": 3}])
    @pytest.mark.parametrize(
        "exits, message",
        [
            ({"threshold": 0.5}, "set `threshold` to 0, at which no image exits early.*`max_stages`"),
            ({"threshold": [0.0, 0.1]}, "set `threshold` to 0,"),
            ({"threshold": 0.0, "exit_criterion": "margin"}, "0 and `exit_criterion` to 'topk_entropy'"),
        ],
    )
    def test_regression_has_no_early_exits(self, fields, exits, message):
        with pytest.raises(ValueError, match=f"Regression has no criterion.*{message}"):
            ThinkingViTConfig(thinking_stages=[2, 3, 6], **fields, **exits)

    def test_regression_refuses_a_threshold_per_call(self):
        model = lively_model(num_labels=1)
        for call in (
            lambda: model(random_images(), threshold=0.5),
            lambda: AdaptiveEngine(model, threshold=0.5),
            lambda: ExitRule.from_config(model.config, 0.5),
        ):
            with pytest.raises(ValueError, match="Regression has no criterion of certainty"):
                call()
        outputs = model(random_images(), threshold=0)
        assert outputs.exit_stage.tolist() == [2] * 6
        assert model(random_images(), max_stages=1).exit_stage.tolist() == [0] * 6
        assert [result.exit_stage for result in AdaptiveEngine(model)(random_images())] == [2] * 6

    def test_a_regression_model_of_an_earlier_version_names_the_override(self, tmp_path):
        model = lively_model(num_labels=1)
        model.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**saved, "threshold": 0.5}))
        for source in (AutoConfig, AutoModelForImageClassification):
            with pytest.raises(ValueError, match="set `threshold` to 0"):
                source.from_pretrained(tmp_path)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path, threshold=0)
        torch.testing.assert_close(loaded(random_images()).logits, model(random_images()).logits)

    def test_fine_tuning_for_another_problem(self, tmp_path):
        lively_model(threshold=0.5).save_pretrained(tmp_path)
        load = ThinkingViTForImageClassification.from_pretrained
        with pytest.raises(ValueError, match="set `exit_criterion` to one of"):
            load(tmp_path, **MULTI_LABEL)
        exits = {"exit_criterion": "mean_binary_entropy", "threshold": 0.2}
        config = load(tmp_path, **MULTI_LABEL, **exits).config
        assert (config.problem_type, config.exit_criterion, config.threshold) == (
            *MULTI_LABEL.values(),
            *exits.values(),
        )
        with pytest.raises(ValueError, match="set `threshold` to 0"):
            load(tmp_path, num_labels=1, ignore_mismatched_sizes=True)
        assert load(tmp_path, num_labels=1, threshold=0, ignore_mismatched_sizes=True).config.num_labels == 1

    def test_setting_the_attribute_changes_the_criterion_and_unsets_the_threshold(self):
        config = tiny_config(threshold=0.5)
        config.problem_type = "multi_label_classification"
        assert (config.exit_criterion, config.threshold) == ("mean_binary_entropy", None)
        with pytest.raises(ValueError, match="'mean_binary_entropy' needs a `threshold` on its own scale"):
            ThinkingViTForImageClassification(config)
        config.threshold = 0.0  # on every entropy's scale: nothing exits early
        config.problem_type = "single_label_classification"
        assert (config.exit_criterion, config.threshold) == ("topk_entropy", 0.0)

    def test_starting_from_a_plain_multi_label_model(self):
        vit = trained_vit(**MULTI_LABEL)
        config = ThinkingViTForImageClassification.from_vit(vit).config
        assert (config.exit_criterion, config.threshold) == ("mean_binary_entropy", 0.1)


class TestChangedCriterion:
    @pytest.mark.parametrize("lively", [lively_model, lively_swin])
    def test_an_override_alone_is_refused(self, lively, tmp_path):
        lively(threshold=0.5).save_pretrained(tmp_path)
        for source in (AutoConfig, AutoModelForImageClassification):
            with pytest.raises(ValueError, match=r"\(0.5\), which is on the scale of 'topk_entropy'.*give both"):
                source.from_pretrained(tmp_path, exit_criterion="margin")
            loaded = source.from_pretrained(tmp_path, exit_criterion="margin", threshold=0.8)
            config = getattr(loaded, "config", loaded)
            assert (config.exit_criterion, config.threshold) == ("margin", 0.8)
            loaded = source.from_pretrained(tmp_path, exit_criterion="topk_entropy")  # the saved value
            assert getattr(loaded, "config", loaded).threshold == 0.5

    def test_a_criterion_with_a_default_does_not_replace_a_saved_threshold(self):
        saved = tiny_config(exit_criterion="margin", threshold=0.8).to_dict()
        with pytest.raises(ValueError, match="which is on the scale of 'margin'"):
            ThinkingViTConfig.from_dict(saved, exit_criterion="topk_entropy")
        assert ThinkingViTConfig.from_dict(saved, threshold=0.7).exit_criterion == "margin"

    def test_an_override_of_a_plain_model_is_refused(self):
        with pytest.raises(ValueError, match="give both"):
            ThinkingViTForImageClassification.from_vit(trained_vit(), exit_criterion="margin")

    def test_zero_is_on_the_scale_of_every_entropy(self):
        saved = tiny_config(threshold=[0.0, 0.0]).to_dict()
        assert ThinkingViTConfig.from_dict(saved, exit_criterion="entropy").exit_criterion == "entropy"
        with pytest.raises(ValueError, match="which is on the scale of 'topk_entropy'"):
            ThinkingViTConfig.from_dict(saved, exit_criterion="max_probability")

    def test_overrides_that_depend_on_one_another(self, tmp_path):
        tiny_config(thinking_stages=[2, 4]).save_pretrained(tmp_path)
        config = ThinkingViTConfig.from_pretrained(tmp_path, thinking_stages=[1, 2, 4], threshold=[0.4, 0.2])
        assert config.num_stages == 3 and config.threshold == [0.4, 0.2]
        config, unused = ThinkingViTConfig.from_pretrained(tmp_path, threshold=0.3, other=1, return_unused_kwargs=True)
        assert config.threshold == 0.3 and unused == {"other": 1}

    @pytest.mark.parametrize("value", ["confidence", ["entropy"], None])
    def test_setting_what_is_no_criterion(self, value):
        config = tiny_config(threshold=0.5)
        config.exit_criterion = value
        with pytest.raises(ValueError, match="`exit_criterion` must be one of"):
            config.validate()

    def test_setting_the_attribute_unsets_the_threshold(self, tmp_path):
        model = lively_model(threshold=0.5)
        model.config.exit_criterion = "margin"
        for use in (lambda: model(random_images()), lambda: model.save_pretrained(tmp_path), model.config.validate):
            with pytest.raises(ValueError, match="'margin' needs a `threshold` on its own scale"):
                use()
        assert model(random_images(), threshold=0.9).logits.shape == (6, 12)
        model.config.threshold = 0.9
        model.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).threshold == 0.9


class TestNumbers:
    @pytest.mark.parametrize(
        "value, plain",
        [
            (np.float32(0.5), 0.5),
            (np.float64(0.5), 0.5),
            (np.int64(1), 1),
            (np.array(0.5), 0.5),
            (np.array([0.5, 0.25], dtype=np.float32), [0.5, 0.25]),
            (torch.tensor(0.5), 0.5),
            (torch.tensor([0.5, 0.25]), [0.5, 0.25]),
            ([np.float32(0.5), torch.tensor(0.25)], [0.5, 0.25]),
        ],
    )
    def test_numpy_and_tensors(self, value, plain, tmp_path):
        config = tiny_config(threshold=value)
        config.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["threshold"] == plain
        assert type(config.threshold) is type(plain)
        config.threshold = value
        assert config.threshold == plain and type(config.threshold) is type(plain)
        model, images = lively_model(), random_images()
        expected = model(images, threshold=plain).exit_stage
        assert torch.equal(model(images, threshold=value).exit_stage, expected)
        found = [result.exit_stage for result in AdaptiveEngine(model, threshold=value)(images)]
        assert found == expected.tolist()
        assert all(type(number) in (int, float) for number in ExitRule.from_config(config, value).thresholds)

    @pytest.mark.parametrize(
        "value", [np.True_, torch.tensor(True), [0.5, np.False_], np.array([[0.5, 0.5]] * 2), np.float32("nan"), 1j]
    )
    def test_what_is_no_number(self, value):
        with pytest.raises(ValueError, match="`threshold` must be a number"):
            tiny_config(threshold=value)
        with pytest.raises(ValueError, match="`threshold` must be a number"):
            lively_model()(random_images(), threshold=value)


def test_infinite_threshold_survives_saving(tmp_path):
    tiny_config(threshold=math.inf).save_pretrained(tmp_path)
    assert ThinkingViTConfig.from_pretrained(tmp_path).threshold == math.inf


@pytest.mark.parametrize("names", [("threshold", "exit_criterion"), ("exit_criterion", "threshold")])
def test_an_update_takes_threshold_and_criterion_together(names):
    config, new = ThinkingViTConfig(), {"threshold": 0.3, "exit_criterion": "margin"}
    config.update({name: new[name] for name in names})
    assert (config.threshold, config.exit_criterion) == (0.3, "margin")


def test_a_model_of_another_problem_type_says_how_it_is_loaded(tmp_path):
    lively_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"exit_criterion='mean_binary_entropy', threshold=0\.1\)") as error:
        ThinkingViTForImageClassification.from_pretrained(tmp_path, problem_type="multi_label_classification")
    assert "from_pretrained(" in str(error.value)
    fields = {"problem_type": "multi_label_classification", "exit_criterion": "mean_binary_entropy", "threshold": 0.1}
    assert ThinkingViTForImageClassification.from_pretrained(tmp_path, **fields).config.threshold == 0.1


class TestThinksInStages:
    def test_of_models_and_configurations(self):
        assert thinks_in_stages(lively_model()) and thinks_in_stages(torch.compile(lively_model()))
        assert thinks_in_stages(lively_model().config)
        assert not thinks_in_stages(ConvNextConfig()) and not thinks_in_stages(AViTConfig())

    def test_says_that_code_of_an_earlier_version_cannot_be_used(self):
        class EarlierConfig(PreTrainedConfig):  # as `trust_remote_code` loads it from a folder saved before
            model_type = "thinkingvit"
            exit_criterion = "topk_entropy"

        with pytest.raises(ValueError, match="earlier version.*Import `hf_thinkingvit` before the model is loaded"):
            thinks_in_stages(EarlierConfig())
