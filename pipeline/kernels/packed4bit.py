"""4-bit blockwise weights as bitsandbytes packs them, and their dequantization in plain torch.

Format: the weight [N, K] row by row in blocks of `blocksize` values; a block is 4-bit codes, two to a
byte with the first in the high half, times the block's largest absolute value. With double
quantization those maxima are themselves 8-bit codes in blocks, plus one offset (QLoRA, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of NormalFloat4: quantiles of a normal distribution (QLoRA, appendix E)."""

FP4_VALUES = (
    0.0, 0.005208333333333333, 0.6666666666666666, 1.0, 0.3333333333333333, 0.5, 0.16666666666666666, 0.25,
    -0.0, -0.005208333333333333, -0.6666666666666666, -1.0, -0.3333333333333333, -0.5, -0.16666666666666666, -0.25,
)  # fmt: skip
"""The 16 values of bitsandbytes' FP4: sign, two exponent bits, one mantissa bit, scaled to 1."""

CODES = {"nf4": NF4_VALUES, "fp4": FP4_VALUES}


@dataclass(frozen=True, slots=True)
class NestedAbsmax:
    """Double quantization: block maxima as codes into `code` [256], in blocks of `blocksize`, plus `offset`."""

    absmax: Tensor
    code: Tensor
    offset: Tensor
    blocksize: int


@dataclass(frozen=True, slots=True)
class Packed4bit:
    """A quantized weight: `packed` uint8 [N * K / 2]; `absmax` float32, or uint8 codes if nested, one a block."""

    packed: Tensor
    absmax: Tensor
    nested: NestedAbsmax | None
    quant_type: str
    blocksize: int
    shape: tuple[int, int]

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and block maxima."""
        tensors = [self.packed, self.absmax]
        if self.nested is not None:
            tensors += [self.nested.absmax, self.nested.code, self.nested.offset]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def dequantize_4bit_reference(weight: Packed4bit, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`: code value times block maximum in float32, rounded once."""
    values = torch.tensor(CODES[weight.quant_type], dtype=torch.float32, device=weight.packed.device)
    codes = torch.stack((weight.packed >> 4, weight.packed & 0xF), dim=-1).reshape(-1)
    absmax = dequantize_absmax_reference(weight)
    scales = absmax.repeat_interleave(weight.blocksize)[: codes.numel()]
    return (values[codes.long()] * scales).to(dtype).reshape(weight.shape)


def dequantize_absmax_reference(weight: Packed4bit) -> Tensor:
    """The block maxima in float32, one a block."""
    if weight.nested is None:
        return weight.absmax.float()
    inner = weight.nested
    scales = inner.absmax.float().repeat_interleave(inner.blocksize)[: weight.absmax.numel()]
    return inner.code.float()[weight.absmax.long()] * scales + inner.offset.float()
