"""The bitsandbytes library as a kernel: 4-bit weights and LLM.int8() on CPU and CUDA."""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from types import ModuleType

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.kernels.linear8bit import Int8Weight
from pipeline.kernels.need import Need
from pipeline.kernels.packed4bit import NestedAbsmax, Packed4bit

NESTED_BLOCKSIZE = 256
"""Block maxima that share a scale in double quantization."""
CPU_SLICE = 1 << 18
"""Values quantized at a time on a CPU: temporaries of a few MiB, whatever the size of the weight."""


@functools.cache
def bitsandbytes() -> ModuleType:
    """Import bitsandbytes without letting it fetch anything; raises ConfigError if it is missing or broken.

    On CPUs with AVX512-BF16 its import asks the `kernels` package, where that is installed, for a kernel
    from a hub. The weights would then be multiplied by code that nobody named, so the package is hidden.
    """
    hidden = sys.modules.get("kernels")
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    sys.modules["kernels"] = None  # type: ignore[assignment]  # makes `import kernels` raise ImportError
    logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"quant=bnb needs the bitsandbytes library, which could not be imported ({error}); "
            "install bitsandbytes>=0.50 or choose quant=none"
        ) from error
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if hidden is not None:
            sys.modules["kernels"] = hidden


def can_run(need: Need) -> str | None:
    """Why bitsandbytes cannot run its weights on this kind of device, or None if it can."""
    if need.device_type not in ("cpu", "cuda"):
        return f"bitsandbytes kernels run on cpu and cuda, not on {need.device_type}"
    return None


def quantize_4bit(weight_NK: Tensor, quant_type: str, blocksize: int, double_quant: bool) -> Packed4bit:
    """Quantize a weight on its own device to NF4 or FP4 (Dettmers et al., "QLoRA", 2023)."""
    functional = bitsandbytes().functional
    parts = [
        torch.ops.bitsandbytes.quantize_4bit.default(part, blocksize, quant_type, torch.uint8)
        for part in torch.split(weight_NK.reshape(-1), _slice_of(weight_NK, blocksize))
    ]
    packed, absmax = (torch.cat([part[index].reshape(-1) for part in parts]) for index in (0, 1))
    nested = None
    if double_quant:
        offset = absmax.mean()
        absmax, inner = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
        nested = NestedAbsmax(inner.absmax, inner.code, offset, inner.blocksize)
    return Packed4bit(
        packed=packed,
        absmax=absmax,
        nested=nested,
        quant_type=quant_type,
        blocksize=blocksize,
        shape=(weight_NK.shape[0], weight_NK.shape[1]),
    )


def _slice_of(weight: Tensor, blocksize: int) -> int:
    """How many values to quantize at a time: whole blocks."""
    return weight.numel() if weight.is_cuda else CPU_SLICE // blocksize * blocksize


def dequantize_4bit(weight: Packed4bit, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`, by bitsandbytes' own kernels."""
    functional = bitsandbytes().functional
    absmax = weight.absmax
    if weight.nested is not None:
        inner = weight.nested
        absmax = (
            functional.dequantize_blockwise(absmax, absmax=inner.absmax, code=inner.code, blocksize=inner.blocksize)
            + inner.offset
        )
    # On CPUs with AVX512, 0.50 takes the wrong block maxima where a row ends within a block; one long row is right.
    rows, columns = weight.shape
    shape = (rows, columns) if columns % weight.blocksize == 0 else (1, rows * columns)
    out: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        weight.packed.reshape(-1, 1), absmax.float(), weight.blocksize, weight.quant_type, shape, dtype
    )
    return out.reshape(rows, columns)


def quantize_8bit(weight_NK: Tensor, threshold: float) -> Int8Weight:
    """Quantize a weight on its own device, row by row, to int8; by way of float16, as bitsandbytes does."""
    functional = bitsandbytes().functional
    rows = max(1, _slice_of(weight_NK, 1) // weight_NK.shape[1])
    parts = [functional.int8_vectorwise_quant(part.to(torch.float16))[:2] for part in torch.split(weight_NK, rows)]
    codes_NK, scales_N = (torch.cat([part[index] for part in parts]) for index in (0, 1))
    return Int8Weight(codes_NK, scales_N, threshold)


def linear_8bit(x_MK: Tensor, weight: Int8Weight, bias_N: Tensor | None) -> Tensor:
    """x W^T + b, [M, N] in x's dtype, by bitsandbytes' own kernels."""
    functional, ops = bitsandbytes().functional, torch.ops.bitsandbytes
    codes_MK, scales_M, outliers = functional.int8_vectorwise_quant(x_MK.to(torch.float16), weight.threshold)
    if weight.threshold > 0:
        out_MN: Tensor = ops.int8_mixed_scaled_mm.default(
            x_MK, codes_MK, weight.codes_NK, scales_M, weight.scales_N, outliers, bias_N
        )[0]
    else:
        out_MN = ops.int8_scaled_mm.default(
            codes_MK, weight.codes_NK, scales_M, weight.scales_N, bias=bias_N, dtype=x_MK.dtype
        )
    return out_MN
