"""What every Triton kernel is held to, whatever its format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (torch.float32, torch.bfloat16, torch.float16)]
STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""What rounding once to a dtype may change, relative to the number."""


def bit_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [..., K] as bytes [..., K * bits / 8]: one little-endian stream of bits along the last dimension."""
    each_bit = (codes[..., None] >> np.arange(bits)) & 1
    return np.packbits(each_bit.reshape(*codes.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder="little")


def check_product(y_MN: Tensor, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> None:
    """y is x W^T + b in float64 up to sums in float32 and one rounding to y's dtype; W in x's dtype."""
    assert y_MN.dtype == x_MK.dtype == weight_NK.dtype
    x_MK, weight_NK = x_MK.double(), weight_NK.double()
    expected_MN, size_MN = x_MK @ weight_NK.T, x_MK.abs() @ weight_NK.abs().T
    if bias_N is not None:
        expected_MN, size_MN = expected_MN + bias_N.double(), size_MN + bias_N.double().abs()
    bound_MN = size_MN * (x_MK.shape[1] + 2) * 2.0**-24 + expected_MN.abs() * STEP[y_MN.dtype]
    assert y_MN.shape == expected_MN.shape
    worst = float(((y_MN.double() - expected_MN).abs() / bound_MN).max())
    assert worst <= 1.0, f"error is {worst} times what rounding explains"


def check_invariance(product: Callable[[Tensor], Any], x_MK: Tensor) -> None:
    """A row's bits are the same with other rows, in other places and among more or fewer."""
    whole_MN = product(x_MK)
    assert torch.equal(product(x_MK[:17]), whole_MN[:17])
    assert torch.equal(product(x_MK[-7:]), whole_MN[-7:])
    assert torch.equal(product(x_MK[5:6]), whole_MN[5:6])
    order_M = torch.randperm(len(x_MK), generator=torch.Generator().manual_seed(1))
    assert torch.equal(product(x_MK[order_M]), whole_MN[order_M])
    broken_MK = x_MK.clone()
    broken_MK[3] = torch.inf
    kept_M = torch.arange(len(x_MK)) != 3
    assert torch.equal(product(broken_MK)[kept_M], whole_MN[kept_M])
