"""Weights in BitBLAS' layout in Triton and in plain torch, against the format's definition in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from triton_checks import DTYPES, bit_stream, check_invariance, check_product

from pipeline.kernels.packed_bitblas import BitblasWeight, ZerosMode
from pipeline.kernels.registry import BITBLAS

SHAPES = [(72, 96, 32), (33, 192, 96), (40, 160, 20), (64, 288, 128), (7, 320, 320)]
"""Outputs, inputs and group size: of whole words or not, several in a block of the kernel or one in several."""
PRODUCTS = [
    ((72, 96, 32), "none"),
    ((33, 192, 96), "original"),
    ((64, 288, 128), "rescale"),
    ((7, 320, 320), "original"),
]
"""Shapes for products, whose groups are whole words, with zeros modes."""
INTERLEAVED = {
    2: (0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15),
    4: (0, 2, 4, 6, 1, 3, 5, 7),
    8: (0,),
}
"""Which field of a 32-bit word comes at which place of it, from the least significant."""


def random_weight(
    shape: tuple[int, int, int],
    bits: int,
    mode: ZerosMode,
    act_order: bool = False,
    statistics: torch.dtype = torch.float16,
) -> tuple[BitblasWeight, Tensor]:
    """A weight packed in numpy, and its values [N, K], rounded to float32 after each operation of the format."""
    outputs, inputs, group_size = shape
    rng = np.random.default_rng(outputs + inputs + bits)
    groups = -(-inputs // group_size)
    codes_NK = rng.integers(0, 1 << bits, (outputs, inputs))
    places = list(INTERLEAVED[bits])
    fields_NWP = codes_NK.reshape(outputs, -1, len(places))[:, :, places]
    bytes_NB = bit_stream(fields_NWP.reshape(outputs, -1), bits).view(np.int8)
    scales_NG = torch.from_numpy(rng.normal(0, 0.01, (outputs, groups))).to(statistics)
    largest = (1 << bits) * (0.01 if mode == "rescale" else 1.0)
    zeros_NG = torch.from_numpy(rng.uniform(0, largest, (outputs, groups))).to(statistics)
    order_K = torch.from_numpy(rng.permutation(inputs)) if act_order else None
    weight = BitblasWeight(
        codes_NB=torch.from_numpy(bytes_NB),
        scales_NG=scales_NG,
        zeros_NG=None if mode == "none" else zeros_NG,
        zeros_mode=mode,
        order_K=order_K,
        bits=bits,
        group_size=group_size,
    )
    signed_NK = codes_NK - 256 * (codes_NK > 127) if bits == 8 else codes_NK
    values_NK = defined(torch.from_numpy(signed_NK).double(), weight)
    if order_K is not None:
        values_NK = values_NK[:, torch.argsort(order_K)]
    return weight, values_NK.float()


def defined(codes_NK: Tensor, weight: BitblasWeight) -> Tensor:
    """The format in float64, with the roundings to float32 that it prescribes."""
    group_K = torch.arange(codes_NK.shape[1]) // weight.group_size
    scales_NK = weight.scales_NG.double()[:, group_K]
    if weight.zeros_NG is None:
        return (codes_NK - {2: 2, 4: 8, 8: 0}[weight.bits]) * scales_NK
    zeros_NK = weight.zeros_NG.double()[:, group_K]
    if weight.zeros_mode == "original":
        return (codes_NK - zeros_NK).float().double() * scales_NK
    return (codes_NK * scales_NK).float().double() - zeros_NK


def activations(rows: int, weight: BitblasWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of activations and a bias."""
    generator = torch.Generator().manual_seed(rows)
    outputs, inputs = weight.shape
    return torch.randn(rows, inputs, generator=generator).to(dtype), torch.randn(outputs, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["none", "original", "rescale"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_have_the_bits_of_the_format(
    run_triton: Callable[..., Tensor], bits: int, shape: tuple[int, int, int], mode: ZerosMode, dtype: torch.dtype
) -> None:
    weight, values_NK = random_weight(shape, bits, mode, act_order=shape in SHAPES[::2])
    expected_NK = values_NK.to(dtype)
    assert torch.equal(BITBLAS["reference"].dequantize(weight, dtype), expected_NK)
    assert torch.equal(run_triton(BITBLAS["triton"].dequantize, weight, dtype), expected_NK)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["none", "original", "rescale"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_roundings_in_between_are_the_formats(
    run_triton: Callable[..., Tensor], bits: int, mode: ZerosMode, dtype: torch.dtype
) -> None:
    """With float32 statistics products are not exact, so that a fused multiply-add would show."""
    weight, values_NK = random_weight((40, 256, 64), bits, mode, statistics=torch.float32)
    assert torch.equal(BITBLAS["reference"].dequantize(weight, dtype), values_NK.to(dtype))
    assert torch.equal(run_triton(BITBLAS["triton"].dequantize, weight, dtype), values_NK.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "mode"), PRODUCTS, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_product(
    run_triton: Callable[..., Tensor], bits: int, shape: tuple[int, int, int], mode: ZerosMode, dtype: torch.dtype
) -> None:
    weight, values_NK = random_weight(shape, bits, mode, act_order=mode == "rescale")
    x_MK, bias_N = activations(19, weight, dtype)
    bias = None if mode == "none" else bias_N
    check_product(run_triton(BITBLAS["triton-fused"].linear, x_MK, weight, bias), x_MK, values_NK.to(dtype), bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_do_not_depend_on_the_others(run_triton: Callable[..., Tensor], dtype: torch.dtype) -> None:
    weight, _ = random_weight((40, 160, 32), 4, "original")
    x_MK, bias_N = activations(40, weight, dtype)
    check_invariance(lambda rows_MK: run_triton(BITBLAS["triton-fused"].linear, rows_MK, weight, bias_N), x_MK)
