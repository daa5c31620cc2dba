"""
Which quantisers know nested layers. One that does not would leave most of a model as it is, without a word.

torchao quantises the weights of every `nn.Linear`, of subclasses too, and the nested layers slice such weights. quanto
puts its own layers in their place, which run at full width (`nested_projection.py`).
"""

from typing import Any

from transformers import PreTrainedModel


# Names in Transformers (`QuantizationMethod`).
QUANTIZERS = ("torchao", "quanto")


def check_quantization(config: Any, model_name: str) -> None:
    """`ValueError` if `config.quantization_config`, from the caller or a saved model, is of an unknown quantiser."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    is_dict = isinstance(quantization, dict)
    method = quantization.get("quant_method") if is_dict else getattr(quantization, "quant_method", None)
    method = getattr(method, "value", method)
    if method not in QUANTIZERS:
        raise ValueError(
            f"{model_name} cannot be quantised by {method!r}, which does not know nested layers: it would leave them "
            f"as they are, or was never tested with them. Use {' or '.join(QUANTIZERS)}, for example "
            "`from_pretrained(..., quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))`."
        )


class QuantizablePreTrainedModel(PreTrainedModel):
    """A model with nested layers, which refuses what would not quantise them."""

    def __init__(self, config, *args, **kwargs):
        check_quantization(config, type(self).__name__)
        super().__init__(config, *args, **kwargs)

    @property
    def qconfig(self) -> None:
        """Which `torch.ao.quantization` sets on every module that it is to quantise."""
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        raise ValueError(
            "`torch.ao.quantization` replaces layers of the very class `nn.Linear`, and would quantise hardly anything "
            f"of {type(self).__name__}. Use torchao instead: `torchao.quantization.quantize_(model, "
            "Int8DynamicActivationInt8WeightConfig())`."
        )


__all__ = ["QuantizablePreTrainedModel", "check_quantization"]
