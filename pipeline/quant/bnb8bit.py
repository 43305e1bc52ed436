"""bitsandbytes' 8-bit storage (LLM.int8())."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import ConfigError
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
        """From a weight as bitsandbytes saves it: "weight" int8 [N, K] row by row, "SCB" its scales [N].

        Raises ConfigError on another layout.
        """
        missing = [leaf for leaf in ("weight", "SCB") if leaf not in tensors]
        if missing:
            raise ConfigError(f"its bitsandbytes 8-bit weight lacks {missing[0]}")
        codes_NK, scales_N = tensors["weight"], tensors["SCB"]
        row_major = int(tensors.get("weight_format", torch.tensor(0))) == 0
        if codes_NK.dtype != torch.int8 or scales_N.numel() != codes_NK.shape[0] or not row_major:
            raise ConfigError("its bitsandbytes 8-bit weight is not int8, row by row, with one scale a row")
        weight = Int8Weight(codes_NK, scales_N.float(), self.spec.int8_threshold)
        return QuantLinear(weight, bias, dtype, self.kernel)
