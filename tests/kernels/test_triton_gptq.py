"""GPTQ weights in Triton and in plain torch, against the format's definition in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from triton_checks import DTYPES, bit_stream, check_invariance, check_product

from pipeline.kernels.packed_gptq import GptqWeight
from pipeline.kernels.registry import GPTQ

SHAPES = [(72, 96, 32), (33, 192, 96), (40, 160, 20), (64, 288, 128), (7, 320, 320)]
"""Outputs, inputs and group size: of whole words or not, several in a block of the kernel or one in several."""


def random_weight(
    shape: tuple[int, int, int], bits: int, act_order: bool = False, scales: torch.dtype = torch.float16
) -> tuple[GptqWeight, Tensor]:
    """A weight packed in numpy, and its values [N, K]: exact, then rounded to float32."""
    outputs, inputs, group_size = shape
    rng = np.random.default_rng(outputs + inputs + bits)
    groups = -(-inputs // group_size)
    codes_KN = rng.integers(0, 1 << bits, (inputs, outputs))
    words_WN = bit_stream(codes_KN.T, bits).view("<i4").T
    zeros_GN = rng.integers(0, 1 << bits, (groups, outputs))
    scales_GN = torch.from_numpy(rng.normal(0, 0.01, (groups, outputs))).to(scales)
    group_K = np.arange(inputs) // group_size
    if act_order:
        group_K = rng.permutation(group_K)
    exact_KN = (codes_KN - zeros_GN[group_K]) * scales_GN.double().numpy()[group_K]
    weight = GptqWeight(
        words_WN=torch.from_numpy(words_WN.copy()),
        zeros_GN=torch.from_numpy(zeros_GN).to(torch.uint8),
        scales_GN=scales_GN,
        group_K=torch.from_numpy(group_K).to(torch.int32),
        bits=bits,
        group_size=group_size,
        act_order=act_order,
    )
    return weight, torch.from_numpy(exact_KN.T).float()


def activations(rows: int, weight: GptqWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of activations and a bias."""
    generator = torch.Generator().manual_seed(rows)
    outputs, inputs = weight.shape
    return torch.randn(rows, inputs, generator=generator).to(dtype), torch.randn(outputs, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_have_the_bits_of_the_format(
    run_triton: Callable[..., Tensor], bits: int, shape: tuple[int, int, int], act_order: bool, dtype: torch.dtype
) -> None:
    weight, values_NK = random_weight(shape, bits, act_order)
    expected_NK = values_NK.to(dtype)
    assert torch.equal(GPTQ["reference"].dequantize(weight, dtype), expected_NK)
    assert torch.equal(run_triton(GPTQ["triton"].dequantize, weight, dtype), expected_NK)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16], ids=["float32-scales", "bfloat16-scales"])
def test_scales_may_have_any_dtype(run_triton: Callable[..., Tensor], scales: torch.dtype, dtype: torch.dtype) -> None:
    weight, values_NK = random_weight((40, 256, 128), 4, scales=scales)
    assert torch.equal(run_triton(GPTQ["triton"].dequantize, weight, dtype), values_NK.to(dtype))
    x_MK, bias_N = activations(5, weight, dtype)
    check_product(run_triton(GPTQ["triton-fused"].linear, x_MK, weight, bias_N), x_MK, values_NK.to(dtype), bias_N)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_product(
    run_triton: Callable[..., Tensor], bits: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    weight, values_NK = random_weight(shape, bits, act_order=shape == SHAPES[1])
    x_MK, bias_N = activations(19, weight, dtype)
    bias = None if shape == SHAPES[2] else bias_N
    check_product(run_triton(GPTQ["triton-fused"].linear, x_MK, weight, bias), x_MK, values_NK.to(dtype), bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_do_not_depend_on_the_others(run_triton: Callable[..., Tensor], dtype: torch.dtype) -> None:
    weight, _ = random_weight((40, 160, 32), 4)
    x_MK, bias_N = activations(40, weight, dtype)
    check_invariance(lambda rows_MK: run_triton(GPTQ["triton-fused"].linear, rows_MK, weight, bias_N), x_MK)


def test_no_rows(run_triton: Callable[..., Tensor]) -> None:
    weight, _ = random_weight((72, 288, 96), 4)
    assert run_triton(GPTQ["triton-fused"].linear, torch.empty(0, 288), weight, None).shape == (0, 72)
