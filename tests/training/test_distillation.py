import pytest
import torch
from torch.nn import functional as F

from hf_thinkingvit.training import DistillationLoss, teacher_loss
from tests.models.test_modeling_avit import lively_avit
from tests.models.test_vit_weights import trained_vit
from tests.utils import random_images


def teacher(num_labels: int = 3):
    return trained_vit(id2label={index: str(index) for index in range(num_labels)})


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_each_head_learns_from_its_own_source(kind):
    student, images, labels = lively_avit(distilled=True, num_labels=3).train(), random_images(), torch.arange(6) % 3
    loss = DistillationLoss(teacher(), kind=kind, weight=0.25, temperature=2.0)
    outputs = student(images, labels=labels)
    total = loss(outputs, images, labels)
    teacher_logits = loss.teacher(images)
    if kind == "hard":
        from_teacher = F.cross_entropy(outputs.distillation_logits, teacher_logits.argmax(-1))
    else:
        p, q = (teacher_logits / 2).softmax(-1), (outputs.distillation_logits / 2).softmax(-1)
        from_teacher = (p * (p / q).log()).sum(-1).mean() * 4
    weights = student.config.ponder_loss_weight, student.config.prior_loss_weight
    expected = 0.75 * F.cross_entropy(outputs.cls_logits, labels) + 0.25 * from_teacher
    expected = expected + weights[0] * outputs.ponder_loss + weights[1] * outputs.prior_loss
    torch.testing.assert_close(total, expected)
    total.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in loss.teacher.parameters())


def test_soft_loss_of_the_teachers_own_answer_is_zero():
    logits = torch.randn(4, 5)
    assert teacher_loss(logits, logits, "soft", temperature=3.0).item() == pytest.approx(0.0, abs=1e-6)


def test_the_teacher_stays_in_evaluation_mode():
    loss = DistillationLoss(teacher().train())
    assert not loss.train().teacher.model.training


def test_refusals():
    images, labels = random_images(), torch.arange(6) % 3
    with pytest.raises(ValueError, match="`kind`"):
        DistillationLoss(teacher(), kind="warm")
    with pytest.raises(ValueError, match="`weight`"):
        DistillationLoss(teacher(), weight=2.0)
    plain = lively_avit(num_labels=3).train()(images, labels=labels)
    with pytest.raises(ValueError, match="must be of a distilled model"):
        DistillationLoss(teacher())(plain, images, labels)
    distilled = lively_avit(distilled=True, num_labels=3).train()(images, labels=labels)
    with pytest.raises(ValueError, match="teacher has 5 labels, the student 3"):
        DistillationLoss(teacher(5))(distilled, images, labels)
