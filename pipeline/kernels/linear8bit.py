"""LLM.int8() products in plain torch (Dettmers et al., "LLM.int8()", 2022).

Weights are int8 [N, K] with one scale a row: w = code * scale / 127. Activations are quantized the same
way, row by row, for each product. With a threshold, columns in which any activation of the batch
reaches it are multiplied in the activations' dtype instead: a row's result then depends on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEQUANT_FACTOR = 6.200124e-05
"""1 / 127**2, as bitsandbytes writes it."""


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """`codes_NK` int8, `scales_N` float32 (the rows' largest absolute values), threshold 0 for no outliers."""

    codes_NK: Tensor
    scales_N: Tensor
    threshold: float

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): outputs and inputs."""
        return self.codes_NK.shape[0], self.codes_NK.shape[1]

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes_NK.numel() + 4 * self.scales_N.numel()


def looks_for_outliers(weight: Int8Weight) -> str | None:
    """Why a product cannot be part of a CUDA graph, or None: with a threshold the host has to know the outliers."""
    if weight.threshold == 0:
        return None
    return f"LLM.int8() with threshold {weight.threshold:g} asks the host about outliers in every product"


def dequantize_8bit(weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`, as it would be without the rounding of activations."""
    return (weight.codes_NK * weight.scales_N[:, None] / 127).to(dtype)


def linear_8bit_reference(x_MK: Tensor, weight: Int8Weight, bias_N: Tensor | None) -> Tensor:
    """x W^T + b, [M, N] in x's dtype."""
    half_MK = x_MK.to(torch.float16)
    outlier_K = torch.zeros(x_MK.shape[1], dtype=torch.bool, device=x_MK.device)
    if weight.threshold > 0:
        outliers_MK = half_MK.abs() >= weight.threshold
        outlier_K = outliers_MK.any(dim=0)
        half_MK = half_MK.masked_fill(outliers_MK, 0.0)
    scales_M = half_MK.abs().amax(dim=1).float()
    codes_MK = torch.round(half_MK * (127.0 / scales_M[:, None])).to(torch.int8)
    codes_MK = codes_MK.masked_fill(outlier_K, 0)
    sums_MN = (codes_MK.double() @ weight.codes_NK.double().T).to(torch.int32)
    out_MN = sums_MN * (scales_M[:, None] * weight.scales_N) * DEQUANT_FACTOR
    if bias_N is not None:
        out_MN = out_MN + bias_N
    out_MN = out_MN.to(x_MK.dtype)
    if weight.threshold > 0 and outlier_K.any():
        dense_NO = weight.codes_NK[:, outlier_K] * weight.scales_N[:, None] * (1 / 127)
        out_MN = out_MN.addmm(x_MK[:, outlier_K], dense_NO.to(x_MK.dtype).T)
    return out_MN
