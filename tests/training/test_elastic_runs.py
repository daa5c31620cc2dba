"""Runs that train an elastic ViT: everything random at once, of sub-networks that the configuration lists."""

import pytest
import torch
import yaml
from transformers import AutoModelForImageClassification

from hf_thinkingvit import ElasticViTConfig
from hf_thinkingvit.training import TrainingRun, parse_config, train
from hf_thinkingvit.training.summary import end_summary
from tests.training.tiny_runs import LIVELY, flags, logged_scalars


def elastic_words(images, folder, method: str, **overrides) -> tuple[list[str], list[dict]]:
    """Command-line words of a run, and the sub-networks of the configuration file that they name."""
    sizes = {"num_attention_heads": 4, "hidden_size": 16, "num_hidden_layers": 4, "image_size": 16, "patch_size": 8}
    networks = getattr(ElasticViTConfig, method)(**sizes).sub_networks
    file = folder / "elastic.yaml"
    file.write_text(yaml.safe_dump({"model_type": "elastic_vit", "model": {**sizes, "sub_networks": networks}}))
    words = flags(images, folder / "run", **{"max_steps": 3, **overrides})
    given = [word for word in words if word.startswith("--model.") and word.split(".")[1] in FILED]
    for word in given:
        at = words.index(word)
        del words[at : at + 2]
    return ["--config", str(file), *words], networks


FILED = ("thinking_stages", "hidden_size", "num_hidden_layers", "image_size", "patch_size")


@pytest.mark.parametrize("method, sampling", [("matformer", "all"), ("dynabert", "one"), ("hydravit", "accumulate")])
def test_sub_networks_of_a_configuration_file(images, tmp_path, method, sampling):
    words, networks = elastic_words(images, tmp_path, method, stage_sampling=sampling, **LIVELY)
    train(parse_config(words))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "last").eval()
    assert model.config.sub_networks == networks and model.config.num_labels == 3
    with torch.no_grad():
        answers = [model(torch.rand(2, 3, 16, 16), sub_network=number).logits for number in range(len(networks))]
    assert all(logits.shape == (2, 3) and logits.isfinite().all() for logits in answers)


def test_every_sub_network_is_evaluated_and_the_default_one_chooses(images, tmp_path):
    """In the console, the trackers, the record of each epoch and that of the test; the card has the default one's."""
    pytest.importorskip("tensorboard")
    words, networks = elastic_words(
        images, tmp_path, "hydravit", trackers="tensorboard", validation_fraction=0.5, ema_decay=0, max_steps=6
    )
    words += [
        "--model.default_sub_network",
        "1",
        "--model.initializer_range",
        "0.5",
        "--eval_split",
        "none",
        "--batch_size",
        "4",
    ]
    run = TrainingRun(parse_config(words))
    results = run.run()
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "last").eval()
    batches = list(run.evaluation)

    def accuracy(number: int) -> float:
        with torch.no_grad():
            answers = [model(batch["pixel_values"], sub_network=number).logits.argmax(-1) for batch in batches]
        right = torch.cat(answers) == torch.cat([batch["labels"] for batch in batches])
        return 100 * right.float().mean().item()

    expected = [accuracy(number) for number in range(4)]
    for measured in (results["history"][-1]["results"]["weights"], results["test"]["last"]):
        assert len(measured["top1"]) == len(measured["top5"]) == len(networks) == 4
        assert measured["default_sub_network"] == 1
    history = [entry["results"]["weights"] for entry in results["history"]]
    assert history[-1]["top1"] == pytest.approx(expected) and len(set(expected)) > 1
    best = max(range(len(history)), key=lambda epoch: history[epoch]["top1"][1])
    assert run.progress.best_score == history[best]["top1"][1]
    assert run.progress.best_step == results["history"][best]["step"]
    summary = end_summary(run, results)
    assert "top-1 of each sub-network " in summary and f"({history[-1]['top1'][1]:.2f} % of the default one)" in summary
    logged = logged_scalars(tmp_path)
    assert [logged[f"eval/weights/top1_sub_network_{number}"][6] for number in range(4)] == pytest.approx(expected)
    card = (tmp_path / "run" / "last" / "README.md").read_text()
    assert f"| {results['test']['last']['top1'][1]:.2f} |" in card
