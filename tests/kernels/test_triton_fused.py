"""`triton-fused` in a Linear: packed products where few rows share a pass, the dense one elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_triton_bitblas import random_weight as bitblas_weight
from test_triton_gptq import random_weight as gptq_weight
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.kernels.need import Need
from pipeline.kernels.registry import BITBLAS, FEW_ROWS, GPTQ, Kernel, choose
from pipeline.quant.linear import QuantLinear

FORMATS = {
    "gptq": (GPTQ, gptq_weight((40, 160, 32), 4)),
    "bitblas": (BITBLAS, bitblas_weight((40, 160, 32), 4, "original")),
}


def in_a_linear(x: Tensor, weight: Any, name: str, bits_of: str) -> Tensor:
    """y for x [..., K], by a kernel of a format."""
    return QuantLinear(weight, None, x.dtype, FORMATS[bits_of][0][name])(x)


@pytest.mark.parametrize("bits_of", FORMATS)
@pytest.mark.parametrize("rows", [8, FEW_ROWS, FEW_ROWS + 1])
def test_the_product_depends_on_the_rows_of_a_pass(run_triton: Callable[..., Tensor], bits_of: str, rows: int) -> None:
    kernels: Mapping[str, Kernel[Any]] = FORMATS[bits_of][0]
    weight, values_NK = FORMATS[bits_of][1]
    x_BTK = torch.randn(1, rows, 160, generator=torch.Generator().manual_seed(rows))
    y_BTN = run_triton(in_a_linear, x_BTK, weight, "triton-fused", bits_of)
    dense_BTN = F.linear(x_BTK, values_NK)
    torch.testing.assert_close(y_BTN, dense_BTN, rtol=1e-5, atol=1e-4)
    packed_MN = run_triton(kernels["triton-fused"].linear, x_BTK[0], weight, None)
    assert torch.equal(y_BTN[0], packed_MN) == (rows <= FEW_ROWS)
    if rows > FEW_ROWS:
        assert torch.equal(y_BTN, run_triton(in_a_linear, x_BTK, weight, "triton", bits_of))


@pytest.mark.parametrize("bits_of", FORMATS)
def test_it_has_to_be_asked_for(bits_of: str) -> None:
    h200 = Need(device_type="cuda", capability=(9, 0), dtype=torch.bfloat16, group_size=128, shape=(4096, 4096))
    kernels: Mapping[str, Kernel[Any]] = FORMATS[bits_of][0]
    assert choose(kernels, "auto", [h200])[0].name == "triton"
    assert choose(kernels, "triton-fused", [h200])[0].name == "triton-fused"
    with pytest.raises(ConfigError, match=r"quant\.kernel=triton-fused cannot run here: .* not for 3"):
        choose(kernels, "triton-fused", [Need(device_type="cuda", capability=(9, 0), bits=3, shape=(64, 128))])
