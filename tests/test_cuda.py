"""Every family on an NVIDIA GPU, against the same model on the CPU. Skipped where there is none."""

import copy

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_thinkingvit import AViTConfig, AViTForImageClassification, ThinkingViTConfig
from hf_thinkingvit.inference import AdaptiveEngine
from hf_thinkingvit.models.configuration_staged import thinks_in_stages
from hf_thinkingvit.models.token_packing import variable_length_kernel
from tests.fixtures.make_saved_models import MODELS, SAVED_MODELS
from tests.models.segmentation_models import lively_segmenter, spread_threshold
from tests.utils import lively, lively_model, middle_threshold, random_images


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8, "num_labels": 7}


def pruned():
    config = ThinkingViTConfig(thinking_stages=[1, 4], pruning_layers=[1, 2], pruning_keep_rate=0.7, **SIZES)
    model = lively_model(config)
    model.config.threshold = middle_threshold(model, random_images(8))
    return model


def segmenter():
    model = lively_segmenter(exit_criterion="mean_grid_entropy")
    model.config.threshold = spread_threshold(model, random_images(8))
    return model


MORE_MODELS = {"pruned": pruned, "segmenter": segmenter}
NAMES = [*MODELS, *MORE_MODELS]
STAGED = [name for name in NAMES if name not in ("avit", "elastic_vit")]
INTEGERS = ("exit_stage", "macs", "kept_tokens")


def build(name: str, **kwargs):
    if name in MORE_MODELS:
        return MORE_MODELS[name]()
    return AutoModelForImageClassification.from_pretrained(SAVED_MODELS / name, **kwargs).eval()


@pytest.fixture(autouse=True)
def without_tf32():
    """TF32 convolutions, which are on by default, round to ten bits."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_float32_equals_the_cpu(name):
    model, images = build(name), random_images(8)
    expected, outputs = model(images), model.cuda()(images.cuda())
    for field, value in expected.items():
        if field in INTEGERS and isinstance(value, torch.Tensor):
            assert torch.equal(outputs[field].cpu(), value), field
        elif isinstance(value, torch.Tensor):
            torch.testing.assert_close(outputs[field].cpu(), value, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_near_the_cpu(name, dtype):
    """Every image and token goes through every stage, as rounding may turn a decision."""
    model, images = build(name), random_images(8)
    everything = {"threshold": 0.0} if name in STAGED else {}
    if name == "pruned":
        everything["keep_rate"] = 1.0
    if name == "avit":
        model.config.gate_center = 1e4  # no token halts
    expected = model(images, **everything).logits
    logits = model.to("cuda", dtype)(images.to("cuda", dtype), **everything).logits
    assert logits.dtype == dtype
    scale = expected.abs().max()
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    torch.testing.assert_close(logits.float().cpu() / scale, expected / scale, rtol=0, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("name", NAMES)
def test_attention_implementations_agree(name, implementation):
    model, images = build(name), random_images(8)
    expected = model(images)
    try:
        model.set_attn_implementation(implementation)
    except ValueError as error:
        pytest.skip(str(error))
    outputs = model.cuda()(images.cuda())
    torch.testing.assert_close(outputs.logits.cpu(), expected.logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_engine_equals_forward(name):
    model, images = build(name).cuda(), random_images(21)
    # One at a time, so that the results cannot depend on how the engine forms batches.
    expected = [model(image[None].cuda()) for image in images]
    results = list(AdaptiveEngine(model, batch_size=4)(images))
    for result, outputs in zip(results, expected, strict=True):
        torch.testing.assert_close(result.logits, outputs.logits[0].cpu(), rtol=1e-4, atol=1e-4)
        if thinks_in_stages(model.config):
            assert result.exit_stage == outputs.exit_stage.item()


@torch.no_grad()
@pytest.mark.parametrize("name", STAGED)
def test_cuda_graphs_of_stages_equal_forward(name):
    model, images = build(name).cuda(), random_images(11).cuda()
    expected = model(images)
    model.compile_stages([4, 8], mode="reduce-overhead")
    for _ in range(3):  # warm-up, capture, replay
        outputs = model(images)
        torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(outputs.exit_stage, expected.exit_stage)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_those_of_the_cpu(name):
    model, images = build(name).train(), random_images(8)
    shape = (8, 32, 32) if name == "segmenter" else (8,)
    labels = torch.randint(0, model.config.num_labels, shape)
    if name in ("pruned", "early_exit_vit"):
        pytest.skip("training draws random numbers, which differ between devices")
    twin = copy.deepcopy(model).cuda()
    losses = [model(images, labels=labels).loss, twin(images.cuda(), labels=labels.cuda()).loss]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1].cpu(), losses[0], rtol=1e-4, atol=1e-4)
    for (parameter_name, ours), theirs in zip(model.named_parameters(), twin.parameters()):
        if ours.grad is not None:
            scale = ours.grad.abs().max().clamp(min=1e-3)
            torch.testing.assert_close(
                theirs.grad.cpu() / scale,
                ours.grad / scale,
                rtol=0,
                atol=1e-3,
                msg=lambda text, name=parameter_name: f"{name}: {text}",
            )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_training_under_autocast_is_finite(name, dtype):
    model, images = build(name).train().cuda(), random_images(8).cuda()
    shape = (8, 32, 32) if name == "segmenter" else (8,)
    labels = torch.randint(0, model.config.num_labels, shape, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        loss = model(images, labels=labels).loss
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_avit_packs_ragged_images_by_the_variable_length_kernel(dtype):
    if variable_length_kernel() is None:
        pytest.skip("this version of torch lacks varlen_attn with `scale`")
    model = lively(AViTForImageClassification, AViTConfig(num_attention_heads=4, **SIZES, gate_center=1.0))
    images = random_images(8)
    outputs = model.to("cuda", dtype)(images.to("cuda", dtype), output_token_depth=True)
    assert outputs.token_depth.unique().numel() > 1
    # The same decisions and the same dtype on the CPU: only the attention kernel differs.
    expected = model.to("cpu")(images.to(dtype), output_token_depth=True)
    same = (outputs.token_depth.cpu() == expected.token_depth).float().mean()
    assert same > 0.8
