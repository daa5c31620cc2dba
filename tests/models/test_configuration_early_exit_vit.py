import pytest

from hf_thinkingvit import EXIT_CRITERIA, EarlyExitViTConfig, ThinkingViTConfig


def test_stages_are_the_layers_between_exits():
    config = EarlyExitViTConfig(exit_layers=[3, 4], num_hidden_layers=6)
    assert [stage.layers for stage in config.stages] == [(0, 1, 2), (3,), (4, 5)]
    assert {stage.hidden_size for stage in config.stages} == {192}
    assert EarlyExitViTConfig(num_hidden_layers=4).exit_layers == [1, 2, 3]
    assert EarlyExitViTConfig(num_hidden_layers=1).num_stages == 1


@pytest.mark.parametrize(
    "method, depth, exit_layers, head, criterion",
    [
        ("branchynet", 12, [4, 8], "linear", "entropy"),
        ("branchynet", 2, [1], "linear", "entropy"),
        ("vit_ee", 12, [6], "transformer_layer", "entropy"),
        ("fastbert", 4, [1, 2, 3], "linear", "normalised_entropy"),
        ("pabee", 4, [1, 2, 3], "linear", "patience"),
        ("act", 4, [1, 2, 3], "shared", "act"),
        ("pondernet", 4, [1, 2, 3], "shared", "pondernet"),
    ],
)
def test_published_methods_for_any_depth(method, depth, exit_layers, head, criterion):
    config = getattr(EarlyExitViTConfig, method)(num_hidden_layers=depth)
    assert (config.exit_layers, config.exit_head, config.exit_criterion) == (exit_layers, head, criterion)
    assert getattr(EarlyExitViTConfig, method)(num_hidden_layers=12, exit_layers=[5]).exit_layers == [5]


def test_pabee_weights_by_layer():
    assert EarlyExitViTConfig.pabee(num_hidden_layers=4).stage_loss_weights == [0.1, 0.2, 0.3, 0.4]
    assert EarlyExitViTConfig.pabee(num_hidden_layers=4, exit_layers=[2]).stage_loss_weights == [2 / 6, 4 / 6]


def test_presets_take_any_field():
    assert EarlyExitViTConfig.pabee(num_hidden_layers=4, exit_layers=[]).stage_loss_weights == [1.0]
    assert EarlyExitViTConfig.pabee(num_hidden_layers=4, exit_layers=None).exit_layers == [1, 2, 3]
    assert EarlyExitViTConfig.branchynet(num_hidden_layers=6, exit_layers=None).exit_layers == [2, 4]
    assert EarlyExitViTConfig.pabee(self_distillation=True).stage_loss_weights is None
    assert EarlyExitViTConfig.pabee(num_hidden_layers=12, exit_layers=[2, 4, 6, 8, 10]).threshold == 3
    with pytest.raises(ValueError, match="`exit_layers` must be a list"):
        EarlyExitViTConfig.pabee(exit_layers="3")


@pytest.mark.parametrize("method", ["branchynet", "vit_ee", "fastbert", "pabee", "pondernet"])
def test_another_criterion_does_not_get_the_methods_threshold(method):
    """It would be on another scale: by a patience of 6, every entropy is low enough."""
    preset = getattr(EarlyExitViTConfig, method)
    with pytest.raises(ValueError, match="'margin' needs a `threshold` on its own scale"):
        preset(exit_criterion="margin")
    assert preset(exit_criterion="margin", threshold=0.8).threshold == 0.8
    assert preset(exit_criterion="topk_entropy").threshold == 0.5


def test_thresholds_of_learned_halting():
    assert EarlyExitViTConfig.act().threshold == 0.99 and EarlyExitViTConfig.pondernet().threshold == 1.0
    assert EarlyExitViTConfig.pondernet(exit_criterion="q_exit").threshold == 0.5
    assert EarlyExitViTConfig.pondernet(exit_criterion="max_probability", threshold=0.8).threshold == 0.8


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"exit_layers": [12]}, "from 1 to `num_hidden_layers` - 1 = 11"),
        ({"exit_layers": [3, 3]}, "strictly increasing"),
        ({"exit_layers": [0]}, "`exit_layers` must be an integer of at least 1"),
        ({"exit_layers": "3"}, "`exit_layers` must be a list"),
        ({"exit_head": "mlp"}, "`exit_head` must be one of"),
        ({"halting": "lottery"}, "`halting` must be None or one of"),
        ({"halting": "act"}, "it needs `exit_head` = 'shared'"),
        ({"halting": "act", "exit_head": "shared", "exit_criterion": "entropy", "threshold": 1}, "`exit_criterion` ="),
        ({"exit_criterion": "act", "threshold": 0.99}, "`EarlyExitViTConfig` with `halting` = 'act'"),
        ({"halting": "pondernet", "halting_prior": 1.0}, "`halting_prior` must be above 0 and below 1"),
        ({"self_distillation": True, "exit_head": "shared"}, "`self_distillation` trains the exits' own heads"),
        ({"self_distillation": True, "stage_loss_weights": [1.0] * 12}, "`stage_loss_weights` has no effect"),
        ({"halting": "pondernet", "problem_type": "multi_label_classification"}, "single-label|judges"),
    ],
)
def test_values_that_cannot_work(fields, message):
    with pytest.raises(ValueError, match=message):
        EarlyExitViTConfig(**fields)


def test_other_families_have_no_halting_scores():
    with pytest.raises(ValueError, match="reads learned halting scores"):
        ThinkingViTConfig(exit_criterion="pondernet", threshold=1.0)


@pytest.mark.parametrize("criterion", ["normalised_entropy", "similarity", "patience", "confident_twice"])
def test_criteria_serve_other_families(criterion):
    config = ThinkingViTConfig(exit_criterion=criterion, threshold=0.5)
    assert config.exit_criterion == criterion and EXIT_CRITERIA[criterion].halting is None


def test_saved_and_loaded(tmp_path):
    config = EarlyExitViTConfig.pabee(num_hidden_layers=4, threshold=[1, 2, 3])
    config.save_pretrained(tmp_path)
    loaded = EarlyExitViTConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert EarlyExitViTConfig.from_pretrained(tmp_path, threshold=2).threshold == 2
