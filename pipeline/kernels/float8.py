"""Keys and values in FP8: e4m3 codes, kept as bytes, with one float32 scale for each token and head.

Shapes: ... any, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest e4m3 number."""


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [..., D] (e4m3 in uint8) and scales [...]: x is code * scale, up to half a step of 4 significant bits.

    What is not finite makes its scale, and so the whole vector, not finite.
    """
    wide = x.float()
    largest = wide.abs().amax(dim=-1)
    scales = torch.where(largest == 0, 1.0, largest / LARGEST)
    codes = (wide / scales[..., None]).clamp(-LARGEST, LARGEST)
    return codes.to(FLOAT8).view(torch.uint8), scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Float32 [..., D] from codes and scales."""
    return decoded(codes) * scales[..., None]


def decoded(codes: Tensor) -> Tensor:
    """The numbers that codes stand for, float32."""
    return codes.view(FLOAT8).float()
