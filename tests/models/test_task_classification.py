"""Checks of labels, the loss of every problem type, and warnings for losses computed outside the model."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from hf_thinkingvit.models.task_classification import classification_loss, share_of_batch
from hf_thinkingvit.models.tasks import weights_of_stages
from tests.models.test_modeling_avit import lively_avit
from tests.utils import lively_model, lively_swin, middle_threshold, random_images, tiny_config


LABELS = torch.tensor([3, 0, 11, 5, 7, 1])
TARGETS = (torch.arange(72).view(6, 12) % 5 == 0).float()
FAMILIES = {"thinkingvit": lively_model, "thinking_swin": lively_swin, "avit": lively_avit}
MULTI_LABEL = {"problem_type": "multi_label_classification"}


class TestClassificationLoss:
    logits = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))

    def test_cross_entropy_with_smoothing_and_ignored_images(self):
        labels = LABELS.clone()
        labels[1] = labels[4] = -100
        loss = classification_loss(labels, self.logits, tiny_config(), label_smoothing=0.1)
        torch.testing.assert_close(loss, F.cross_entropy(self.logits, labels, label_smoothing=0.1))

    def test_binary_cross_entropy_ignores_unknown_labels(self):
        targets = TARGETS.clone()
        targets[0, 3:] = -100
        known = targets != -100
        expected = F.binary_cross_entropy_with_logits(self.logits[known], targets[known])
        torch.testing.assert_close(classification_loss(targets, self.logits, tiny_config(**MULTI_LABEL)), expected)

    @pytest.mark.parametrize("shape", [(6,), (6, 1)])
    def test_squared_error_of_one_output(self, shape):
        loss = classification_loss(torch.arange(6.0).view(shape), self.logits[:, :1], tiny_config(num_labels=1))
        torch.testing.assert_close(loss, F.mse_loss(self.logits[:, 0], torch.arange(6.0)))

    def test_nothing_to_learn_is_a_loss_of_zero(self):
        logits = self.logits.clone().requires_grad_()
        loss = classification_loss(torch.full((6,), -100), logits, tiny_config(), num_items_in_batch=0)
        loss.backward()
        assert loss.item() == 0.0 and not logits.grad.any()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("labels", [LABELS, TARGETS, TARGETS.double()], ids=["single", "multi", "float64"])
    def test_float32_scalar_of_half_precision(self, labels, dtype):
        config = tiny_config(**(MULTI_LABEL if labels.is_floating_point() else {}))
        logits = self.logits.to(dtype).requires_grad_()
        loss = classification_loss(labels, logits, config, num_items_in_batch=torch.tensor([[24]]))
        assert loss.shape == () and loss.dtype == torch.float32 and loss.requires_grad
        expected = classification_loss(labels, logits.float(), config, num_items_in_batch=24)
        torch.testing.assert_close(loss, expected)

    def test_smoothing_needs_classes(self):
        with pytest.raises(ValueError, match="`label_smoothing` is of single-label classification, got 0.1"):
            classification_loss(TARGETS, self.logits, tiny_config(**MULTI_LABEL), label_smoothing=0.1)

    def test_leaves_the_configuration_as_it_is(self):
        config = tiny_config()
        classification_loss(LABELS, self.logits, config)
        assert config.problem_type is None

    @pytest.mark.parametrize("items", [12, torch.tensor(12), torch.tensor([[12.0]])])
    def test_share_of_a_part(self, items):
        labels = LABELS.clone()
        labels[:3] = -100
        assert float(share_of_batch(labels, items)) == 0.25
        assert share_of_batch(labels, None) == 1.0


@pytest.mark.parametrize("family", FAMILIES)
class TestModels:
    def test_smoothing_in_training_only(self, family):
        model = FAMILIES[family](label_smoothing=0.2)
        outputs = model.train()(random_images(), labels=LABELS)
        answers = outputs.get("stage_logits") or [outputs.logits]
        losses = [F.cross_entropy(logits, LABELS, label_smoothing=0.2) for logits in answers]
        loss = outputs.loss if family != "avit" else outputs.task_loss
        torch.testing.assert_close(loss, sum(losses) / len(losses))
        outputs = model.eval()(random_images(), labels=LABELS)
        torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, LABELS))

    @pytest.mark.parametrize("value", [1.0, -0.1, 1.5, "0.1", float("nan")])
    def test_refuses_smoothing_that_cannot_work(self, family, value):
        with pytest.raises(ValueError, match="`label_smoothing`"):
            FAMILIES[family](label_smoothing=value)

    @pytest.mark.parametrize("fields", [MULTI_LABEL, {"num_labels": 1}, {"problem_type": "regression"}])
    def test_refuses_smoothing_without_classes(self, family, fields):
        with pytest.raises(ValueError, match="`label_smoothing` is of single-label classification"):
            FAMILIES[family](label_smoothing=0.1, **fields)

    def test_a_loss_function_of_ones_own(self, family):
        model = FAMILIES[family]().train()
        model.loss_function = lambda labels, logits, config, **kwargs: logits.square().mean()
        outputs = model(random_images(), labels=LABELS)
        answers = outputs.get("stage_logits") or [outputs.logits]
        loss = outputs.loss if family != "avit" else outputs.task_loss
        torch.testing.assert_close(loss, sum(logits.square().mean() for logits in answers) / len(answers))

    def test_copies_and_pickles_with_its_loss(self, family):
        model = FAMILIES[family](label_smoothing=0.1).train()
        expected = model(random_images(), labels=LABELS).loss
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(random_images(), labels=LABELS).loss, expected)

    def test_float32_under_autocast(self, family):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = FAMILIES[family]().train()(random_images(), labels=LABELS).loss
        assert loss.dtype == torch.float32 and loss.shape == () and loss.requires_grad

    @pytest.mark.parametrize(
        "fields, labels, message",
        [
            ({}, torch.zeros(6, dtype=torch.float64), r"must have the shape \(6, 12\)"),
            ({}, LABELS.int(), r"class indices \(torch.long\) or of float targets, got torch.int32"),
            ({}, F.one_hot(LABELS, 12), r"must have the shape \(6,\) for single_label.*got \(6, 12\) of torch.int64"),
            ({"problem_type": "single_label_classification"}, LABELS.float(), "must be class indices.*float32"),
            (MULTI_LABEL, TARGETS.long(), "must be floating-point targets for multi_label_classification"),
            (MULTI_LABEL, TARGETS[:, :3], r"must have the shape \(6, 12\) for multi_label"),
            (MULTI_LABEL, TARGETS * 2, r"must lie between 0 and 1, got \[2.0\]"),
            ({"num_labels": 1}, LABELS, "must be floating-point targets for regression, got torch.int64"),
            ({"problem_type": "regression"}, torch.zeros(6), r"must have the shape \(6, 12\) for regression"),
        ],
    )
    @pytest.mark.parametrize("training", [True, False])
    def test_labels_that_do_not_fit(self, family, fields, labels, message, training):
        with pytest.raises(ValueError, match=f"`labels` {message}|`labels`.*{message}"):
            FAMILIES[family](**fields).train(training)(random_images(), labels=labels)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", ["thinkingvit", "thinking_swin"])
def test_multi_label_targets_need_their_criterion(family, training):
    with pytest.raises(ValueError, match='`problem_type` in the config.*"mean_binary_entropy"'):
        FAMILIES[family]().train(training)(random_images(), labels=TARGETS)
    with pytest.raises(ValueError, match="those of single_label_classification, but `exit_criterion`"):
        FAMILIES[family](exit_criterion="mean_binary_entropy").train(training)(random_images(), labels=LABELS)
    outputs = FAMILIES[family](**MULTI_LABEL).train(training)(random_images(), labels=TARGETS)
    assert outputs.loss.isfinite()


class TestStageWeights:
    def test_fewer_stages_keep_the_sum_of_the_weights(self):
        model = lively_model(stage_loss_weights=[0.5, 0.3, 1.2]).train()
        outputs = model(random_images(), labels=LABELS, max_stages=2)
        first, second = (F.cross_entropy(logits, LABELS) for logits in outputs.stage_logits)
        torch.testing.assert_close(outputs.loss, 2.0 * (0.5 * first + 0.3 * second) / 0.8)

    def test_one_stage_of_equal_weights_counts_fully(self):
        model = lively_model().train()
        outputs = model(random_images(), labels=LABELS, max_stages=1)
        torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, LABELS))

    def test_nothing_to_train(self):
        model = lively_model(stage_loss_weights=[0.0, 0.0, 1.0]).train()
        with pytest.raises(ValueError, match=r"`stage_loss_weights` .* weight 0 for all of \[0, 1\]"):
            model(random_images(), labels=LABELS, max_stages=2)
        assert weights_of_stages([0.0, 0.0, 1.0], range(3)) == [0.0, 0.0, 1.0]


class TestPartsOfABatch:
    """Batches that `Trainer` divides, with gradient accumulation and over several processes."""

    def gradients(self, model, *calls, scale=1.0):
        model.zero_grad()
        for images, labels, items in calls:
            loss = model(images, labels=labels, num_items_in_batch=items).loss
            (loss * scale).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    @pytest.mark.parametrize("distilled", [False, True])
    def test_ponder_loss_sums_to_the_whole_batchs(self, distilled):
        model = lively_avit(ponder_loss_weight=1.0, prior_loss_weight=0.0, distilled=distilled).train()
        images, items = random_images(), torch.tensor(6)
        whole = self.gradients(model, (images, LABELS, items))
        parts = self.gradients(model, *((images[i : i + 2], LABELS[i : i + 2], items) for i in (0, 2, 4)))
        for name, gradient in whole.items():
            torch.testing.assert_close(parts[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")

    def test_two_processes(self):
        # `Trainer` counts over both processes and multiplies by their number; DDP takes the mean of their gradients.
        model = lively_avit(ponder_loss_weight=1.0, prior_loss_weight=0.0).train()
        images, items = random_images(), torch.tensor(6)
        whole = self.gradients(model, (images, LABELS, None))
        first = self.gradients(model, (images[:3], LABELS[:3], items), scale=2)
        second = self.gradients(model, (images[3:], LABELS[3:], items), scale=2)
        for name, gradient in whole.items():
            mean = (first[name] + second[name]) / 2
            torch.testing.assert_close(mean, gradient, atol=1e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")

    def test_the_prior_counts_by_the_share_of_its_images(self):
        model = lively_avit().train()
        images, labels = random_images()[:2], LABELS[:2]
        alone = model(images, labels=labels)
        part = model(images, labels=labels, num_items_in_batch=8)
        torch.testing.assert_close(part.prior_loss, alone.prior_loss / 4)
        torch.testing.assert_close(part.ponder_loss, alone.ponder_loss / 4)
        torch.testing.assert_close(part.loss, alone.loss / 4)


@pytest.fixture
def warnings():
    """A function that returns the warnings during a call."""
    logging.warning_once.cache_clear()
    logger = logging.get_logger("hf_thinkingvit.models.module_arguments")

    def during(call) -> str:
        with CaptureLogger(logger) as captured:
            call()
        return captured.out

    return during


class TestOutsideLoss:
    """Warnings for a loss that is computed from the outputs, as by `Trainer(label_smoothing_factor=...)`."""

    @pytest.mark.parametrize("family", ["thinkingvit", "thinking_swin"])
    def test_warns_once_that_only_the_last_stage_is_trained(self, family, warnings):
        model = FAMILIES[family]().train()
        message = warnings(lambda: [model(random_images()) for _ in range(2)])
        assert message.count("trains the last stage only") == 1
        assert "`label_smoothing` in the model's configuration" in message and "output_stage_logits=True" in message

    def test_warns_once_that_nothing_teaches_to_halt(self, warnings):
        model = lively_avit().train()
        message = warnings(lambda: [model(random_images()) for _ in range(2)])
        assert message.count("leaves out the ponder and prior losses") == 1
        assert "output_halting_losses=True" in message

    def test_warns_under_torch_compile_without_a_graph_break(self, warnings):
        model = lively_model(thinking_stages=[4, 4], num_hidden_layers=1).train()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert "trains the last stage only" in warnings(lambda: compiled(random_images()))

    def test_says_nothing_where_nothing_is_lost(self, warnings):
        staged, single, avit = lively_model().train(), lively_model(thinking_stages=[4]).train(), lively_avit().train()
        calls = [
            lambda: staged(random_images(), labels=LABELS),
            lambda: staged(random_images(), output_stage_logits=True),
            lambda: staged(random_images(), max_stages=1),
            lambda: single(random_images()),
            lambda: avit(random_images(), labels=LABELS),
            lambda: avit(random_images(), output_halting_losses=True),
            lambda: lively_model()(random_images()),
            lambda: torch.no_grad()(staged)(random_images()),
        ]
        assert [warnings(call) for call in calls] == [""] * len(calls)

    @pytest.mark.parametrize("training", [True, False])
    def test_avit_gives_what_a_loss_of_ones_own_should_add(self, training):
        model = lively_avit(ponder_loss_weight=0.3, prior_loss_weight=0.7)
        whole = model.train()(random_images(), labels=LABELS)
        outputs = model.train(training)(random_images(), output_halting_losses=True)
        loss = F.cross_entropy(outputs.logits, LABELS) + 0.3 * outputs.ponder_loss + 0.7 * outputs.prior_loss
        torch.testing.assert_close(loss, whole.loss)
        assert model.train()(random_images()).ponder_loss.requires_grad

    def test_evaluation_loss_beside_halting_losses_is_of_the_answers(self):
        outputs = lively_avit()(random_images(), labels=LABELS, output_halting_losses=True)
        torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, LABELS))


def test_multi_label_images_exit_by_their_mean_binary_entropy():
    model, images = lively_model(**MULTI_LABEL), random_images(16)
    threshold = middle_threshold(model, images)
    outputs = model(images, labels=TARGETS.repeat(3, 1)[:16], threshold=threshold)
    assert (outputs.exit_stage == 0).sum() == 8
    probabilities = outputs.logits.double().sigmoid()
    entropies = torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)
    torch.testing.assert_close(outputs.entropy, entropies.mean(1).float())
    assert (outputs.entropy[outputs.exit_stage == 0] < threshold).all()
