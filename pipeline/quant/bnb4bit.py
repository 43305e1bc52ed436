"""bitsandbytes' 4-bit storage (NF4 and FP4, with or without double quantization)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.kernels import bnb
from pipeline.kernels.packed4bit import NestedAbsmax, Packed4bit
from pipeline.kernels.registry import Kernel
from pipeline.quant.bnb_spec import BnbSpec
from pipeline.quant.bnb_state import STATE, State4bit, read_state
from pipeline.quant.linear import QuantLinear
from pipeline.quant.spec import StoredModule


@dataclass(frozen=True, slots=True)
class Bnb4bitFormat:
    """How bitsandbytes' 4-bit Linears come about: quantized in flight, or from a checkpoint it saved."""

    spec: BnbSpec
    kernel: Kernel[Packed4bit]

    def quantize(self, weight_NK: Tensor, bias: Tensor | None) -> QuantLinear:
        """Quantize in flight, on the weight's device, from the weight in the model's dtype."""
        packed = bnb.quantize_4bit(weight_NK, self.spec.quant_type, self.spec.blocksize, self.spec.double_quant)
        return QuantLinear(packed, bias, weight_NK.dtype, self.kernel)

    def restore(
        self, module: StoredModule, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> QuantLinear:
        """From a weight as bitsandbytes saves it, by what follows the module's path (`bnb_state.py`)."""
        return QuantLinear(read_packed(tensors), bias, dtype, self.kernel)


def read_packed(tensors: Mapping[str, Tensor]) -> Packed4bit:
    """The weight in a set of saved tensors, which `BnbSpec.stored_modules` has checked."""
    state_name = next(name for name in tensors if name.startswith(STATE))
    state = read_state(bytes(tensors[state_name].cpu().tolist()))
    return Packed4bit(
        packed=tensors["weight"].contiguous().view(torch.uint8).reshape(-1),
        absmax=tensors["weight.absmax"].reshape(-1),
        nested=_read_nested(tensors, state) if state.nested_blocksize else None,
        quant_type=state.quant_type,
        blocksize=state.blocksize,
        shape=state.shape,
    )


def _read_nested(tensors: Mapping[str, Tensor], state: State4bit) -> NestedAbsmax:
    device = tensors["weight.nested_absmax"].device
    return NestedAbsmax(
        absmax=tensors["weight.nested_absmax"].reshape(-1),
        code=tensors["weight.nested_quant_map"].reshape(-1),
        offset=torch.tensor(state.nested_offset, device=device),
        blocksize=state.nested_blocksize,
    )
