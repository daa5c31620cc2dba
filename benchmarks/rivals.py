"""The adaptive models of the speed benchmarks, the plain models beside them, and early exit as in the official code."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_thinkingvit import (
    ExitRule,
    ThinkingSwinConfig,
    ThinkingSwinForImageClassification,
    ThinkingViTConfig,
    ThinkingViTForImageClassification,
)


def plain_vit(heads: int) -> ViTForImageClassification:
    """A Transformers ViT of DeiT proportions: 3 heads are ViT-Tiny, 6 are ViT-Small."""
    config = ViTConfig(
        hidden_size=64 * heads, num_attention_heads=heads, intermediate_size=256 * heads, num_labels=1000
    )
    return ViTForImageClassification(config)


def timm_model(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


def vit_select_after(model: ThinkingViTForImageClassification, pixel_values: torch.Tensor, threshold: float):
    """Logits as the official code computes them: every stage for every image, then a selection by τ."""
    vit, rule = model.thinkingvit, ExitRule.from_config(model.config, threshold)
    tokens = logits = undecided = None
    for index, stage in enumerate(vit.stages):
        hidden_states = vit.embeddings(pixel_values, 0, stage.hidden_size)
        if tokens is not None:
            hidden_states = vit.recyclers[index - 1](hidden_states, tokens)
        for layer in vit.layers:
            hidden_states = layer(hidden_states, stage)
        tokens = vit.layernorm(hidden_states)
        answer = model.classifier(tokens[:, 0])
        exits = rule.judge(index, {"logits": answer}).exits
        logits = answer if logits is None else torch.where(undecided[:, None], answer, logits)
        undecided = ~exits if undecided is None else undecided & ~exits
    return logits


@dataclass(frozen=True)
class Family:
    """
    A model of two stages and its rivals.

    Attributes:
        build: the model with random weights.
        first: names in `plain` of the models that the first stage is compared with.
        both: the same for all stages together; these models run one after another.
        plain: how to build each rival.
        select_after: every stage for every image: `(model, pixel_values, threshold)` to logits.
    """

    build: Callable[[], PreTrainedModel]
    first: tuple[str, ...]
    both: tuple[str, ...]
    plain: dict[str, Callable[[], nn.Module]]
    select_after: Callable[[PreTrainedModel, torch.Tensor, float], torch.Tensor]


def swin_select_after(model: ThinkingSwinForImageClassification, pixel_values: torch.Tensor, threshold: float):
    """Every round for every image, then a selection by τ. (The official code also repeats the patch embedding.)"""
    return model(pixel_values, threshold=threshold, output_stage_logits=True).logits


def swin_small() -> SwinForImageClassification:
    return SwinForImageClassification(SwinConfig(depths=[2, 2, 18, 2], num_labels=1000))


def from_timm(names: dict[str, str]) -> dict[str, Callable[[], nn.Module]]:
    """How to build models of timm; empty if timm is not installed."""
    return {f"{name} (timm)": partial(timm_model, model) for name, model in names.items() if find_spec("timm")}


FAMILIES = {
    "thinkingvit": Family(
        build=lambda: ThinkingViTForImageClassification(ThinkingViTConfig(num_labels=1000)),
        first=("ViT-Tiny",),
        both=("ViT-Tiny", "ViT-Small"),
        plain={
            "ViT-Tiny": lambda: plain_vit(3),
            "ViT-Small": lambda: plain_vit(6),
            **from_timm({"DeiT-Tiny": "deit_tiny_patch16_224", "DeiT-Small": "deit_small_patch16_224"}),
        },
        select_after=vit_select_after,
    ),
    "thinking_swin": Family(
        build=lambda: ThinkingSwinForImageClassification(ThinkingSwinConfig(num_labels=1000)),
        first=("Swin-S",),
        both=("Swin-S",),
        plain={"Swin-S": swin_small, **from_timm({"Swin-S": "swin_small_patch4_window7_224"})},
        select_after=swin_select_after,
    ),
}
