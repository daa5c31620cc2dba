"""
Training with LoRA adapters (arXiv 2106.09685, by PEFT) in place of the weights of a trained model.

What a plain model has (embeddings, layers, norms) is frozen, and each linear map of its layers gets an adapter. What
only an adaptive model has, and the heads, are small and trained as they are. Saved models are merged: they are models
like any other, with no adapters in them. Checkpoints of the run hold the adapters.
"""

import copy

from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import is_peft_available

from .config import TrainingConfig


# Parts of a bare model that a plain model has too.
PLAIN_PARTS = ("embeddings", "layers", "layernorm")


def check_peft() -> None:
    """`ImportError` that says what to install, if PEFT is not."""
    if not is_peft_available():
        raise ImportError("`lora_rank` needs PEFT: `pip install peft`, or this package with its extra `lora`.")


def add_adapters(model: PreTrainedModel, config: TrainingConfig) -> None:
    """
    Freeze the plain parts of `model`, and add adapters of rank `config.lora_rank` to the linear maps of its layers
    that were not frozen already. In place; the adapters start without effect.

    Raises:
        ImportError: without PEFT.
        ValueError: if some of the weights are new ones, which adapters cannot train, or nothing can have adapters.
    """
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model

    if config.from_vit and AutoConfig.from_pretrained(config.from_vit).hidden_size != model.config.hidden_size:
        raise ValueError(
            f"`lora_rank` adapts trained weights, but the model is wider than `{config.from_vit}`, and its further "
            "channels are new. Choose stages within the source (`--model.thinking_stages`), or train all weights "
            "(`lora_rank` 0)."
        )
    layers = f"{model.base_model_prefix}.layers."
    targets = [
        name
        for name, module in model.named_modules()
        if name.startswith(layers) and isinstance(module, nn.Linear) and module.weight.requires_grad
    ]
    if not targets:
        raise ValueError("`lora_rank`: every linear map of the layers is frozen (`freeze`), so none can be adapted.")
    for part in PLAIN_PARTS:
        getattr(model.base_model, part).requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    alpha = config.lora_rank if config.lora_alpha is None else config.lora_alpha
    adapters = LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules=targets)
    inject_adapter_in_model(adapters, model)  # leaves the class as it is, and freezes all but the adapters
    for parameter in trained:
        parameter.requires_grad_(True)


def adapter_facts(config: TrainingConfig) -> dict[str, str]:
    """What a model card says of the adapters that a model was trained with; empty without any."""
    return {"adapters": f"LoRA of rank {config.lora_rank}, merged"} if config.lora_rank else {}


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` with its adapters merged into the weights; `model` itself, if it has none."""
    if not _adapters(model):
        return model
    model = copy.deepcopy(model)
    for name, adapter in _adapters(model).items():
        adapter.merge()
        model.set_submodule(name, adapter.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def _adapters(model: nn.Module) -> dict[str, nn.Module]:
    if not is_peft_available():
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
