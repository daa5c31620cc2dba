"""Set-up of a run: shipped configurations, starting points, frozen parameters, batches."""

import pytest
import torch
import yaml
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForImageClassification,
)

from hf_thinkingvit import ThinkingViTConfig, ThinkingViTForImageClassification
from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.training import TrainingRun, parse_config, train
from hf_thinkingvit.training.starting_point import build_model
from tests.models.test_weights_from_swin import trained_swin
from tests.segmentation_data import CLASSES
from tests.training.test_config import CONFIGS
from tests.training.tiny_runs import LABELS, flags


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Plain models to start from: three heads, one layer, 32 × 32 pixels; a teacher; the data's labels."""
    folder = tmp_path_factory.mktemp("sources")
    fields = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 1, "intermediate_size": 96}
    fields |= {"image_size": 32, "patch_size": 16, "num_labels": 5}  # other labels than the data, like ImageNet's
    ViTForImageClassification(ViTConfig(**fields)).save_pretrained(folder / "vit")
    DeiTForImageClassificationWithTeacher(DeiTConfig(**fields)).save_pretrained(folder / "deit")
    ViTForImageClassification(ViTConfig(**{**fields, "num_labels": 3})).save_pretrained(folder / "teacher")
    evaluation_image_processor(32).save_pretrained(folder / "teacher")
    return folder


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.parent.name == "configs"], ids=lambda path: path.stem
)
def test_shipped_configurations_run(path, images, scenes, sources, tmp_path):
    if yaml.safe_load(path.read_text()).get("task") == "image-segmentation":
        check_shipped_segmentation(path, scenes, sources, tmp_path)
        return
    words = ["--config", str(path), "--output_dir", str(tmp_path), "--dataset", str(images), "--cpu"]
    words += ["--batch_size", "4", "--max_steps", "2", "--num_workers", "0"]
    config = parse_config(words)
    if config.from_pretrained:  # a model of this package, which is its own teacher
        source = sources / path.stem
        stages = [6] if path.stem == "dynamicvit_small_imagenet" else [3, 6]
        sizes = {"thinking_stages": stages, "hidden_size": 24, "image_size": 32, "patch_size": 8, "num_labels": 3}
        ThinkingViTForImageClassification(ThinkingViTConfig(**sizes)).save_pretrained(source)
        evaluation_image_processor(32).save_pretrained(source)
        words += ["--from_pretrained", str(source), "--teacher", str(source), "--label_map", "index"]
    elif config.teacher:
        words += ["--teacher", str(sources / "teacher")]
    if config.from_vit:
        words += ["--from_vit", str(sources / ("deit" if "distilled" in config.from_vit else "vit"))]
    elif not config.from_pretrained:
        with torch.device("meta"):  # full-size models, without memory
            assert build_model(config, dict(enumerate(LABELS))).config.num_labels == 3
    if path.stem == "thinking_swin_s_imagenet":
        words += ["--model.embed_dim", "24", "--model.depths", "1", "1", "1", "1", "--model.image_size", "32"]
    results = train(parse_config(words))
    assert results["step"] == 2
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "last")
    assert model.config.model_type == config.model_type
    assert model.config.num_labels == 3


def check_shipped_segmentation(path, scenes, sources, tmp_path):
    words = ["--config", str(path), "--output_dir", str(tmp_path), "--dataset", str(scenes), "--cpu"]
    words += ["--batch_size", "4", "--max_steps", "1", "--num_workers", "0", "--images_per_epoch", "4"]
    words += ["--label_names", *CLASSES, "--mask_values", "0-2", "--ignored_mask_values", "255"]
    words += ["--image_files", "none", "--mask_files", "none", "--train_split", "train", "--eval_split", "validation"]
    words += ["--test_split", "test", "--model.image_size", "32", "--short_side", "32"]
    config = parse_config(words)
    if config.from_vit:
        words += ["--from_vit", str(sources / "vit")]
    assert train(parse_config(words))["step"] == 1
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "last")
    assert model.config.id2label == dict(enumerate(CLASSES))


def test_starting_points(sources, images, tmp_path):
    """The leading channels of a run that starts from a ViT are the ViT's; a model of this package continues whole."""
    words = flags(images, tmp_path / "a", from_vit=sources / "vit", max_steps=1, **{"model.thinking_stages": "[3, 6]"})
    for name in ("hidden_size", "num_hidden_layers", "image_size", "patch_size"):
        position = words.index(f"--model.{name}")
        del words[position : position + 2]
    run = TrainingRun(parse_config(words))
    vit = ViTForImageClassification.from_pretrained(sources / "vit")
    position = run.accelerator.unwrap_model(run.model).thinkingvit.embeddings.position_embeddings
    assert torch.equal(position[..., :24], vit.vit.embeddings.position_embeddings)
    with pytest.raises(ValueError, match=r"`model.patch_size` is 8, but starting from .* it is 16"):
        TrainingRun(parse_config([*words, "--model.patch_size", "8"]))


def test_starting_from_swin(images, tmp_path):
    swin = trained_swin(image_size=16, patch_size=2)
    swin.save_pretrained(tmp_path / "swin")
    words = ["--dataset", str(images), "--output_dir", str(tmp_path / "run"), "--model_type", "thinking_swin", "--cpu"]
    words += ["--batch_size", "4", "--num_workers", "0", "--from_vit", str(tmp_path / "swin")]
    run = TrainingRun(parse_config([*words, "--model.drop_path_rate", "0.1", "--model.depths", "2", "2"]))
    model = run.accelerator.unwrap_model(run.model)
    assert (model.config.head_rounds, model.config.drop_path_rate) == ([[2, 2], [2, 4]], 0.1)
    weight = model.thinking_swin.embeddings.patch_embeddings.weight
    assert torch.equal(weight, swin.swin.embeddings.patch_embeddings.projection.weight)
    with pytest.raises(ValueError, match=r"`model.mlp_ratio` is 2, but starting from .* it is 4.0"):
        TrainingRun(parse_config([*words, "--model.mlp_ratio", "2"]))


def test_frozen_parameters_stay(images, tmp_path):
    train(parse_config(flags(images, tmp_path, freeze=["*.alpha"])))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "last")
    assert all(parameter.item() == 0 for name, parameter in model.named_parameters() if name.endswith("alpha"))
    with pytest.raises(ValueError, match="no parameter is called '\\*beta'"):
        TrainingRun(parse_config(flags(images, tmp_path / "b", freeze=["*beta"])))


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"batch_size": 9, "gradient_accumulation_steps": 2}, r"`batch_size` \(9\) must be a multiple of 2"),
        ({"batch_size": 64}, r"more than there are images \(24\)"),
        ({"batch_size": 6, "gradient_accumulation_steps": 2, "mixup": 1}, "pair images"),
    ],
)
def test_refuses_batches_that_cannot_be(images, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        TrainingRun(parse_config(flags(images, tmp_path, **overrides)))
