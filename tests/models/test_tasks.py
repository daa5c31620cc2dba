"""A second task, with dense answers, works unchanged in forward, engine, sweep, export and compiled stages."""

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F
from transformers.utils import ModelOutput, is_onnx_available

from hf_thinkingvit import EXIT_CRITERIA, ExitCriterion
from hf_thinkingvit.evaluation.stages import measure_stages
from hf_thinkingvit.inference import AdaptiveEngine
from hf_thinkingvit.inference.export import export_adaptive, export_onnx, export_stages
from hf_thinkingvit.models.exit_scores import entropy
from hf_thinkingvit.models.modeling_thinkingvit import ThinkingViTModel, ThinkingViTPreTrainedModel
from hf_thinkingvit.models.nested_layers import NestedLinear
from hf_thinkingvit.models.staged_arguments import resolve_stages
from hf_thinkingvit.models.staged_loop import StagedModelMixin, run_stages
from hf_thinkingvit.models.tasks import Task
from tests.utils import lively, random_images, tiny_config


NUM_CLASSES, GRID = 5, (4, 4)


def mean_pixel_entropy(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    return entropy(logits.flatten(2).transpose(1, 2)).mean(dim=1)


@dataclass
class DenseOutput(ModelOutput):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    prediction: torch.Tensor | None = None
    exit_stage: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


class DenseTask(Task):
    """A class for each patch: logits `(images, classes, rows, columns)`, and the predicted classes."""

    reads_all_tokens = True

    def answer(self, stage_index, state):
        patches = state["tokens"][:, self.config.num_prefix_tokens :]
        logits = self.head(patches).transpose(1, 2).unflatten(2, GRID)
        return {"logits": logits, "prediction": logits.argmax(dim=1)}

    def answer_loss(self, labels, answer, **kwargs):
        return F.cross_entropy(answer["logits"], labels)


class ThinkingViTForDensePrediction(DenseTask, StagedModelMixin, ThinkingViTPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.thinkingvit = ThinkingViTModel(config)
        self.head = NestedLinear(config.hidden_size, NUM_CLASSES)
        self.post_init()

    def forward(self, pixel_values, labels=None, threshold=None, run_all=False):
        stages = resolve_stages(self.config.num_stages)
        run = run_stages(self, self.exit_rule(threshold), stages, pixel_values, run_all=run_all)
        loss = None if labels is None else self.run_loss(labels, run)
        return DenseOutput(loss=loss, exit_stage=run.exit_stage, **run.accepted), run


@pytest.fixture(autouse=True)
def dense_criterion(monkeypatch):
    criterion = ExitCriterion(mean_pixel_entropy, True, lambda num_labels, top_k: 10.0, "", 0.0, is_entropy=True)
    monkeypatch.setitem(EXIT_CRITERIA, "mean_pixel_entropy", criterion)


@pytest.fixture
def model(dense_criterion):
    config = tiny_config(exit_criterion="mean_pixel_entropy", threshold=[0.0, 0.0], num_hidden_layers=1)
    model = lively(ThinkingViTForDensePrediction, config)
    with torch.no_grad():
        _, run = model(random_images(8), run_all=True)
    # Halfway between two images' scores at each exit, so that some exit there and rounding does not matter.
    orders = [step.score.sort().values for step in run.steps[:2]]
    model.config.threshold = [((order[2] + order[3]) / 2).item() for order in orders]
    return model


@torch.no_grad()
def answers_of(model, images):
    """Each image's accepted stage and answer, found image by image after running every stage."""
    _, run = model(images, run_all=True)
    scores = torch.stack([step.score for step in run.steps], dim=1)
    exits = scores < torch.tensor([*model.config.threshold, torch.inf])
    stages = exits.int().argmax(dim=1)
    answers = [
        {name: run.steps[stage].answer[name][image] for name in ("logits", "prediction", "entropy")}
        for image, stage in enumerate(stages.tolist())
    ]
    return stages, {name: torch.stack([answer[name] for answer in answers]) for name in answers[0]}


def test_each_image_has_the_answer_of_its_own_exit(model):
    images = random_images(8)
    stages, expected = answers_of(model, images)
    assert set(stages.tolist()) == {0, 1, 2}
    with torch.no_grad():
        outputs, run = model(images)
    assert torch.equal(outputs.exit_stage, stages)
    assert outputs.logits.shape == (8, NUM_CLASSES, *GRID)
    for name, tensor in expected.items():
        torch.testing.assert_close(outputs[name], tensor)
    assert [len(step.exits) for step in run.steps] == [8, int((stages > 0).sum()), int((stages > 1).sum())]


def test_training_weighs_the_loss_of_every_stage(model):
    model.train()
    labels = torch.randint(NUM_CLASSES, (8, *GRID), generator=torch.Generator().manual_seed(1))
    outputs, run = model(random_images(8), labels)
    losses = [F.cross_entropy(step.answer["logits"], labels) for step in run.steps]
    torch.testing.assert_close(outputs.loss, sum(losses) / 3)
    outputs.loss.backward()
    assert all(recycler.alpha.grad.abs() > 0 for recycler in model.thinkingvit.recyclers)


def test_the_engine_returns_dense_answers(model):
    images = random_images(8)
    stages, expected = answers_of(model, images)
    engine = AdaptiveEngine(model, batch_size=3)
    results = list(engine(images))
    assert [result.exit_stage for result in results] == stages.tolist()
    for name, tensor in expected.items():
        got = [result.others[name] if name in result.others else getattr(result, name) for result in results]
        torch.testing.assert_close(torch.stack([torch.as_tensor(entry) for entry in got]), tensor)
    assert results[0].others["prediction"].dtype == torch.int64


def test_compiled_stages_give_the_same(model):
    images = random_images(8)
    with torch.no_grad():
        expected, _ = model(images)
        model.compile_stages([4], backend="eager")
        outputs, _ = model(images)
    assert torch.equal(outputs.exit_stage, expected.exit_stage)
    torch.testing.assert_close(outputs.logits, expected.logits)


def test_one_pass_measures_every_stage(model):
    images = random_images(8)
    truth = torch.randint(NUM_CLASSES, (8, *GRID), generator=torch.Generator().manual_seed(1))
    batches = [
        {"pixel_values": images[rows], "labels": truth[rows]} for rows in (slice(0, 3), slice(3, 6), slice(6, 8))
    ]

    def accuracy(answer, batch):
        return {"accuracy": (answer["prediction"] == batch["labels"]).float().mean(dim=(1, 2))}

    measured = measure_stages(model, batches, accuracy, progress=False)
    with torch.no_grad():
        _, run = model(images, run_all=True)
        accepted, _ = model(images)
    expected = [(step.answer["prediction"] == truth).float().mean(dim=(1, 2)) for step in run.steps]
    torch.testing.assert_close(measured.measures["accuracy"], torch.stack(expected, dim=1))
    torch.testing.assert_close(measured.scores, torch.stack([step.score for step in run.steps], dim=1))
    assert torch.equal(measured.exit_stages(model.config.threshold), accepted.exit_stage)
    of_accepted = (accepted.prediction == truth).float().mean(dim=(1, 2))
    torch.testing.assert_close(measured.measures_at(model.config.threshold)["accuracy"], of_accepted)
    assert measured.image_size == (32, 32)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float64])
