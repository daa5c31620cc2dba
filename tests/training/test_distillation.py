import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import BitImageProcessorPil, ViTImageProcessorPil

from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.training import DistillationLoss, Teacher, teacher_loss
from hf_thinkingvit.training.distillation import load_teacher
from tests.models.test_modeling_avit import lively_avit
from tests.models.test_weights_from_vit import trained_vit
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


OWN = {"image_mean": [0.1, 0.5, 0.9], "image_std": [0.2, 0.5, 1.5]}
STUDENT = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "image_size": 32}


def photo(size: int) -> Image.Image:
    """A smooth image, for which different resizing methods agree."""
    small = np.random.default_rng(0).integers(60, 200, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def student_batch(image: Image.Image) -> torch.Tensor:
    settings = {"image_mean": STUDENT["image_mean"], "image_std": STUDENT["image_std"]}
    return evaluation_image_processor(32, 1.0, **settings)(image, return_tensors="pt")["pixel_values"]


class TestPixelsOfTheTeacher:
    @pytest.mark.parametrize(
        "processor",
        [
            ViTImageProcessorPil(size={"height": 32, "width": 32}, **OWN),
            ViTImageProcessorPil(size={"height": 32, "width": 32}, do_normalize=False),
            ViTImageProcessorPil(size={"height": 32, "width": 32}, rescale_factor=1 / 127.5, **OWN),
        ],
    )
    def test_are_those_of_its_own_processor(self, processor):
        seen = Teacher(teacher(), processor, **STUDENT).preprocess(student_batch(photo(32)))
        expected = processor(photo(32), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(seen, torch.as_tensor(expected), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("size", [16, 48])
    @pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
    def test_have_its_size(self, size, resample):
        processor = ViTImageProcessorPil(size={"height": size, "width": size}, resample=resample, **OWN)
        seen = Teacher(teacher(), processor, **STUDENT).preprocess(student_batch(photo(32)))
        expected = torch.as_tensor(processor(photo(32), return_tensors="pt")["pixel_values"])
        # The processor rounds resized pixels to whole numbers.
        torch.testing.assert_close(seen, expected, atol=1.1 / 255 / min(OWN["image_std"]), rtol=0)

    def test_are_not_cropped_again(self):
        """As in DeiT's evaluation, the shorter side is resized to 36 and the central 32 pixels are used."""
        processor = BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}, **OWN)
        seen = Teacher(teacher(), processor, **STUDENT).preprocess(student_batch(photo(32)))
        whole = BitImageProcessorPil(do_resize=False, crop_size={"height": 32, "width": 32}, **OWN)
        expected = torch.as_tensor(whole(photo(32), return_tensors="pt")["pixel_values"])
        torch.testing.assert_close(seen, expected, atol=1e-5, rtol=0)

    def test_decide_its_answer(self):
        model, processor = teacher(), ViTImageProcessorPil(size={"height": 32, "width": 32}, **OWN)
        expected = model(torch.as_tensor(processor(photo(32), return_tensors="pt")["pixel_values"])).logits
        given = Teacher(model, processor, **STUDENT)(student_batch(photo(32)))
        torch.testing.assert_close(given, expected, atol=1e-4, rtol=0)
        assert (model(student_batch(photo(32))).logits - expected).abs().max() > 1e-2
        assert not given.requires_grad

    def test_need_the_students_normalisation(self):
        with pytest.raises(ValueError, match="needs the student's `image_mean`"):
            Teacher(teacher(), evaluation_image_processor(32))


class TestLabelsOfTheTeacher:
    def test_are_put_into_the_students_order(self):
        model, images = trained_vit(), random_images()  # cat, dog, owl
        reordered = Teacher(model, id2label={0: "owl", 1: "Cat", 2: "dog"})
        assert torch.equal(reordered(images), model(images).logits[:, [2, 0, 1]])
        same = Teacher(model, id2label={0: "cat", 1: "dog", 2: "owl"})
        assert torch.equal(same(images), model(images).logits)

    def test_must_be_the_students(self):
        others = {0: "cat", 1: "hound", 2: "owl"}
        with pytest.raises(ValueError, match=r"1 is 'dog' there and 'hound' here.*`label_map` \"index\""):
            Teacher(trained_vit(), id2label=others)
        assert Teacher(trained_vit(), id2label=others, label_map="index").by_number
        with pytest.raises(ValueError, match="teacher has 3 labels, the student 2"):
            Teacher(trained_vit(), id2label={0: "cat", 1: "dog"})

    def test_numbers_are_not_its_named_classes(self):
        """A teacher with named classes does not fit data whose labels are named "0", "1", ..."""
        digits = {index: str(index) for index in range(3)}
        with pytest.raises(ValueError, match="0 is 'cat' there and '0' here"):
            Teacher(trained_vit(), id2label=digits)
        assert Teacher(trained_vit(), id2label=digits, label_map="index").by_number

    def test_a_run_says_what_it_makes_of_them(self, tmp_path):
        pytest.importorskip("timm")
        from hf_thinkingvit.training import TrainingConfig

        trained_vit().save_pretrained(tmp_path)
        config = TrainingConfig(teacher=str(tmp_path), image_mean=[0.5] * 3, image_std=[0.5] * 3)
        labels = {0: "dog", 1: "cat", 2: "owl"}
        student = lively_avit(num_labels=3, id2label=labels, label2id={name: i for i, name in labels.items()}).config
        with pytest.raises(ValueError, match="has no image processor"):
            load_teacher(config, student, torch.device("cpu"), print)
        evaluation_image_processor(32).save_pretrained(tmp_path)
        said: list[str] = []
        found = load_teacher(config, student, torch.device("cpu"), said.append)
        assert found.order.tolist() == [1, 0, 2]
        assert "another order" in said[0]
        pixels = torch.rand(2, 3, 32, 32)
        mean, std = (torch.tensor(STUDENT[name])[:, None, None] for name in ("image_mean", "image_std"))
        torch.testing.assert_close(found.preprocess((pixels - 0.5) / 0.5), (pixels - mean) / std, atol=1e-5, rtol=0)
