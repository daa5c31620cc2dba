"""
Runs in which some parameters get no gradient in some steps, on two processes: sub-networks and stages that are not
drawn, classifiers of their own, layers that are left out, and a backbone that only teaches.
"""

from pathlib import Path

import pytest
import yaml

from hf_thinkingvit import EarlyExitViTConfig, ElasticViTConfig
from hf_thinkingvit.training import parse_config, train
from hf_thinkingvit.training.losses import TrainingLoss
from tests.models.test_weights_from_vit import trained_vit
from tests.training import train_distributed
from tests.training.tiny_runs import LABELS, assert_same, finish, flags, launch, weights


ELASTIC = {"num_attention_heads": 4, "hidden_size": 16, "num_hidden_layers": 4, "image_size": 16, "patch_size": 8}
STAGED = {"hidden_size": 16, "num_hidden_layers": 3, "image_size": 16, "patch_size": 8}


def elastic(method: str, sampling: str, **fields) -> dict:
    networks = getattr(ElasticViTConfig, method)(**ELASTIC).sub_networks
    return {
        "model_type": "elastic_vit",
        "stage_sampling": sampling,
        "model": {**ELASTIC, "sub_networks": networks, **fields},
    }


CASES = {
    "separate_classifiers": elastic("hydravit", "one", separate_classifiers=True),
    "fewer_layers": {**elastic("dynabert", "accumulate"), "gradient_accumulation_steps": 2},
    "unfrozen_teacher": {"model_type": "early_exit_vit", "model": {"self_distillation": True, "threshold": 0.5}},
    "one_stage": {
        "model_type": "early_exit_vit",
        "stage_sampling": "one",
        "model": {**STAGED, "num_attention_heads": 2},
    },
    "one_width": {
        "model_type": "thinkingvit",
        "stage_sampling": "one",
        "model": {**STAGED, "thinking_stages": [1, 2]},
    },
}


def configuration(case: str, images: Path, folder: Path) -> str:
    """The file of a run of five steps without anything random across processes."""
    words = flags(images, folder / case, epochs=2, max_steps=5)
    at = [place for place, word in enumerate(words) if word.startswith("--model.")]
    words = [word for place, word in enumerate(words) if place not in at and place - 1 not in at]
    config = parse_config(words).to_dict() | CASES[case]
    if case == "unfrozen_teacher":
        config["from_vit"] = str(folder.parent / "vit")
    file = folder / f"{case}.yaml"
    file.write_text(yaml.safe_dump(config))
    return str(file)


def test_two_processes_give_the_weights_of_one(images, tmp_path):
    """Which also says that both draw the same. One launch for all cases, because launching is slow."""
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
    trained_vit(image_size=16, **labels).save_pretrained(tmp_path / "vit")
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    files = [configuration(case, images, tmp_path / "two") for case in CASES]
    process = launch(files, processes=2, script=Path(train_distributed.__file__))
    for case in CASES:
        train(parse_config(["--config", configuration(case, images, tmp_path / "one")]))
    output = finish(process)
    assert process.returncode == 0, output
    for case in CASES:
        assert_same(weights(tmp_path / "two" / case), weights(tmp_path / "one" / case), tolerance=1e-5)


@pytest.mark.parametrize(
    "method, sampling, separate, leaves_out",
    [
        ("hydravit", "one", False, False),
        ("hydravit", "one", True, True),
        ("hydravit", "all", True, False),
        ("dynabert", "all", False, False),
        ("dynabert", "one", False, True),
        ("matformer", "sandwich", False, False),
    ],
)
def test_unused_parameters_are_looked_for_where_there_are_any(method, sampling, separate, leaves_out):
    config = getattr(ElasticViTConfig, method)(**ELASTIC, separate_classifiers=separate)
    settings = parse_config(["--dataset", "none", "--stage_sampling", sampling])
    assert TrainingLoss(settings, config).leaves_parameters_out is leaves_out


@pytest.mark.parametrize(
    "fields, sampling, leaves_out",
    [
        ({}, "all", False),
        ({}, "sandwich", True),
        ({"stage_loss_weights": [0.0, 1.0, 1.0]}, "all", True),
        ({"self_distillation": True}, "all", True),
    ],
)
def test_of_exits_too(fields, sampling, leaves_out):
    config = EarlyExitViTConfig(num_attention_heads=2, num_hidden_layers=3, **fields)
    settings = parse_config(["--dataset", "none", "--stage_sampling", sampling])
    assert TrainingLoss(settings, config).leaves_parameters_out is leaves_out
