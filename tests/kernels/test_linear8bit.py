"""The 8-bit products against LLM.int8()'s definition in float64, both kernels on the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.kernels import bnb
from pipeline.kernels.linear8bit import Int8Weight
from pipeline.kernels.need import Need
from pipeline.kernels.registry import BNB_8BIT, choose

DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (torch.float32, torch.bfloat16, torch.float16)]
ROUNDING = {torch.float32: 3e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""A step of the dtype; in float32 bitsandbytes' own constant for 1 / 127**2 on CPU, which is off by 1.8e-5."""
SHAPES = [(16, 64, 64), (32, 96, 48), (1, 64, 16), (64, 704, 256), (17, 33, 7)]
kernels = pytest.mark.parametrize("kernel", BNB_8BIT)


def numbers(rows: int, inner: int, outer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Activations of which a few columns are large, weights and a bias."""
    torch.manual_seed(rows + inner + outer)
    x_MK = torch.randn(rows, inner) * (1 + 5 * (torch.arange(inner) % 11 == 3))
    return x_MK.to(dtype), torch.randn(outer, inner).to(dtype), torch.randn(outer).to(dtype)


def defined(x_MK: Tensor, weight: Int8Weight, bias_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result in float64, and the size of what is summed (rounding errors are in proportion to it)."""
    half_MK = x_MK.to(torch.float16)
    large_MK = (
        half_MK.abs() >= weight.threshold if weight.threshold > 0 else torch.zeros_like(half_MK, dtype=torch.bool)
    )
    dense_K = large_MK.any(dim=0)
    small_MK = half_MK.double().masked_fill(large_MK, 0.0)
    scales_M1 = small_MK.abs().amax(dim=1, keepdim=True)
    factors_M1 = (127.0 / scales_M1.float()).double()
    codes_MK = torch.round((half_MK.masked_fill(large_MK, 0.0) * factors_M1.float()).float()).double()
    codes_MK[:, dense_K] = 0
    weight_NK = weight.codes_NK.double() * weight.scales_N.double()[:, None] / 127
    parts = [codes_MK * scales_M1 / 127 @ weight_NK.T, x_MK[:, dense_K].double() @ weight_NK[:, dense_K].T]
    bias = 0 if bias_N is None else bias_N.double()
    sizes = [(p.abs()) for p in parts]
    return parts[0] + parts[1] + bias, sizes[0] + sizes[1] + (0 if bias_N is None else bias_N.double().abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 3.0, 6.0])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@kernels
def test_a_product(
    kernel: str, shape: tuple[int, int, int], with_bias: bool, threshold: float, dtype: torch.dtype
) -> None:
    x_MK, weight_NK, bias_N = numbers(*shape, dtype)
    weight = bnb.quantize_8bit(weight_NK, threshold)
    bias = bias_N if with_bias else None
    out = BNB_8BIT[kernel].linear(x_MK, weight, bias)
    expected, size = defined(x_MK, weight, bias)
    assert out.dtype == dtype
    assert out.shape == expected.shape
    # the integers are exact; the columns that stay dense are rounded with their weights, and once more on the way
    roundings = 1.01 if threshold == 0 or not (x_MK.abs() >= threshold).any() else 12.0
    bound = roundings * ROUNDING[dtype] * (size + size.mean()) + 1e-5
    assert bool(((out.double() - expected).abs() <= bound).all()), float(((out - expected).abs() / bound).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_are_quantized_row_by_row(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    _, weight_NK, _ = numbers(*shape, dtype)
    weight = bnb.quantize_8bit(weight_NK, 0.0)
    half_NK = weight_NK.to(torch.float16).double()
    assert torch.equal(weight.scales_N.double(), half_NK.abs().amax(dim=1))
    error = weight.codes_NK.double() * weight.scales_N.double()[:, None] / 127 - half_NK
    assert bool((error.abs() <= weight.scales_N.double()[:, None] / 127 * 0.5001).all())


@pytest.mark.parametrize("dtype", DTYPES)
@kernels
def test_a_row_of_zeros_gives_the_bias(kernel: str, dtype: torch.dtype) -> None:
    x_MK, weight_NK, bias_N = numbers(16, 64, 32, dtype)
    x_MK[3] = 0
    for threshold in (0.0, 6.0):
        out = BNB_8BIT[kernel].linear(x_MK, bnb.quantize_8bit(weight_NK, threshold), bias_N)
        assert torch.equal(out[3], bias_N)


@pytest.mark.parametrize("dtype", DTYPES)
@kernels
def test_a_rows_bits_do_not_depend_on_the_others_without_a_threshold(kernel: str, dtype: torch.dtype) -> None:
    x_MK, weight_NK, bias_N = numbers(64, 704, 256, dtype)
    weight = bnb.quantize_8bit(weight_NK, 0.0)
    run = BNB_8BIT[kernel].linear
    whole = run(x_MK, weight, bias_N)
    for rows in (1, 16, 33):
        assert torch.equal(run(x_MK[:rows].contiguous(), weight, bias_N), whole[:rows])
    order = torch.randperm(64)
    assert torch.equal(run(x_MK[order], weight, bias_N), whole[order])


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@kernels
def test_a_row_that_is_not_finite_stays_so_and_alone(kernel: str, dtype: torch.dtype, broken: float) -> None:
    """Codes of 8 bits have no nan: it must not turn into a number."""
    x_MK, weight_NK, bias_N = numbers(16, 64, 32, dtype)
    weight = bnb.quantize_8bit(weight_NK, 0.0)
    run = BNB_8BIT[kernel].linear
    good = run(x_MK, weight, bias_N)
    x_MK[5, 7] = broken
    out = run(x_MK, weight, bias_N)
    kept = [n for n in range(16) if n != 5]
    assert torch.equal(out[kept], good[kept])
    assert not torch.isfinite(out[5]).any()


def test_the_kernel_that_is_chosen() -> None:
    assert choose(BNB_8BIT, "auto", [Need(device_type="cpu")])[0].name == "bitsandbytes"
    assert choose(BNB_8BIT, "auto", [Need(device_type="mps")])[0].name == "reference"
    with pytest.raises(ConfigError, match=r"quant\.kernel=bitsandbytes"):
        choose(BNB_8BIT, "bitsandbytes", [Need(device_type="mps")])
