"""
What `benchmarks.compare` measures is what a loop over images measures; finished runs are not repeated, runs with other
settings not mixed; table and picture are of the records.
"""

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForImageClassification


pytest.importorskip("timm")

from benchmarks import compare_runs
from benchmarks.compare import comparison, main, train_all
from benchmarks.compare_methods import GROUPS, METHODS, with_starts
from benchmarks.compare_picture import draw
from benchmarks.compare_report import mean_points, measure_speed, setting, shown_points, write_report
from benchmarks.compare_runs import (
    Job,
    evaluate_points,
    operating_thresholds,
    perform,
    points_of_seeds,
    prepare_start,
    run_config,
)
from benchmarks.compare_settings import check_given, prepare
from hf_thinkingvit.auto import AutoImageProcessor
from hf_thinkingvit.data import decode, load_splits
from hf_thinkingvit.evaluation import StageAnswers
from tests.compare_jobs import begin, job, tiny_job
from tests.training.tiny_runs import write_images
from tests.utils import counted_flops


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of Parquet files: 8 images to train on, 8 to evaluate on, 3 labels."""
    return write_images(tmp_path_factory.mktemp("pictures"), num_train=8, num_test=8)


@pytest.mark.parametrize(
    "name", ["thinkingvit", "similarity", "pabee", "act", "hydravit", "dynabert", "dynamicvit", "avit"]
)
def test_points_are_those_of_a_loop_over_images(name, tmp_path, pictures):
    job = tiny_job(name, tmp_path, pictures, given=(name,))
    job.folder.mkdir(parents=True)
    measured = evaluate_points(job, torch.device("cpu"))
    job.result.write_text(json.dumps(measured))
    (points,) = points_of_seeds([job])
    assert measured["images"] == 8
    processor = AutoImageProcessor.from_pretrained(job.model)
    images = [
        (processor(decode(row["image"]), return_tensors="pt")["pixel_values"], row["label"])
        for row in encoded(pictures)
    ]
    for point in points[:: -(-len(points) // 5)]:
        model = AutoModelForImageClassification.from_pretrained(job.model, **point.get("fields", {})).eval()
        arguments = {"threshold": point["threshold"]} if "threshold" in point else {}
        right, macs = 0, 0.0
        for pixel_values, label in images:
            outputs = []
            with torch.no_grad():
                flops = counted_flops(lambda: outputs.append(model(pixel_values, **arguments)))
            right += int(outputs[0].logits.argmax()) == label
            macs += outputs[0].macs.item() if name == "avit" else flops / 2
        assert point["top1"] == pytest.approx(100 * right / len(images))
        assert point["gmacs"] * 1e9 == pytest.approx(macs / len(images), rel=1e-3)
    if name != "avit":  # of which these images, seen by random weights, may all halt alike
        assert len({point["gmacs"] for point in points}) > 1


def encoded(pictures: Path):
    return load_splits(str(pictures))["test"].cast_column("image", datasets.Image(decode=False))


def stage_answers(scores: torch.Tensor, criterion: str) -> StageAnswers:
    right = torch.zeros_like(scores, dtype=torch.bool)
    macs = tuple(range(1, scores.shape[1] + 1))
    return StageAnswers(scores, right, right, macs, criterion, entropy_top_k=5, num_labels=3, dataset="none")


def test_every_patience_is_an_operating_point():
    scores = torch.tensor([[1.0, 1, 1, 1], [1, 2, 3, 4], [1, 2, 1, 2], [1, 1, 2, 3]])
    assert operating_thresholds(stage_answers(scores, "patience")) == [3, 2, 1, 0]


@pytest.mark.parametrize(("criterion", "scale"), [("similarity", 1e-3), ("max_probability", 1.0), ("entropy", 1.0)])
@pytest.mark.parametrize("images", [4, 400])
def test_operating_points_are_where_exits_change(criterion, scale, images):
    scores = torch.rand(images, 3, generator=torch.Generator().manual_seed(0)) * scale
    answers = stage_answers(scores, criterion)
    thresholds = operating_thresholds(answers)
    exits = answers.exit_stages_of_each(thresholds)
    assert (exits[0] == 2).all() and (exits[-1] == 0).all()
    assert not any(torch.equal(*pair) for pair in pairwise(exits))
    if images == 400:
        assert 40 < len(thresholds) <= 48
    else:
        dense = answers.exit_stages_of_each(torch.linspace(0, scale, 1001).tolist())
        assert {tuple(row) for row in exits.tolist()} >= {tuple(row) for row in dense.tolist()}


def test_what_is_trained_is_evaluated_again_without_training(tmp_path, pictures, monkeypatch):
    job = tiny_job("thinkingvit", tmp_path, pictures)
    perform(job)
    first = json.loads(job.result.read_text())
    assert first["images"] == 8 and first["images_seen"] == 8 and first["training_macs_per_image"] > 0
    (points,) = points_of_seeds([job])
    assert points[0]["gmacs"] > points[-1]["gmacs"]
    monkeypatch.setattr(compare_runs, "TrainingRun", None)
    job.result.unlink()
    perform(job)
    assert json.loads(job.result.read_text()) == first


@pytest.mark.parametrize("name", ["avit", "dynamicvit", "dynabert_widths", "plain_wide_longer"])
def test_methods_start_from_the_model_that_is_given(name, tmp_path, pictures):
    job = tiny_job(name, tmp_path, pictures, given=("plain_wide",))
    assert with_starts([name], job.given) == ["plain_wide", name]
    folder = prepare_start(job)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    given, start = (AutoModelForImageClassification.from_pretrained(each) for each in (job.start.model, folder))
    with torch.no_grad():
        torch.testing.assert_close(start.eval()(images).logits, given.eval()(images).logits, rtol=1e-4, atol=1e-4)
    config = run_config(job, folder)
    assert str(folder) in (config.from_vit, config.from_pretrained)


def test_given_models_need_no_start_and_must_suit_their_method(tmp_path, pictures):
    assert with_starts(["dynabert", "avit"], {"dynabert": tmp_path}) == ["dynabert", "plain_wide", "avit"]
    given = {"plain_wide": tmp_path / "given" / "hydravit"}
    wrong = replace(tiny_job("plain_wide", tmp_path, pictures, given=("hydravit", "plain_narrow")), given=given)
    with pytest.raises(ValueError, match="'elastic_vit', and 'plain, wide' needs a 'thinkingvit'"):
        check_given(wrong, is_start=False)
    narrow = replace(wrong, given={"plain_wide": tmp_path / "given" / "plain_narrow"})
    check_given(narrow, is_start=False)
    with pytest.raises(ValueError, match="`hidden_size` is 8 instead of 16"):
        check_given(narrow, is_start=True)
    with pytest.raises(ValueError, match="the comparison's own run"):
        check_given(replace(narrow, given={"plain_wide": narrow.folder / "last"}), is_start=False)


def test_runs_with_other_settings_are_refused_or_made_anew(tmp_path, pictures):
    job = tiny_job("plain_wide", tmp_path, pictures)
    tuned = replace(job, method="avit")
    for each in (job, tuned):
        begin(each, {"points": []})
    prepare([job, tuned])
    assert job.result.exists()
    longer = replace(job, base=replace(job.base, epochs=2))
    with pytest.raises(ValueError, match=re.escape("plain_wide-seed-0: epochs: 1 then, 2 now")):
        prepare([longer])
    with pytest.raises(ValueError, match="avit-seed-0: start.epochs: 1 then, 2 now"):
        prepare([replace(tuned, base=longer.base)])
    for other in ({"batch_size": 8}, {"mixed_precision": "bf16"}, {"dataset": str(tmp_path)}, {"clip_grad": 1.0}):
        with pytest.raises(ValueError, match=next(iter(other))):
            prepare([replace(job, base=replace(job.base, **other))])
    with pytest.raises(ValueError, match="rows: 8 then, 9 now"):
        prepare([replace(job, rows={"train": 9, "test": 8})])
    prepare([replace(job, base=replace(job.base, log_steps=3, num_workers=1))])
    assert job.result.exists()
    prepare([replace(job, base=replace(job.base, max_eval_samples=5))])
    assert job.folder.exists() and not job.result.exists()
    prepare([longer], redo=True)
    assert not job.folder.exists() and tuned.folder.exists()


def test_runs_without_a_record_of_their_settings_are_refused(tmp_path, pictures):
    job = tiny_job("plain_wide", tmp_path, pictures)
    begin(job, {"points": []})
    job.settings.unlink()
    with pytest.raises(ValueError, match="there is no record of its settings"):
        prepare([job])


def command_line(job: Job, tmp_path: Path, *words: str) -> list[str]:
    job.base.save(tmp_path / "base.yaml")
    return ["--config", str(tmp_path / "base.yaml"), "--output-dir", str(job.output_dir), *words]


def test_command_makes_the_jobs_in_the_order_of_their_starts(tmp_path, pictures):
    job = tiny_job("plain_wide", tmp_path, pictures, given=("plain_wide",))
    words = command_line(job, tmp_path, "--methods", "avit", "dynabert", "--seeds", "0", "1")
    _, jobs = comparison(words)
    widths = ["dynabert_widths-seed-0", "dynabert_widths-seed-1"]
    names = [each.name for each in jobs]
    assert names[:4] == ["plain_wide-seed-0", widths[0], "plain_wide-seed-1", widths[1]]
    assert names[4:] == ["avit-seed-0", "dynabert-seed-0", "avit-seed-1", "dynabert-seed-1"]
    assert jobs[0].rows == {"train": 8, "test": 8}
    _, jobs = comparison([*words, "--trained", f"plain_wide={job.trained}"])
    assert [each.name for each in jobs if each.method == "plain_wide"] == ["plain_wide-seed-0"]
    assert {each.start.model for each in jobs if each.method == "avit"} == {job.trained}


def test_command_refuses_what_it_cannot_compare(tmp_path, pictures, capsys):
    job = tiny_job("plain_wide", tmp_path, pictures, given=("plain_narrow",))
    begin(replace(job, given={}))
    words = command_line(job, tmp_path, "--methods", "plain_wide", "avit")
    with pytest.raises(SystemExit, match="plain_wide-seed-0: epochs: 1 then, 2 now"):
        main([*words, "--epochs", "2"])
    folder = tmp_path / "given" / "plain_narrow"
    for given, message in ((f"plain_wide={folder}", "`hidden_size` is 8"), (f"matformer={folder}", "neither among")):
        with pytest.raises(SystemExit) as caught:
            main([*words, "--trained", given])
        assert caught.value.code == 2 and message in capsys.readouterr().err


def report_jobs(tmp_path: Path, pictures: Path) -> list[Job]:
    """Two seeds of the wide net and of a method that starts from it, with records as of finished runs."""
    jobs = []
    for method, macs in (("plain_wide", 3e9), ("avit", 2e9)):
        for seed in (0, 1):
            jobs.append(replace(tiny_job(method, tmp_path, pictures), seed=seed))
            points = [{"fields": {}, "top1": 50.0 + 4 * seed, "gmacs": macs / 1e9}]
            facts = {"images_seen": 8, "training_macs_per_image": macs, "images": 8, "device": "cpu"}
            begin(jobs[-1], {**facts, "points": points})
    return jobs


def test_table_and_picture_are_of_the_records(tmp_path, pictures):
    jobs = report_jobs(tmp_path, pictures)
    output_dir = jobs[0].output_dir
    text = write_report(jobs, {"avit": {"-": 70.0}}, output_dir)
    assert "| plain, wide | 2 | 8 | 0.024 | 0 | 0 |" in text
    assert "| A-ViT | 2 | 8 | 0.016 | 8 | 0.024 |" in text
    assert "| A-ViT | - | 2000.00 | 52.00 ± 2.00 | 70 |" in text
    assert (output_dir / "compare.md").read_text().strip() == text.strip()
    rows = (output_dir / "compare.csv").read_text().split()
    assert rows[-1] == "avit,-,2.0,0.0,52.0,2.0,70.0" and len(rows) == 3
    assert all((output_dir / f"compare.{suffix}").stat().st_size > 1000 for suffix in ("png", "svg"))


def test_nothing_is_known_of_the_training_of_a_given_model(tmp_path, pictures):
    jobs = [replace(job, given={"plain_wide": tmp_path}) for job in report_jobs(tmp_path, pictures) if job.seed == 0]
    text = write_report(jobs, {}, jobs[0].output_dir)
    assert "| plain, wide | 1 | unknown | unknown | unknown | unknown |" in text
    assert "| A-ViT | 1 | 8 | 0.016 | unknown | unknown |" in text


def test_picture_shows_every_method_once_a_panel_and_tells_them_apart():
    reported = [name for name, method in METHODS.items() if not method.is_step]
    point = {"gmacs": 1.0, "top1": 50.0, "top1_se": None, "images_per_second": 10.0}
    results = {name: {"title": METHODS[name].title, "points": [point, {**point, "gmacs": 2.0}]} for name in reported}
    panels = draw(results).axes
    assert len(panels) == 2 * len(GROUPS)
    references = {METHODS[name].title for name in reported} - {
        METHODS[name].title for g in GROUPS.values() for name in g
    }
    for panel, names in zip(panels, [*GROUPS.values()] * 2):
        lines = panel.get_lines()
        assert {line.get_label() for line in lines} == references | {METHODS[name].title for name in names}
        assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == len(lines)
    assert len(references) + sum(map(len, GROUPS.values())) == len(reported)


def test_speed_is_of_the_columns_that_are_named(tmp_path, pictures):
    rows = load_splits(str(pictures))["test"]
    two = datasets.concatenate_datasets([rows, rows.select_columns("image").rename_column("image", "thumb")], axis=1)
    (tmp_path / "two").mkdir()
    two.to_parquet(tmp_path / "two" / "test.parquet")
    job = tiny_job(
        "plain_wide", tmp_path, tmp_path / "two", ("plain_wide",), image_column="thumb", label_column="label"
    )
    begin(job, {"points": [{"fields": {}, "top1": 50.0, "gmacs": 1.0}]})
    speeds = measure_speed([job], images=4, batch_size=2, repeats=1, device=torch.device("cpu"))
    assert speeds["plain_wide"]["-"] > 0


def test_points_are_averaged_over_seeds_and_equal_neighbours_shown_once(tmp_path):
    jobs = [job("matformer", tmp_path, seed) for seed in (0, 1)]
    for each in jobs:
        tops = [50.0, 50.0, 60.0 + 2 * each.seed]
        points = [
            {"fields": {"at": at}, "top1": top, "gmacs": cost} for at, top, cost in zip((2, 1, 0), tops, (1, 1, 3))
        ]
        each.folder.mkdir()
        each.result.write_text(json.dumps({"points": points}))
    points = mean_points(jobs)
    assert [point["fields"]["at"] for point in points] == [2, 0]
    assert points[1]["top1"] == 61
    assert points[1]["top1_se"] == pytest.approx(1.0)
    assert shown_points(points) == points
    assert train_all(jobs, at_once=2) == []  # finished ones are not repeated


def test_thresholds_that_differ_late_are_settings_of_their_own():
    assert setting({"threshold": 0.999_999_9}) != setting({"threshold": 1.0})
    assert setting({"threshold": 3.0}) == "τ = 3"