def test_measurements_lose_nothing(model, dtype):
    values = torch.tensor([2**24 + 1, 3]).to(dtype)
    batches = [{"pixel_values": random_images(2)}]
    measured = measure_stages(model, batches, lambda answer, batch: {"value": values}, progress=False)
    assert torch.equal(measured.measures["value"][:, 0].to(dtype), values)


def test_exported_programs_give_the_same(model):
    images = random_images(8)
    stages, expected = answers_of(model, images)
    threshold = torch.tensor(model.config.threshold)
    state = {"pixel_values": images}
    rows = torch.arange(8)
    for stage, program in enumerate(export_stages(model)):
        outputs = program.module()(state, threshold)
        assert torch.equal(outputs["exits"], stages[rows] == stage)
        chosen = outputs["exits"]
        torch.testing.assert_close(outputs["logits"][chosen], expected["logits"][rows[chosen]])
        state = {name: tensor[~chosen] for name, tensor in outputs["state"].items()}
        rows = rows[~chosen]
    adaptive = export_adaptive(model).module()
    for image in range(8):
        outputs = adaptive(images[image : image + 1], threshold)
        assert outputs["exit_stage"].item() == stages[image]
        for name, tensor in expected.items():
            torch.testing.assert_close(outputs[name][0], tensor[image])


