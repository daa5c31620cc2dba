"""
Which quantisers know nested layers, and which models can be saved. A quantiser that does not know them would leave most
of a model as it is, and some layers in the place of nested ones lose their weights on the way through a folder, both
without a word.

torchao quantises the weights of every `nn.Linear`, of subclasses too, and the nested layers slice such weights. quanto
puts its own layers in their place, which run at full width (`nested_projection.py`).
"""

import os
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from .nested_projection import check_merged


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


def check_saved(model: PreTrainedModel, names: Iterable[str] | None = None) -> None:
    """
    `ValueError` if `save_pretrained` would write weights that no model reads again. `names` are those of the weights to
    be saved, by default of all.
    """
    check_merged(model, "the saved folder", names, ", or save them alone by `peft_model.save_pretrained(folder)`")
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.is_serializable():
        return
    kinds = {type(parameter) for parameter in model.parameters()}
    libraries = sorted({kind.__module__.partition(".")[0] for kind in kinds} & {"optimum", "torchao"})
    if quantizer is not None or libraries:
        method = libraries[0] if quantizer is None else quantizer.quantization_config.quant_method
        raise ValueError(
            f"The weights of this {type(model).__name__}, as {getattr(method, 'value', method)} quantised them, cannot "
            "be saved. Save the model before it is quantised, and quantise it as it is loaded: "
            "`from_pretrained(..., quantization_config=...)`. What `TorchAoConfig` quantised so can be saved as well."
        )


class RefusesTorchQuantization:
    """Mixin for models and layers that `torch.ao.quantization` would leave as they are. Place it before `nn.Module`."""

    @property
    def qconfig(self) -> None:
        """Which `torch.ao.quantization` sets on every module in what it is to quantise, for some to `None`."""
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        raise ValueError(
            "`torch.ao.quantization` replaces layers of the very class `nn.Linear`, and would quantise hardly anything "
            f"of {type(self).__name__}. Use torchao instead: `torchao.quantization.quantize_(model, "
            "Int8DynamicActivationInt8WeightConfig())`."
        )


class QuantizablePreTrainedModel(RefusesTorchQuantization, PreTrainedModel):
    """A model with nested layers, which refuses what would not quantise or not save them."""

    def __init__(self, config, *args, **kwargs):
        check_quantization(config, type(self).__name__)
        super().__init__(config, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """
        As of every model in Transformers. `ValueError` for adapters that are not merged, and for quantised weights that
        Transformers cannot save.
        """
        if not getattr(self, "_hf_peft_config_loaded", False):  # of which Transformers saves the adapters
            check_saved(self, kwargs.get("state_dict"))
            if getattr(self, "hf_quantizer", None) is not None:
                # Otherwise Transformers looks for the inverse of how it has read quantised weights, and has none.
                kwargs["save_original_format"] = False
        return super().save_pretrained(save_directory, *args, **kwargs)


__all__ = ["QuantizablePreTrainedModel", "RefusesTorchQuantization", "check_quantization", "check_saved"]
