"""Exit criteria with memory of earlier answers, or that read more than logits, wherever exits are decided."""

import pytest
import torch
from transformers.utils import is_onnx_available

from hf_thinkingvit import EXIT_CRITERIA, ExitCriterion, ThinkingViTForImageClassification
from hf_thinkingvit.evaluation.stages import measure_stages
from hf_thinkingvit.inference import AdaptiveEngine
from hf_thinkingvit.inference.export import export_adaptive, export_onnx, export_stages
from hf_thinkingvit.models.exit_rules import ExitRule
from hf_thinkingvit.models.staged_loop import run_stages
from tests.utils import lively, random_images, tiny_config


NUM_STAGES = 3


def similarity(answer, memory, top_k):
    """Mean squared difference from the previous stage's answer; at the first stage nothing exits."""
    logits = answer["logits"].float()
    if not memory:
        return torch.full_like(logits[:, 0], torch.inf), {"logits": logits}
    return (logits - memory["logits"]).square().mean(dim=1), {"logits": logits}


def patience(answer, memory, top_k):
    """Number of consecutive stages at which the prediction did not change."""
    prediction = answer["logits"].argmax(dim=1)
    count = torch.zeros_like(prediction)
    if memory:
        count = torch.where(prediction == memory["prediction"], memory["count"] + 1, 0)
    return count.float(), {"prediction": prediction, "count": count}


def accumulated_gate(answer, memory, top_k):
    """The sum over the stages so far of a halting score that the model returns beside its logits (arXiv 1603.08983)."""
    total = answer["halting_score"].float() + memory.get("total", 0.0)
    return total, {"total": total}


def greatest(num_labels, top_k):
    return 10.0


CRITERIA = {
    "similarity": ExitCriterion(None, True, greatest, "", score_with_memory=similarity),
    "patience": ExitCriterion(None, False, greatest, "", score_with_memory=patience),
    "accumulated_gate": ExitCriterion(None, False, greatest, "", score_with_memory=accumulated_gate),
}


class GatedThinkingViT(ThinkingViTForImageClassification):
    def answer(self, stage_index, state):
        answer = super().answer(stage_index, state)
        return {**answer, "halting_score": torch.sigmoid(answer["logits"][:, 0] - 1)}


@pytest.fixture(params=sorted(CRITERIA))
def model(request, monkeypatch):
    monkeypatch.setitem(EXIT_CRITERIA, request.param, CRITERIA[request.param])
    sizes = {"thinking_stages": [1, 2, 4], "num_hidden_layers": 2}
    config = tiny_config(**sizes, exit_criterion=request.param, threshold=0.5)
    model = lively(GatedThinkingViT, config)
    if request.param != "patience":  # a τ between two images, so that rounding decides nothing
        with torch.no_grad():
            run = run_stages(model, model.exit_rule(), range(NUM_STAGES), random_images(12), run_all=True)
        scores = run.steps[1].score
        model.config.threshold = scores.sort().values[3:5].mean().item()
    return model


@torch.no_grad()
def exit_stages_of(model, images):
    """The exit stage of each image, in a batch of its own and with every stage run."""
    stages = []
    for image in images.split(1):
        answers = []
        state = model.begin(image)
        for stage in range(NUM_STAGES):
            state = model.run_stage(stage, state)
            answers.append(model.answer(stage, state))
            state = model.recycle(stage, state) if stage < NUM_STAGES - 1 else state
        logits = torch.cat([answer["logits"] for answer in answers])
        predictions = logits.argmax(dim=1).tolist()
        gates = torch.cat([answer["halting_score"] for answer in answers])
        threshold = model.config.threshold
        numbers = range(NUM_STAGES)
        exits = {
            "similarity": [s > 0 and (logits[s] - logits[s - 1]).square().mean().item() < threshold for s in numbers],
            "patience": [s > 0 and predictions[s] == predictions[s - 1] for s in numbers],
            "accumulated_gate": [gates[: s + 1].sum().item() > threshold for s in numbers],
        }[model.config.exit_criterion]
        stages.append(exits.index(True) if True in exits else NUM_STAGES - 1)
    return torch.tensor(stages)


def test_forward_decides_by_what_it_remembers_of_each_image(model):
    images = random_images(12)
    expected = exit_stages_of(model, images)
    assert len(set(expected.tolist())) > 1
    with torch.no_grad():
        outputs = model(images)
        everything = model(images, output_stage_logits=True)
    assert torch.equal(outputs.exit_stage, expected) and torch.equal(everything.exit_stage, expected)
    of_its_stage = torch.stack(everything.stage_logits)[expected, torch.arange(12)]
    torch.testing.assert_close(outputs.logits, of_its_stage)


