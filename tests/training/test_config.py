from pathlib import Path

import pytest
import yaml

from hf_thinkingvit.training import TrainingConfig, parse_config


CONFIGS = sorted((Path(__file__).parents[2] / "examples" / "configs").rglob("*.yaml"))


def write(path: Path, text: str) -> list[str]:
    path.write_text(text)
    return ["--config", str(path)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_parse(path):
    config = parse_config(["--config", str(path)])
    assert config.model.keys() == yaml.safe_load(path.read_text())["model"].keys()


def test_flags_override_the_file(tmp_path):
    file = write(tmp_path / "run.yaml", "epochs: 7\nseed: 3\nmodel: {patch_size: 4, threshold: 0.5}\n")
    config = parse_config([*file, "--epochs", "9", "--model.threshold", "0.1", "--model.threshold", "0.4", "0.6"])
    assert (config.epochs, config.seed) == (9, 3)
    assert config.model == {"patch_size": 4, "threshold": [0.4, 0.6]}


def test_former_names_of_the_models_fields(tmp_path):
    words = ["--model_type", "avit", "--mixup", "0", "--cutmix", "0"]
    assert parse_config([*words, "--model.distilled", "true"]).model == {"distilled": True}
    file = write(tmp_path / "run.yaml", "model: {distilled: true}\n")
    assert parse_config([*file, *words]).model == {"distilled": True}


def test_yaml_spellings(tmp_path):
    file = write(
        tmp_path / "run.yaml",
        "mixed_precision: no\nlearning_rate: 1e-3\nauto_augment: null\nstreaming: true\nfreeze: []\nteacher: null\n"
        "model: {layer_norm_eps: 5e-4}\n",
    )
    config = parse_config(file)
    assert config.mixed_precision == "no"
    assert config.learning_rate == 1e-3
    assert config.auto_augment is None
    assert config.streaming is True
    assert config.freeze == []
    assert config.teacher is None
    assert config.model == {"layer_norm_eps": 5e-4}


def test_a_saved_configuration_reads_back_as_it_was(tmp_path):
    config = parse_config(["--model.thinking_stages", "[2, 3]", "--crop_scale", "0.5", "1", "--auto_augment", "none"])
    config.save(tmp_path / "run.yaml")
    assert parse_config(["--config", str(tmp_path / "run.yaml")]) == config


def test_the_learning_rate_scales_with_the_global_batch():
    assert (
        TrainingConfig(batch_size=1024).scaled_learning_rate == 2 * TrainingConfig(batch_size=512).scaled_learning_rate
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["--epoch", "7"], "no flag `--epoch`. Did you mean `--epochs`?"),
        (["--model.patchsize", "7"], "no field `--model.patchsize`. Did you mean `--model.patch-size`?"),
        (
            ["--model_type", "avit", "--mixup", "0", "--cutmix", "0", "--model.thinking_stages", "[3]"],
            "no field `--model.",
        ),
        (["--epochs", "many"], "invalid int value: 'many'"),
        (["--mixed_precision", "fp8"], "invalid choice: 'fp8'"),
        (["--model_type", "avit"], "A-ViT is trained without mixup and cutmix"),
        (["--epochs", "3", "--warmup_epochs", "3"], "`--warmup-epochs` (3.0) must be fewer than `--epochs` (3)"),
        (["--batch_size", "0"], "`--batch-size` must be above 0, got 0"),
        (["--ema_decay", "1"], "`--ema-decay` must be at least 0 and below 1"),
        (["--label_smoothing", "nan"], "`--label-smoothing` must be between 0 and 1"),
        (["--from_vit", "a", "--from_pretrained", "b"], "two ways to start"),
        (["--config", "nowhere.yaml"], "there is no configuration file nowhere.yaml"),
        (["--model.thinking_stages", "[3,", "6]"], "`[3,` is no value: quote lists"),
        (["stray"], "`stray` belongs to no flag"),
    ],
)
def test_refuses_what_cannot_work(words, message, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        parse_config(words)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "text, words, message",
    [
        ("learning_rat: 1\n", [], "run.yaml: There is no field `learning_rat`. Did you mean `learning_rate`?"),
        ("epochs: 1\nseed: [1\n", [], "run.yaml: line 3: no valid YAML: "),
        ("epochs: many\n", [], "run.yaml: argument --epochs: invalid int value: 'many'"),
        ("batch_size: 0\n", [], "run.yaml: `batch_size` must be above 0"),
        ("batch_size: 8\n", ["--batch_size", "0"], "error: `--batch-size` must be above 0"),  # not the file's
        ("model: {patchsize: 4}\n", [], "run.yaml: There is no field `model.patchsize`"),
        ("- 1\n", [], "run.yaml: it must hold `field: value` lines"),
    ],
)
def test_errors_of_a_file_name_it(text, words, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        parse_config([*write(tmp_path / "run.yaml", text), *words])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("nothing", ["none", "null"])
def test_none_and_null_are_alike(nothing, tmp_path):
    words = ["--auto_augment", nothing, "--max_steps", nothing, "--clip_grad", nothing, "--model.threshold", nothing]
    text = f"auto_augment: {nothing}\nmax_steps: {nothing}\nclip_grad: {nothing}\nmodel: {{threshold: {nothing}}}\n"
    for config in (parse_config(words), parse_config(write(tmp_path / "run.yaml", text))):
        assert config.auto_augment is config.max_steps is config.clip_grad is config.model["threshold"] is None


def test_help_has_groups_defaults_and_the_models_own_fields(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        parse_config(["--help", "--model_type", "thinking_swin"])
    text = capsys.readouterr().out
    assert "optimisation:" in text and "(default: 300)" in text and "--model.head-rounds" in text


def test_smoothing_is_of_the_run_not_of_the_models_own_loss():
    with pytest.raises(ValueError, match="`model.label_smoothing` is of the model's own loss: set `label_smoothing`"):
        TrainingConfig(model={"label_smoothing": 0.1}).check()
