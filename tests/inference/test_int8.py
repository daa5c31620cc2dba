"""Quantised stages: int8 programs, and the report that compares them and moves τ."""

import numpy as np
import pytest
import torch

from hf_thinkingvit import EXIT_CRITERIA
from hf_thinkingvit.evaluation import compare_precisions
from hf_thinkingvit.evaluation.precisions import move_threshold
from hf_thinkingvit.evaluation.stages import StageMeasurements
from hf_thinkingvit.inference import export_model, from_exported
from hf_thinkingvit.torch_free import load_exported
from tests.inference.conftest import NETWORKS, RUNTIME_FORMATS, need_runtime, with_exits
from tests.utils import lively_model, random_images


pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporters


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in ("openvino", "onnxruntime")]
)
def quantised(request, tmp_path_factory):
    """A network, and its stages in int8."""
    need_runtime(request.param)
    if request.param == "openvino":
        pytest.importorskip("nncf", reason="int8 for OpenVINO needs nncf")
    model = with_exits(lively_model(thinking_stages=[1, 4], num_hidden_layers=1))
    folder = tmp_path_factory.mktemp("int8") / request.param
    options = {"precision": "int8", "calibration": random_images(32)}
    export_model(model, folder, RUNTIME_FORMATS[request.param], **options)
    return model, folder


def test_int8_answers_are_near_float_ones(quantised):
    model, folder = quantised
    images = random_images(60)
    with torch.no_grad():
        expected = model(images, output_stage_logits=True).stage_logits
    loaded = from_exported(folder, threads=1)
    assert loaded.precision == "int8"
    found = loaded(images, output_stage_logits=True).stage_logits
    for stage in range(2):
        error = (found[stage] - expected[stage]).abs().mean() / expected[stage].std()
        assert 0 < error < 0.25  # so it is quantised, and still the same function


def test_without_torch_answers_and_exits_are_the_same(quantised):
    _, folder = quantised
    images = random_images(60)
    found, expected = load_exported(folder, threads=1)(images.numpy()), from_exported(folder, threads=1)(images)
    assert sorted(set(found.exit_stage.tolist())) == [0, 1]
    assert found.exit_stage.tolist() == expected.exit_stage.tolist()
    np.testing.assert_allclose(found.logits, expected.logits.float().numpy(), atol=1e-5)


def test_programs_compute_in_int8(quantised):
    _, folder = quantised
    for stage in range(2):
        if (folder / f"stage_{stage}.onnx").exists():
            onnx = pytest.importorskip("onnx")
            operations = {node.op_type for node in onnx.load(folder / f"stage_{stage}.onnx").graph.node}
            assert {"QuantizeLinear", "DequantizeLinear"} <= operations
        else:
            assert "FakeQuantize" in (folder / f"stage_{stage}.xml").read_text()


def test_the_report(quantised):
    model, folder = quantised
    images, labels = random_images(80, seed=5), torch.randint(12, (80,), generator=torch.Generator().manual_seed(0))
    batches = [
        {"pixel_values": part, "labels": part_labels} for part, part_labels in zip(images.split(32), labels.split(32))
    ]
    report = compare_precisions(model, from_exported(folder, threads=1), batches)
    assert report.images == 80
    assert report.threshold == list(model.config.threshold)
    assert report.new_exits == report.exits[0]  # τ is moved so that as many images exit at each stage
    with torch.no_grad():
        expected = model(images, output_stage_logits=True)
    for stage in range(2):
        right = (expected.stage_logits[stage].argmax(dim=1) == labels).float().mean()
        assert report.top1[0][stage] == pytest.approx(right.item())
    assert report.accepted_top1[0] == pytest.approx((expected.logits.argmax(dim=1) == labels).float().mean().item())
    assert report.exits[0] == pytest.approx(
        [(expected.exit_stage == stage).float().mean().item() for stage in range(2)]
    )
    assert 0 < report.same_class[0] <= 1 and report.entropy_change[0] > 0
    assert report.table().count("\n| ") == 2
    same = compare_precisions(model, model, batches)
    assert (same.same_exit, same.same_class, same.new_threshold) == (1.0, [1.0] * 2, same.threshold)
    moved = compare_precisions(model, model, batches, new_threshold=[99.0])
    assert (moved.new_threshold, moved.new_exits) == ([99.0], [1.0, 0.0]) and moved.exits == same.exits
    assert (same.other_exit, same.unexplained_exit) == (0, 0)
    assert report.other_exit == round(80 * (1 - report.same_exit)) >= report.unexplained_exit
    unlabelled = compare_precisions(model, model, [{"pixel_values": images}])
    assert unlabelled.top1 is None and "top-1" in unlabelled.table()
    with pytest.raises(ValueError, match="at least one"):
        compare_precisions(model, model, [])