def test_the_engine_hands_memories_on_with_their_images(model):
    images = random_images(12)
    results = list(AdaptiveEngine(model, batch_size=5, in_order=False)(images))
    stages = {result.index: result.exit_stage for result in results}
    assert [stages[index] for index in range(12)] == exit_stages_of(model, images).tolist()


def test_compiled_stages(model):
    images = random_images(12)
    model.compile_stages([4], backend="eager")
    with torch.no_grad():
        assert torch.equal(model(images).exit_stage, exit_stages_of(model, images))


def test_one_pass_gives_the_scores_of_every_stage(model):
    images = random_images(12)
    batches = [{"pixel_values": images[:7]}, {"pixel_values": images[7:]}]
    measured = measure_stages(model, batches, lambda answer, batch: {}, progress=False)
    assert torch.equal(measured.exit_stages(model.config.threshold), exit_stages_of(model, images))


@pytest.mark.parametrize("model", ["patience"], indirect=True)
def test_exported_programs(model):
    images = random_images(12)
    stages = exit_stages_of(model, images)
    threshold = torch.tensor(model.exit_rule().thresholds)
    state, rows = {"pixel_values": images}, torch.arange(12)
    for stage, program in enumerate(export_stages(model)):
        outputs = program.module()(state, threshold)
        assert torch.equal(outputs["exits"], stages[rows] == stage)
        state = {name: tensor[~outputs["exits"]] for name, tensor in outputs["state"].items()}
        rows = rows[~outputs["exits"]]
        if len(rows) < 2:
            break
    adaptive = export_adaptive(model).module()
    found = [adaptive(image, threshold)["exit_stage"].item() for image in images.split(1)]
    assert found == stages.tolist()


@pytest.mark.parametrize("model", ["accumulated_gate"], indirect=True)
@pytest.mark.skipif(not is_onnx_available(), reason="needs onnx")
def test_onnx_files(model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    images = random_images(12)
    session = onnxruntime.InferenceSession(export_onnx(model, tmp_path).adaptive)
    threshold = torch.tensor(model.exit_rule().thresholds).numpy()
    names = [output.name for output in session.get_outputs()]
    found = [
        dict(zip(names, session.run(None, {"pixel_values": image.numpy(), "threshold": threshold})))["exit_stage"]
        for image in images.split(1)
    ]
    assert [stage.item() for stage in found] == exit_stages_of(model, images).tolist()


def test_a_differing_answer_starts_patience_anew():
    """The shipped rule counts equal answers in a row, of each image for itself; a broken one passes no τ."""
    predictions = torch.tensor([[0, 0, 1, 1, 1], [2, 1, 2, 2, 1], [1, 1, 1, 1, 1]])
    rule = ThinkingViTForImageClassification(
        tiny_config(thinking_stages=[1, 1, 1, 2, 4], exit_criterion="patience", threshold=2)
    ).exit_rule()
    memory, counts = {}, []
    for stage in range(5):
        verdict = rule.judge(stage, {"logits": torch.eye(3)[predictions[:, stage]]}, memory)
        memory, counts = verdict.memory, [*counts, verdict.score]
    assert torch.stack(counts, dim=1).tolist() == [[1, 2, 1, 2, 3], [1, 1, 1, 2, 1], [1, 2, 3, 4, 5]]
    broken = rule.judge(3, {"logits": torch.full((3, 3), torch.nan)}, memory)
    assert broken.score.isnan().all() and not broken.exits.any()


def test_a_memory_does_not_reach_the_model(model):
    seen = []
    recycle = model.recycle
    model.recycle = lambda stage, state, **kwargs: seen.append(set(state)) or recycle(stage, state, **kwargs)
    with torch.no_grad():
        model(random_images(12))
    assert seen and not any(name.startswith("_") for names in seen for name in names)


@pytest.mark.parametrize("name", ["q_exit", "act", "pondernet", "patience"])
@pytest.mark.parametrize("broken", [[torch.nan] * 3, [torch.inf, 0.0, 0.0], [-torch.inf] * 3])
def test_a_broken_answer_with_a_valid_score_goes_on(name, broken):
    """Criteria that judge something else than the logits, such as a learned halting score, are no way out for it."""
    answer = {"logits": torch.tensor([[1.0, 2.0, 3.0], broken]), "halting_score": torch.ones(2)}
    rule = ExitRule(name, (0.0,) if not EXIT_CRITERIA[name].exits_below else (9.0,), 10)
    memory = rule.first_memory(2, torch.Generator().manual_seed(0) if rule.draws else None)
    if name == "patience":  # the answer before was the same class
        memory = rule.judge(0, answer, memory).memory
    verdict = rule.judge(0, answer, memory)
    assert verdict.exits.tolist() == [True, False]
    assert verdict.score[1].isnan() and verdict.entropy[1].isnan()
