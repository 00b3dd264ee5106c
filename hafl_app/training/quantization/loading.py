"""Quantize a base model while Transformers reads its files, a weight at a time.

The whole model is never there in full precision. Transformers has an interface for this, whose
methods are these; see its guide "Contribute a new quantization method".
"""

from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hafl_app.training.quantization.blocks import quantize
from hafl_app.training.quantization.linear import QuantizedLinear, packed

_METHOD = "hafl"


@register_quantization_config(_METHOD)
class QuantizedBlocks(QuantizationConfigMixin):
    """Argument ``quantization_config`` of ``from_pretrained``.

    Parameters
    ----------
    quantization
        See `hafl_app.training.quantization.blocks.precisions_of`.
    """

    def __init__(self, quantization: str) -> None:
        self.quant_method = _METHOD  # type: ignore[assignment]
        self.quantization = quantization


@register_quantizer(_METHOD)
class _Quantizer(HfQuantizer):
    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        blocks: Any = self.quantization_config
        quantize(model, blocks.quantization)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        module, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(module), QuantizedLinear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # From here on it is a model like any other, which may be moved and copied.
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        model.config._is_quantized = False
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Pack(ConversionOps):
    """Convert one weight of the files to the tensors of a `QuantizedLinear`."""

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        tensors = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            module, _, _ = name.rpartition(".")
            rounded, scales = packed(weight, model.get_submodule(module).precision)
            tensors[name] = rounded
            if scales is not None:
                tensors[f"{module}.scales"] = scales
        return tensors