def test_exits_that_rounding_decides_are_counted():
    """Scores within rounding of τ, at a stage that the image reaches; and exits that differ without such a score."""
    from hf_thinkingvit.evaluation import precisions

    threshold, rounding = [0.5, 0.3], 0.01
    scores = torch.tensor([[0.2, 0.9], [0.505, 0.9], [0.4, 0.305], [0.9, 0.295], [0.9, 0.9], [float("nan"), 0.1]])
    others = torch.tensor([[0.2, 0.9], [0.495, 0.9], [0.4, 0.2], [0.9, 0.31], [0.4, 0.9], [float("nan"), 0.1]])
    first, second = (
        StageMeasurements(torch.cat([values, torch.zeros(6, 1)], dim=1), "topk_entropy", 10, False, {})
        for values in (scores, others)
    )
    exits = [each.exit_stages(threshold) for each in (first, second)]
    near, parted, unexplained = precisions._near_threshold(first, *exits, threshold, rounding)
    # The third image exits before the stage at which its score is near; nothing explains that the fifth exits early.
    assert near.tolist() == [False, True, False, True, False, False]
    assert parted.tolist() == [False, True, False, True, True, False]
    assert unexplained.tolist() == [False, False, False, False, True, False]


@pytest.mark.parametrize("criterion", ["topk_entropy", "max_probability"])
def test_moved_thresholds_give_the_same_shares(criterion):
    """For scores that are scaled and noisy, in both directions of certainty, also where none or all exit."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(200, 3, generator=generator)
    noisy = 0.7 * scores + 0.05 * torch.rand(200, 3, generator=generator)
    first, second = (StageMeasurements(values, criterion, 10, False, {}) for values in (scores, noisy))
    for threshold in ([0.3, 0.5], [0.9, 0.1], [0.0, 0.5], [1.0, 0.2], [0.4, 1.0]):
        moved = move_threshold(first, second, threshold)
        expected, found = first.exit_stages(threshold), second.exit_stages(moved)
        assert found.bincount(minlength=3).tolist() == expected.bincount(minlength=3).tolist()
    assert EXIT_CRITERIA["topk_entropy"].exits_below and not EXIT_CRITERIA["max_probability"].exits_below
    assert move_threshold(first, first, [0.3, 0.5]) == [0.3, 0.5]


def test_calibration_is_checked(tmp_path):
    need_runtime("onnxruntime")
    model = NETWORKS["vit"]()
    for calibration in (None, torch.zeros(4, 3, 48, 48), torch.zeros(0, 3, 32, 32), [torch.zeros(3, 32, 32)]):
        with pytest.raises(ValueError, match=r"needs `calibration`, .*\(images, 3, 32, 32\)"):
            export_model(model, tmp_path / "x", "onnx", precision="int8", calibration=calibration)
    with pytest.raises(ValueError, match="`calibration` is for"):
        export_model(model, tmp_path / "x", "onnx", calibration=torch.zeros(4, 3, 32, 32))
    assert not (tmp_path / "x").exists()
