"""bitsandbytes' 8-bit storage (LLM.int8())."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.kernels import bnb
from pipeline.kernels.linear8bit import Int8Weight
from pipeline.kernels.registry import Kernel, Linear8bit
from pipeline.quant.linear import QuantLinear
from pipeline.quant.spec import QuantSpec


@dataclass(frozen=True, slots=True)
class Bnb8bitFormat:
    """How bitsandbytes' 8-bit Linears come about: quantized in flight, or from a checkpoint it saved."""

    spec: QuantSpec
    kernel: Kernel[Linear8bit]

    def quantize(self, weight_NK: Tensor, bias: Tensor | None) -> QuantLinear:
        """Quantize in flight, on the weight's device, from the weight in the model's dtype."""
        weight = bnb.quantize_8bit(weight_NK, self.spec.int8_threshold)
        return Bnb8bitLinear(weight, bias, weight_NK.dtype, self.kernel)

    def stored_leaves(self, leaves: Iterable[str]) -> set[str]:
        """Which of a module's tensors make up a quantized weight; none if it is stored unquantized."""
        present = set(leaves) & {"weight", "SCB", "weight_format"}
        return present if present - {"weight"} else set()

    def restore(self, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> QuantLinear:
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
        return Bnb8bitLinear(weight, bias, dtype, self.kernel)


class Bnb8bitLinear(QuantLinear):
    """A Linear in int8 with one scale a row; activations are quantized for each product.

    With a threshold, a row's result depends on the others of its pass (`kernels/linear8bit.py`).
    """

    cacheable = False

    def __init__(self, weight: Int8Weight, bias: Tensor | None, dtype: torch.dtype, kernel: Kernel[Linear8bit]) -> None:
        super().__init__(weight.codes_NK.shape[1], weight.codes_NK.shape[0], bias, dtype)
        self._kernel = kernel
        self._weight = weight

    def dequantize(self) -> Tensor:
        """The weight [N, K] in the model's dtype."""
        return (self._weight.codes_NK * self._weight.scales_N[:, None] / 127).to(self.dtype)

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self._weight.codes_NK.numel() + 4 * self._weight.scales_N.numel()

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        out = self._kernel.run(x.reshape(-1, self.in_features), self._weight, self.bias)
        return out.reshape(*x.shape[:-1], self.out_features)
