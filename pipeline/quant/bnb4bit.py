"""bitsandbytes' 4-bit storage (NF4 and FP4, with or without double quantization)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.kernels import bnb
from pipeline.kernels.packed4bit import CODES, NestedAbsmax, Packed4bit
from pipeline.kernels.registry import Kernel
from pipeline.quant.bnb_spec import STATE, BnbSpec
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
        """From a weight as bitsandbytes saves it (its QuantState.as_dict), by what follows the module's path.

        "weight" are the packed codes in any storage dtype; "weight.absmax", "weight.quant_map" and, nested,
        "weight.nested_absmax" and "weight.nested_quant_map" the statistics; STATE + "nf4" or "fp4" has the
        rest as JSON. Raises ConfigError saying what is missing or does not fit.
        """
        return QuantLinear(read_packed(tensors), bias, dtype, self.kernel)


def read_packed(tensors: Mapping[str, Tensor]) -> Packed4bit:
    """The weight in a set of saved tensors; raises ConfigError naming what is wrong."""
    try:
        state_name = next(name for name in tensors if name.startswith(STATE))
        state = json.loads(bytes(tensors[state_name].cpu().tolist()))
        packed = tensors["weight"].contiguous().view(torch.uint8).reshape(-1)
        nested = _read_nested(tensors, state) if "nested_blocksize" in state else None
        rows, columns = state["shape"]
        weight = Packed4bit(
            packed=packed,
            absmax=tensors["weight.absmax"],
            nested=nested,
            quant_type=state["quant_type"],
            blocksize=state["blocksize"],
            shape=(rows, columns),
        )
    except (StopIteration, KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"its bitsandbytes 4-bit statistics are missing or broken ({error!r})") from error
    if not _fits(weight):
        raise ConfigError(f"its bitsandbytes 4-bit statistics do not fit a weight of {rows} x {columns}")
    return weight


def _fits(weight: Packed4bit) -> bool:
    """Whether codes and statistics are as many, and of the kinds, that the weight's shape asks for."""
    count = weight.shape[0] * weight.shape[1]
    if weight.quant_type not in CODES or weight.blocksize < 1 or weight.packed.numel() * 2 != count:
        return False
    blocks = -(-count // weight.blocksize)
    if weight.absmax.numel() != blocks or weight.absmax.is_floating_point() != (weight.nested is None):
        return False
    inner = weight.nested
    return inner is None or (
        inner.blocksize >= 1 and inner.absmax.numel() == -(-blocks // inner.blocksize) and inner.code.numel() == 256
    )


def _read_nested(tensors: Mapping[str, Tensor], state: Mapping[str, float]) -> NestedAbsmax:
    device = tensors["weight.nested_absmax"].device
    return NestedAbsmax(
        absmax=tensors["weight.nested_absmax"],
        code=tensors["weight.nested_quant_map"],
        offset=torch.tensor(float(state["nested_offset"]), device=device),
        blocksize=int(state["nested_blocksize"]),
    )
