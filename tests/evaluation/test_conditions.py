"""A promise is valid for one model: any change of the model ends it."""

import copy
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from hf_thinkingvit.evaluation import (
    StageAnswers,
    calibrate_budget,
    calibrate_risk,
    calibration_status,
    collect_stage_answers,
    model_conditions,
    weights_fingerprint,
)
from hf_thinkingvit.evaluation.conditions import check_same_model
from hf_thinkingvit.evaluation.labels import LabelMap
from hf_thinkingvit.evaluation.statements import calibration_statement
from hf_thinkingvit.hub import model_card, push
from hf_thinkingvit.hub.results import published_calibration
from hf_thinkingvit.image_processing import evaluation_image_processor
from tests.evaluation.test_calibration import draw
from tests.models.test_modeling_avit import lively_avit
from tests.training.tiny_runs import LABELS, write_images
from tests.utils import lively_model, lively_swin, random_images


PROMISE = "With probability at least 95%"


def answers_of(model) -> StageAnswers:
    """Simulated answers with the conditions of `model`."""
    return replace(draw(2000, 0), conditions=model_conditions(model), dataset="org/animals", split="validation")


def calibrated(make=lively_model, **overrides):
    two = {"thinking_stages": [2, 4]} if make is lively_model else {"head_rounds": [[1, 2], [2, 4]]}
    model = make(**{**two, **overrides})
    calibrate_risk(answers_of(model), 0.02).apply(model)
    return model


def card(model, **arguments) -> str:
    return str(model_card(model, name="animals", **arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated")
    calibrated().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("make", [lively_model, lively_swin])
def test_holds_for_the_model_as_it_is(make, tmp_path):
    model = calibrated(make)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    wrapped = torch.nn.DataParallel(model), torch.compile(model)
    for same in (model, loaded, copy.deepcopy(model), copy.deepcopy(model).train(), *wrapped):
        assert calibration_status(same, model.config.calibration).holds
    text = card(loaded)
    assert PROMISE in text and "since changed" not in text
    assert f"* τ: {model.config.threshold}" in text and "* split: validation" in text
    assert "* measured in: float32" in text and "This holds if model, criterion and candidate thresholds" in text
    loaded.config.threshold = [loaded.config.threshold]  # the same τ, as a list with one per exit
    assert PROMISE in card(loaded)


def half(model):
    return model.half()


def edit(model):
    with torch.no_grad():
        next(model.parameters()).view(-1)[0].mul_(1.001)


def permute_labels(model):
    labels = list(model.config.id2label.values())
    model.config.id2label = dict(enumerate([labels[1], labels[0], *labels[2:]]))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda model: setattr(model.config, "threshold", 1.6), "τ (1.35"),
        (
            lambda model: setattr(model.config, "exit_criterion", "entropy"),
            "the exit criterion (topk_entropy then",
        ),
        (lambda model: setattr(model.config, "entropy_top_k", 5), "`entropy_top_k` (10 then, 5 now)"),
        (lambda model: setattr(model.config, "hidden_act", "relu"), "`hidden_act` (gelu then, relu now)"),
        (lambda model: setattr(model.config, "layer_norm_eps", 0.1), "`layer_norm_eps`"),
        (permute_labels, "the labels"),
        (half, "the dtype (float32 then, float16 now)"),
        (lambda model: model.classifier.double(), "the dtype (float32 then, float32 and float64 now)"),
        (edit, "the weights"),
    ],
)
def test_whatever_changes_the_answers_ends_the_promise(change, words):
    model = calibrated()
    change(model)
    status = calibration_status(model, model.config.calibration)
    assert not status.holds and any(words in what for what in status.changed), status
    text = card(model)
    assert PROMISE not in text and "δ" not in text.split("## Calibration")[1]
    assert f"The model was calibrated at τ = {model.config.calibration['threshold']}, since changed: " in text
    assert words in text


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"threshold": 1.6}, "1.6 now"),
        ({"dtype": torch.bfloat16}, "bfloat16 now"),
        ({"exit_criterion": "margin", "threshold": 0.5}, "margin now"),
        (
            {"drop_path_rate": 0.5, "stage_loss_weights": [1.0, 2.0], "pruning_ratio_loss_weight": 3.0},
            None,  # fields for training only
        ),
    ],
)
def test_what_is_overridden_on_loading(folder, overrides, words):
    text = card(AutoModelForImageClassification.from_pretrained(folder, **overrides))
    assert (PROMISE in text) == (words is None)
    assert words is None or words in text


def test_fine_tuning_with_trainer_ends_it(folder, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(folder)
    rows = [{"pixel_values": image, "labels": 1} for image in random_images(4)]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, learning_rate=1e-3, report_to=[], use_cpu=True)
    Trainer(model, arguments, train_dataset=rows).train()
    model.save_pretrained(tmp_path / "tuned")
    text = card(AutoModelForImageClassification.from_pretrained(tmp_path / "tuned"))
    assert PROMISE not in text and "since changed: the weights" in text


