"""Runs that train exits by layer, with labels, with mixed labels, and from a plain ViT whose backbone is frozen."""

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_thinkingvit.training import parse_config, train
from tests.models.test_weights_from_vit import trained_vit
from tests.training.tiny_runs import LIVELY, flags


def run(images, output_dir, **overrides):
    words = flags(images, output_dir, **{"model_type": "early_exit_vit", "max_steps": 3, **overrides})
    at = words.index("--model.thinking_stages")
    train(parse_config(words[:at] + words[at + 2 :]))
    return AutoModelForImageClassification.from_pretrained(output_dir / "last")


SMALL = {"model.num_attention_heads": 2}


@pytest.mark.parametrize(
    "method",
    [
        {"model.exit_head": "transformer_layer"},
        {"model.halting": "act", "model.exit_head": "shared"},
        {"model.halting": "pondernet"},
    ],
)
def test_everything_random_at_once(images, tmp_path, method):
    model = run(images, tmp_path, **SMALL, **LIVELY, **method)
    assert model.config.halting == method.get("model.halting") and model.config.num_labels == 3
    with torch.no_grad():
        assert model.eval()(torch.rand(2, 3, 16, 16)).logits.isfinite().all()


def test_self_distillation_leaves_the_plain_vit_as_it_was(images, tmp_path):
    vit = trained_vit(image_size=16, id2label={0: "cat", 1: "dog", 2: "owl"}, label2id={"cat": 0, "dog": 1, "owl": 2})
    vit.save_pretrained(tmp_path / "vit")
    words = flags(
        images,
        tmp_path / "run",
        model_type="early_exit_vit",
        from_vit=tmp_path / "vit",
        max_steps=3,
        freeze=["early_exit_vit.*", "classifier.*"],
        **{"model.self_distillation": "true", "model.exit_criterion": "normalised_entropy", "model.threshold": 0},
    )
    sizes = [word for word in words if word.startswith("--model.") and word.split(".")[1] in SIZES]
    for word in sizes:
        at = words.index(word)
        del words[at : at + 2]
    train(parse_config(words))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "last").eval()
    pixel_values = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).logits, vit.eval()(pixel_values).logits)


@pytest.mark.parametrize("start", ["nothing", "other labels"])
def test_exits_do_not_learn_from_a_random_answer(images, tmp_path, start):
    fields = {"model.self_distillation": "true", "model.exit_criterion": "normalised_entropy", "model.threshold": 0.5}
    if start == "other labels":
        trained_vit(image_size=16, num_labels=5).save_pretrained(tmp_path / "vit")
        fields["from_vit"] = tmp_path / "vit"
    words = flags(images, tmp_path / "run", model_type="early_exit_vit", **fields)
    sizes = [word for word in words if word.startswith("--model.") and word.split(".")[1] in SIZES]
    for word in sizes if "from_vit" in fields else ["--model.thinking_stages"]:
        at = words.index(word)
        del words[at : at + 2]
    why = "it has 5 labels, the data 3" if "from_vit" in fields else "its weights are new"
    with pytest.raises(ValueError, match=f"`self_distillation` teaches the exits by the last answer.* {why}"):
        train(parse_config([*words, *(() if "from_vit" in fields else ("--model.num_attention_heads", "2"))]))


SIZES = ("thinking_stages", "hidden_size", "num_hidden_layers", "image_size", "patch_size")
