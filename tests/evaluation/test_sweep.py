from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Image, Sequence, Value

from hf_thinkingvit.data import as_image_split, evaluation_batches
from hf_thinkingvit.evaluation import LabelMap, collect_stage_answers, evaluate_thresholds, stage_macs
from hf_thinkingvit.evaluation.accuracy import evaluate_accuracy
from hf_thinkingvit.image_processing import evaluation_image_processor
from tests.utils import lively_model, lively_swin


NAMES = [f"class {index}" for index in range(12)]
PROCESSOR = evaluation_image_processor(32, crop_pct=1.0)


def model(make=lively_model, **overrides):
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    return make(**names, **overrides)


def images(labels, kind=None) -> Dataset:
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
    features = Features({"image": Image(), "label": kind or ClassLabel(names=NAMES)})
    return Dataset.from_dict({"image": list(pixels), "label": labels}, features=features)


@pytest.mark.parametrize(
    "criterion, make",
    [(criterion, lively_model) for criterion in ("topk_entropy", "entropy", "max_probability", "margin")]
    + [("topk_entropy", lively_swin)],
)
@torch.no_grad()
def test_equals_running_the_model_at_each_threshold(criterion, make):
    network = model(make, exit_criterion=criterion)
    labels = [index % 12 for index in range(40)]
    data = images(labels)
    batch = next(iter(evaluation_batches(as_image_split(data, "d"), PROCESSOR, batch_size=40)))
    limits = (0.0, 3.0) if "entropy" in criterion else (1.0, 0.0)
    answers, _ = evaluate_thresholds(network, data, PROCESSOR, batch_size=7, progress=False)
    scores = answers.scores[:, 0].sort().values
    between = ((scores[1:] + scores[:-1]) / 2)[::4].tolist()  # so that images exit at every stage
    thresholds = [*np.linspace(*limits, 9).tolist(), *between, [limits[0], limits[1]], [between[3], between[5]]]
    rows = [answers.row(threshold) for threshold in thresholds]
    spent = torch.tensor(stage_macs(network.config)).cumsum(0)
    for threshold, row in zip(thresholds, rows, strict=True):
        outputs = network(batch["pixel_values"], threshold=threshold)
        assert torch.equal(answers.exit_stages(threshold), outputs.exit_stage)
        right = outputs.logits.argmax(-1) == batch["labels"]
        top5 = (outputs.logits.topk(5).indices == batch["labels"][:, None]).any(1)
        assert row["top1"] == pytest.approx(100 * right.float().mean().item())
        assert row["top5"] == pytest.approx(100 * top5.float().mean().item())
        assert row["gmacs"] == pytest.approx(spent[outputs.exit_stage].double().mean().item() / 1e9)
        for stage in range(3):
            here = outputs.exit_stage == stage
            assert row["exit_shares"][stage] == pytest.approx(here.float().mean().item())
            expected = 100 * right[here].float().mean().item() if here.any() else None
            assert row["exit_top1"][stage] == pytest.approx(expected)
    assert len({tuple(row["exit_shares"]) for row in rows}) > 5  # the thresholds make a difference


def test_each_stage_runs_once_per_image():
    network, counts = model(), [0, 0, 0]
    run_stage = network.run_stage

    def count(stage_index, state, *args, **kwargs):
        counts[stage_index] += len(next(iter(state.values())))
        return run_stage(stage_index, state, *args, **kwargs)

    network.run_stage = count
    evaluate_thresholds(
        network, images([0] * 9), PROCESSOR, np.linspace(0, 2, 500).tolist(), batch_size=4, progress=False
    )
    assert counts == [9, 9, 9]


def test_stages_alone_are_the_ends_of_the_sweep():
    answers, (all_stages, first) = evaluate_thresholds(model(), images([3] * 8), PROCESSOR, [0.0, 99.0], progress=False)
    stages = answers.stage_rows()
    assert {name: all_stages[name] for name in ("top1", "top5", "gmacs")} == pytest.approx(stages[-1])
    assert {name: first[name] for name in ("top1", "top5", "gmacs")} == pytest.approx(stages[0])
    assert answers.results([0.0])["stages"] == stages


def test_another_resolution_costs_what_it_costs():
    processor = evaluation_image_processor(48, crop_pct=1.0)
    answers, _ = evaluate_thresholds(model(), images([0, 1]), processor, progress=False)
    assert answers.macs == tuple(np.cumsum(stage_macs(model().config, 48)).tolist())


@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.parametrize("accelerator", [None, Accelerator(cpu=True)], ids=["alone", "accelerated"])
def test_shows_its_progress_if_asked(progress, accelerator, capsys):
    network, data = model(), as_image_split(images([0, 1]), "d")
    batches = evaluation_batches(data, PROCESSOR, batch_size=2)
    answers = collect_stage_answers(network, batches, LabelMap(network.config), accelerator, progress)
    assert len(answers) == 2
    assert ("evaluating: 100%" in capsys.readouterr().err) == progress


def test_leaves_the_mode_of_the_model():
    network = model().train()
    evaluate_thresholds(network, images([0]), PROCESSOR, progress=False)
    assert network.training