def test_published_files_promise_nothing_either(folder, tmp_path):
    """Configuration and results contain facts only: a sentence in them would outlive changes of the model."""
    results = {"dataset": "org/animals", "calibration": calibrated().config.calibration}
    for name, overrides, promised in (("same", {}, True), ("other", {"threshold": 1.6}, False)):
        model = AutoModelForImageClassification.from_pretrained(folder, **overrides)
        written = push(model, evaluation_image_processor(32), "org/name", results=results, dry_run=tmp_path / name)
        assert (PROMISE in (written / "README.md").read_text(encoding="utf-8")) == promised
        for file in ("config.json", "results.json"):
            assert "robability" not in (written / file).read_text(encoding="utf-8"), file


def test_no_sentence_is_saved_with_a_model(folder, tmp_path):
    """It would remain unchanged in the configuration of models that are derived from this one."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    edit(model)
    model.save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["calibration"]
    assert "statement" not in facts and "robability" not in json.dumps(facts)
    assert (facts["epsilon"], facts["delta"], facts["images"]) == (0.02, 0.05, 2000)


def test_sentences_that_former_versions_saved(tmp_path):
    model = calibrated()
    said = calibration_statement(model.config.calibration)
    assert PROMISE in said
    model.config.calibration["statement"] = "With probability at least 99.99% over the choice of nothing."
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert said in card(loaded) and "99.99%" not in card(loaded)  # the sentence is built from the facts
    written = push(loaded, evaluation_image_processor(32), "org/name", dry_run=tmp_path / "push")
    assert "99.99%" not in (written / "config.json").read_text(encoding="utf-8")
    assert "99.99%" in loaded.config.calibration["statement"]  # the model itself is not changed
    del loaded.config.calibration["target"]  # nothing to build a sentence from
    assert "99.99%" in card(loaded)


@pytest.mark.parametrize("exits_early", [True, False])
def test_that_no_image_exits_early_was_saved_as_a_sentence(exits_early):
    facts = {**calibrated().config.calibration, "exits_early": exits_early}
    said = calibration_statement(facts)
    assert ("No τ at which an image exits early keeps this promise." in said) == (not exits_early)
    del facts["exits_early"]
    assert calibration_statement({**facts, "statement": said}) == said
    assert calibration_statement(published_calibration({**facts, "statement": said})) == said


@pytest.mark.parametrize("split, shares", [("test", True), ("test[:50%]", True), ("all", True), ("validation", False)])
def test_the_card_says_whether_the_threshold_was_chosen_on_the_images_that_are_reported(split, shares):
    model = calibrated()
    facts = model.config.calibration = {**model.config.calibration, "dataset": "org/animals", "split": split}
    results = {"dataset": "org/animals", "split": "test", "stages": [{"top1": 60.0}, {"top1": 70.0}]}
    text = str(model_card(model, results, name="animals"))
    assert ("was chosen on these images or some of them" in text) == shares
    assert f"* GMACs per image on them at this τ: {facts['gmacs']:.4g}" in text
    assert "was chosen on" not in str(model_card(model, {**results, "dataset": "org/others"}, name="animals"))


def test_results_of_another_calibration():
    """Only a calibration that is valid for the model is shown, from the configuration or from the results."""
    model, other = calibrated(), calibrated(hidden_act="relu")
    foreign = {"dataset": "org/animals", "calibration": other.config.calibration}
    assert PROMISE in card(model, results=foreign)
    del model.config.calibration
    assert PROMISE not in card(model, results=foreign) and "`hidden_act` (relu then" in card(model, results=foreign)


def test_what_former_versions_saved_cannot_be_verified():
    model = calibrated()
    del model.config.calibration["conditions"]
    text = card(model)
    assert PROMISE not in text and "whether that still holds cannot be verified: which weights" in text
    model.config.threshold = 0.1
    assert "since changed: τ" in card(model)


def test_a_field_that_is_no_more_is_a_change():
    model = calibrated()
    model.config.calibration["conditions"]["token_mixer"] = "attention"
    status = calibration_status(model, model.config.calibration)
    assert status.changed == ("`token_mixer` (attention then, no such field now)",)


def test_a_renamed_field_is_no_change():
    """Conditions of earlier versions have `distilled` for `use_distillation_token`."""
    model = lively_avit(use_distillation_token=True)
    then = model_conditions(model)
    then["distilled"] = then.pop("use_distillation_token")
    for same in (model, model.config, torch.nn.DataParallel(model)):
        check_same_model(then, same)
    with pytest.raises(ValueError, match=r"`use_distillation_token` \(False then, True now\)"):
        check_same_model({**then, "distilled": False}, model)


def test_budgets_end_too():
    model = lively_model(thinking_stages=[2, 4])
    calibrate_budget(answers_of(model), gmacs=1.5).apply(model)
    assert "within 1.5" in card(model)
    edit(model)
    assert "within 1.5" not in card(model) and "since changed: the weights" in card(model)


class Packed(torch.Tensor):
    """A tensor subclass, such as quantization libraries use for weights."""


def test_weights_that_cannot_be_read_cannot_be_verified():
    model = calibrated()
    facts = model.config.calibration
    meta, quantized, sparse = copy.deepcopy(model).to("meta"), copy.deepcopy(model), copy.deepcopy(model)
    quantized.register_buffer("packed", torch.ones(2).as_subclass(Packed))
    sparse.register_buffer("packed", torch.eye(2).to_sparse())
    for unreadable in (meta, quantized, sparse):
        assert weights_fingerprint(unreadable) is None
        status = calibration_status(unreadable, facts)
        assert not status.holds and "the weights cannot be compared" in status.unverified[0]
    facts["conditions"]["weights"] = None  # calibrated with quantized weights
    assert not calibration_status(model, facts).holds


def test_the_fingerprint_is_of_names_shapes_dtypes_and_bytes():
    first = torch.nn.Linear(2, 3, bias=False)
    prints = {weights_fingerprint(first)}
    for parameter in (first.weight.T, first.weight.bfloat16(), first.weight.view(torch.int32), -first.weight):
        other = torch.nn.Linear(2, 3, bias=False)
        other.weight = torch.nn.Parameter(parameter.detach(), requires_grad=False)
        prints.add(weights_fingerprint(other))
    prints.add(weights_fingerprint(torch.nn.Sequential(first)))
    assert len(prints) == 6 and None not in prints
    again = torch.nn.Linear(2, 3, bias=False)
    again.weight = torch.nn.Parameter(first.weight.detach().T.contiguous().T)  # the same numbers, other strides
    assert weights_fingerprint(again) == weights_fingerprint(first)


def test_is_applied_to_the_measured_model_only():
    measured = lively_model(thinking_stages=[2, 4])
    found = calibrate_risk(answers_of(measured), 0.02)
    other = lively_model(thinking_stages=[2, 4])
    edit(other)
    with pytest.raises(ValueError, match="measured on another model; different are: the weights"):
        found.apply(other)
    with pytest.raises(ValueError, match="the exit criterion"):
        found.apply(lively_model(thinking_stages=[2, 4], exit_criterion="margin").config)
    assert not hasattr(other.config, "calibration") and other.config.threshold == 0.0
    found.apply(measured.config)  # a configuration has only fields to compare
    assert calibration_status(measured, measured.config.calibration).holds


def test_what_is_measured_is_what_is_recorded():
    model = lively_model(thinking_stages=[2, 4])
    batches = [{"pixel_values": random_images(4), "labels": torch.tensor([0, 1, 2, 3])}]
    answers = collect_stage_answers(model, batches, LabelMap(model.config), progress=False)
    assert answers.conditions == model_conditions(model) and answers.results([0.0])["dtype"] == "float32"
    with torch.autocast("cpu", torch.bfloat16):
        cast = collect_stage_answers(model, batches, LabelMap(model.config), progress=False)
    assert cast.conditions["dtype"] == "float32 under autocast to bfloat16"
    found = calibrate_budget(cast, gmacs=1.0)
    assert not calibration_status(model, replace(found, threshold=model.config.threshold)).holds


def test_models_without_stages_have_no_calibration():
    status = calibration_status(lively_avit(), calibrated().config.calibration)
    assert status.changed == ("the model, which does not think in stages",)


def test_scripts_measure_a_half_precision_checkpoint_in_one_dtype(tmp_path, monkeypatch):
    """In float32 by default; the calibrated model is saved in the measured dtype, so that its card is valid."""
    pytest.importorskip("matplotlib")
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: index for index, label in enumerate(LABELS)}}
    lively_model(thinking_stages=[1, 4], num_labels=3, **names).half().save_pretrained(tmp_path / "model")
    evaluation_image_processor(32).save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images", num_train=2, num_test=40)

    def run(script: str, *words) -> Path:
        output = tmp_path / "-".join([script, *words]).replace("/", "_")
        common = ["--model", tmp_path / "model", "--dataset", tmp_path / "images", "--output-dir", output]
        monkeypatch.setattr(sys, "argv", [script, *map(str, common), *words])
        runpy.run_path(str(Path(__file__).parents[2] / "examples" / script), run_name="__main__")
        return output

    for words, dtype in (([], "float32"), (["--dtype", "bfloat16"], "bfloat16")):
        swept = json.loads((run("sweep_thresholds.py", *words) / "results.json").read_text())
        folder = run("calibrate.py", "--gmacs", "0.0005", "--check", "0", *words)
        found = json.loads((folder / "calibration.json").read_text())
        assert swept["dtype"] == found["conditions"]["dtype"] == dtype
        assert swept["split"] == found["split"] == "test"
        assert found["calibration_images"]["last_stage_top1"] == swept["stages"][-1]["top1"]
        model = AutoModelForImageClassification.from_pretrained(folder)
        assert model.dtype == getattr(torch, dtype) and calibration_status(model, found).holds
        other = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float16)
        assert "the dtype" in str(calibration_status(other, found))
