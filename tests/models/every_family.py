"""One small model of every family and head, for tests of what must hold for all of them."""

from collections.abc import Callable

import torch

from hf_thinkingvit import (
    EarlyExitViTConfig,
    EarlyExitViTForImageClassification,
)
from tests.models.segmentation_models import lively_segmenter
from tests.models.test_modeling_avit import lively_avit
from tests.models.test_modeling_elastic_vit import SIZES, lively_elastic
from tests.utils import lively, lively_model, lively_swin, random_images


def lively_exits(**fields) -> EarlyExitViTForImageClassification:
    return lively(EarlyExitViTForImageClassification, EarlyExitViTConfig(**SIZES, **fields))


EVERY_FAMILY: dict[str, Callable[[], torch.nn.Module]] = {
    "thinkingvit": lively_model,
    "thinkingvit pruned": lambda: lively_model(pruning_layers=[1], pruning_keep_rate=0.5),
    "thinking_swin": lambda: lively_swin(qkv_slicing="each_projection"),
    "thinking_swin official": lambda: lively_swin(qkv_slicing="leading_rows"),
    "avit": lively_avit,
    "avit distilled": lambda: lively_avit(use_distillation_token=True),
    "elastic_vit hydravit": lambda: lively_elastic("hydravit"),
    "elastic_vit dynabert": lambda: lively_elastic("dynabert", depths=[0.5, 1.0]),
    "elastic_vit separate": lambda: lively_elastic("sortednet", separate_classifiers=True),
    "early_exit_vit": lively_exits,
    "early_exit_vit layers": lambda: lively_exits(exit_head="transformer_layer"),
    "segmentation": lively_segmenter,
    "segmentation mask": lambda: lively_segmenter("mask_transformer"),
}
# One of each class, where the fields of its configuration make no difference.
EVERY_CLASS = ("thinkingvit", "thinking_swin", "avit", "elastic_vit hydravit", "early_exit_vit", "segmentation")


def every_answer(model: torch.nn.Module, pixel_values: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The logits of each stage, of each sub-network alone, or of the one way in which the model answers."""
    pixel_values = random_images() if pixel_values is None else pixel_values
    family = model.config.model_type
    if family == "avit":
        return [model(pixel_values).logits]
    if family == "elastic_vit":
        return list(model(pixel_values, sub_network=list(range(len(model.config.networks)))).sub_network_logits)
    answers = list(model(pixel_values, output_stage_logits=True).stage_logits)
    if family != "early_exit_vit":
        answers += [model(pixel_values, sub_network=stage).logits for stage in range(model.config.num_stages)]
    return answers