@pytest.mark.parametrize(
    "thresholds, message",
    [([0.1, float("nan")], "`threshold` must be a number"), ([[0.1]], "a list of 2"), ([-1.0], "`threshold` must be")],
)
def test_refuses_thresholds_that_are_none(thresholds, message):
    with pytest.raises(ValueError, match=message):
        evaluate_thresholds(model(), images([0]), PROCESSOR, thresholds, progress=False)


def test_refuses_no_images_and_no_labels():
    with pytest.raises(ValueError, match="no images with labels"):
        evaluate_thresholds(model(), images([]), PROCESSOR, progress=False)
    with pytest.raises(ValueError, match="no column for `label_column`"):
        evaluate_thresholds(model(), images([0]).remove_columns("label"), PROCESSOR, progress=False)


class TestLabels:
    """Datasets whose labels are not the model's classes."""

    logits = torch.eye(12)[[3, 5, 7, 9]] * 5.0

    def hits(self, labels: LabelMap, truth) -> list[bool]:
        return labels.hits(self.logits, torch.tensor(truth), top_k=1).tolist()

    def test_names_in_another_order(self):
        labels = LabelMap(model().config, NAMES[::-1])
        assert self.hits(labels, [8, 6, 4, 0]) == [True, True, True, False]

    def test_folders_named_by_index(self):
        """ImageNet-V2: folders "0", "1", "10", ... sorted as text."""
        names = sorted(str(index) for index in range(12))
        labels = LabelMap(model().config, names)
        assert self.hits(labels, [names.index("3"), names.index("5"), 0, 0]) == [True, True, False, False]

    def test_fewer_classes_are_judged_among_themselves(self):
        """ImageNet-A and -R have 200 of the classes; answers outside of them are not considered."""
        logits = torch.tensor([[0.0] * 11 + [9.0]])
        logits[0, 3] = 1.0
        few, label = LabelMap(model().config, ["class 3", "class 5"]), torch.tensor([0])
        assert few.hits(logits, label, 1).tolist() == [True]
        among_all = LabelMap(model().config, ["class 3", "class 5"], restrict=False)
        assert among_all.hits(logits, label, 1).tolist() == [False]

    def test_a_map_between_names(self):
        labels = LabelMap(model().config, ["n3", "n5"], {"n3": "class 3", "n5": 5})
        assert self.hits(labels, [0, 1, 0, 0]) == [True, True, False, False]
        assert (
            self.hits(LabelMap(model().config, [f"n{i}" for i in range(12)], "index"), [3, 5, 7, 8])[:3] == [True] * 3
        )

    def test_several_right_answers_or_none(self):
        """ImageNet-ReaL: images without a label are left out."""
        data = images([[3, 5], [], [7], [0, 1, 2]], Sequence(Value("int64")))
        answers, _ = evaluate_thresholds(model(), data, PROCESSOR, label_column="label", progress=False)
        assert len(answers) == 3
        labels = LabelMap(model().config)
        assert self.hits(labels, [[3, 5, -1], [-1, -1, -1], [7, -1, -1], [0, 1, 2]]) == [True, False, True, False]

    def test_refuses_names_that_are_not_the_models(self):
        with pytest.raises(ValueError, match=r"1 labels of pets match no class of the model, such as \['zebra'\]"):
            LabelMap(model().config, ["class 1", "zebra"], name="pets")

    def test_refuses_indices_beyond_the_classes(self):
        with pytest.raises(ValueError, match="labels outside 0 to 11"):
            self.hits(LabelMap(model().config), [3, 5, 7, 12])


def test_refuses_models_without_stages():
    from tests.models.test_modeling_avit import lively_avit

    network = lively_avit()
    with pytest.raises(ValueError, match="does not think in stages"):
        collect_stage_answers(network, [], LabelMap(network.config))


@pytest.mark.parametrize("fields", [{"problem_type": "multi_label_classification"}, {"problem_type": "regression"}])
def test_refuses_models_that_do_not_choose_one_class(fields):
    network = model(**fields)
    for measure in (
        lambda: evaluate_thresholds(network, images([0, 1]), PROCESSOR, progress=False),
        lambda: evaluate_accuracy(Accelerator(cpu=True), {"weights": network}, []),
    ):
        with pytest.raises(ValueError, match="single-label classification, but this model's `problem_type` is"):
            measure()


def test_some_of_the_images_are_of_all_labels():
    """Also if the data are sorted by label, as image folders are."""
    rows = images([label for label in (0, 1, 2) for _ in range(200)])
    split = as_image_split(rows, "animals")
    labels = split.sample(60).rows["label"][:]
    assert len(labels) == 60 and all(10 < labels.count(label) < 30 for label in (0, 1, 2))
    assert labels == split.sample(60).rows["label"][:] == sorted(labels)  # the same sample, in the order of the data
    numbered = replace(split, rows=Dataset.from_dict({"number": range(600)}))
    assert set(numbered.sample(20).rows["number"]) < set(numbered.sample(60).rows["number"])
    assert len(split.sample(601).rows) == len(split.sample(None).rows) == 600
    stream = replace(split, rows=split.rows.to_iterable_dataset())
    assert [row["label"] for row in stream.sample(5).rows] == [0] * 5
    answers, _ = evaluate_thresholds(model(), rows, PROCESSOR, max_samples=8, progress=False)
    again, _ = evaluate_thresholds(model(), split.sample(8).rows, PROCESSOR, progress=False)
    assert len(answers) == 8 and torch.equal(answers.scores, again.scores)