@pytest.mark.skipif(not is_onnx_available(), reason="needs onnx")
def test_onnx_files_give_the_same(model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    images = random_images(8)
    stages, expected = answers_of(model, images)
    files = export_onnx(model, tmp_path)
    threshold = torch.tensor(model.config.threshold).numpy()
    session = onnxruntime.InferenceSession(files.adaptive)
    assert [output.name for output in session.get_outputs()] == ["logits", "prediction", "exit_stage", "entropy"]
    for image in range(8):
        logits, _, exit_stage, _ = session.run(
            None, {"pixel_values": images[image : image + 1].numpy(), "threshold": threshold}
        )
        assert exit_stage.item() == stages[image]
        torch.testing.assert_close(torch.from_numpy(logits[0]), expected["logits"][image], atol=1e-4, rtol=0)


class TestMergedAnswers:
    """A task whose accepted answer is the mean of the stages so far: the same wherever stages are run."""

    @pytest.fixture
    def model(self, model):
        class Averaging(ThinkingViTForDensePrediction):
            merges_answers = True

            def answer(self, stage_index, state):
                return {
                    "logits": super().answer(stage_index, state)["logits"],
                    "count": torch.ones(len(state["tokens"])),
                }

            def merge_answers(self, accepted, answer):
                count = accepted["count"] + 1
                share = 1 / count[:, None, None, None]
                return {"logits": accepted["logits"] * (1 - share) + answer["logits"] * share, "count": count}

        model.__class__ = Averaging
        return model

    @staticmethod
    def expected(model, images, stage):
        with torch.no_grad():
            state, sums = model.begin(images), 0
            for index in range(stage + 1):
                state = model.recycle(index - 1, state) if index else state
                state = model.run_stage(index, state)
                sums = sums + model.answer(index, state)["logits"]
        return sums / (stage + 1)

    @torch.no_grad()
    def test_forward(self, model):
        images = random_images(8)
        rule, stages = model.exit_rule(), range(3)
        some = run_stages(model, rule, stages, images)
        everything = run_stages(model, rule, stages, images, run_all=True)
        assert len(set(some.exit_stage.tolist())) > 1
        assert torch.equal(some.exit_stage, everything.exit_stage)
        for run in (some, everything):
            for image, stage in enumerate(run.exit_stage.tolist()):
                expected = self.expected(model, images[image : image + 1], stage)[0]
                torch.testing.assert_close(run.accepted["logits"][image], expected, atol=1e-5, rtol=1e-5)
        never = run_stages(model, model.exit_rule(0.0), stages, images)
        torch.testing.assert_close(never.accepted["logits"], self.expected(model, images, 2), atol=1e-5, rtol=1e-5)

    def test_engine(self, model):
        images = random_images(8)
        for image, result in zip(images, AdaptiveEngine(model, batch_size=3)(images)):
            expected = self.expected(model, image[None], result.exit_stage)[0]
            torch.testing.assert_close(result.logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("criterion", ["topk_entropy", "entropy", "max_probability"])
def test_a_criterion_for_another_task_is_refused(model, criterion):
    model.config.exit_criterion = criterion
    model.config.threshold = 0.5
    with pytest.raises(ValueError, match="must give one score and one entropy per image.*not made for this task"):
        model(random_images(2))


def test_large_answers_reach_the_host_for_exiting_images_alone(model, monkeypatch):
    images = random_images(8)
    stages, expected = answers_of(model, images)
    monkeypatch.setattr("hf_thinkingvit.inference.engine.SMALL_ANSWER", 8)
    results = list(AdaptiveEngine(model, batch_size=8)(images))
    assert [result.exit_stage for result in results] == stages.tolist()
    torch.testing.assert_close(torch.stack([result.logits for result in results]), expected["logits"])


def test_names_of_the_loop_are_refused_in_a_state(model):
    run_stage = type(model).run_stage
    model.run_stage = lambda *args, **kwargs: {**run_stage(model, *args, **kwargs), "_memory.mine": torch.zeros(2)}
    with torch.no_grad(), pytest.raises(ValueError, match="_memory.mine"):
        model(random_images(2))
