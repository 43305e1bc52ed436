"""bitsandbytes' 4-bit storage (NF4 and FP4, with or without double quantization)."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels import bnb
from pipeline.kernels.packed4bit import NestedAbsmax, Packed4bit
from pipeline.kernels.registry import Kernel
from pipeline.quant.linear import QuantLinear
from pipeline.quant.spec import QuantSpec


class Bnb4bitLinear(QuantLinear):
    """A Linear in NF4 or FP4: 4 bits a weight plus one maximum a block of 64."""

    def __init__(self, weight: Packed4bit, bias: Tensor | None, dtype: torch.dtype, kernel: Kernel) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias, dtype)
        self._kernel = kernel
        self._weight = weight

    @classmethod
    def quantize(cls, weight_NK: Tensor, bias: Tensor | None, spec: QuantSpec, kernel: Kernel) -> Bnb4bitLinear:
        """Quantize in flight, on the weight's device, from the weight in the model's dtype."""
        packed = bnb.quantize_4bit(weight_NK, spec.quant_type, spec.blocksize, spec.double_quant)
        return cls(packed, bias, weight_NK.dtype, kernel)

    def dequantize(self) -> Tensor:
        """The weight [N, K] in the model's dtype."""
        return self._kernel.run(self._weight, self.dtype)

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and block maxima."""
        tensors = [self._weight.packed, self._weight.absmax]
        if self._weight.nested is not None:
            tensors += _nested_tensors(self._weight.nested)
        return sum(t.numel() * t.element_size() for t in tensors)


def _nested_tensors(nested: NestedAbsmax) -> list[Tensor]:
    return [nested.absmax, nested.code, nested.offset]
