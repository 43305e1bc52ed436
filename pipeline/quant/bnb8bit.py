"""bitsandbytes' 8-bit storage (LLM.int8())."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.kernels import bnb
from pipeline.kernels.linear8bit import Int8Weight
from pipeline.kernels.registry import Kernel
from pipeline.quant.bnb_spec import BnbSpec
from pipeline.quant.linear import QuantLinear
from pipeline.quant.spec import StoredModule


@dataclass(frozen=True, slots=True)
class Bnb8bitFormat:
    """How bitsandbytes' 8-bit Linears come about: quantized in flight, or from a checkpoint it saved.

    Activations are quantized for each product. With a threshold, a row's result depends on the others of its
    pass (`kernels/linear8bit.py`).
    """

    spec: BnbSpec
    kernel: Kernel[Int8Weight]

    def quantize(self, weight_NK: Tensor, bias: Tensor | None) -> QuantLinear:
        """Quantize in flight, on the weight's device, from the weight in the model's dtype."""
        weight = bnb.quantize_8bit(weight_NK, self.spec.int8_threshold)
        return QuantLinear(weight, bias, weight_NK.dtype, self.kernel)

    def restore(
        self, module: StoredModule, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> QuantLinear:
        """From a weight as bitsandbytes saves it (`bnb_state.py`), which `BnbSpec.stored_modules` has checked."""
        weight = Int8Weight(tensors["weight"], tensors["SCB"].reshape(-1).float(), self.spec.int8_threshold)
        return QuantLinear(weight, bias, dtype, self.kernel)
