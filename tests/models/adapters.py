"""Models with adapters of PEFT, for tests; those that import this are skipped without PEFT."""

import pytest
import torch


peft = pytest.importorskip("peft")


def adapted(model: torch.nn.Module, config) -> "peft.PeftModel":
    """The model with adapters that show in the logits, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = peft.get_peft_model(model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def lora(target_modules="all-linear", **fields) -> "peft.LoraConfig":
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": target_modules, **fields})


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
