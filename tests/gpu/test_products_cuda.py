"""Matrix products at the sizes of real models: a row's bits must not depend on its place or on the other rows.

All else rests on it, and the small models of the other tests do not show it: libraries choose kernels by size, and one
that shares a product out unevenly over the multiprocessors would sum up some rows otherwise than others.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.head import product_in_float32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
LINEARS = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (11008, 4096), (4096, 11008)]
"""Outputs and inputs of the Linears of Llama-3-8B and Llama-2-7B."""
HEADS = [(128256, 4096), (32000, 4096)]


def a_product(shape: tuple[int, int], rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(CUDA).manual_seed(rows)
    x_MK, w_NK = (
        torch.randn(count, shape[1], device=CUDA, generator=generator).to(torch.bfloat16) for count in (rows, shape[0])
    )
    return x_MK, w_NK


def check(product: Callable[[Tensor], Tensor], x_MK: Tensor) -> None:
    """The product again, with the rows in another order, and with every second row replaced."""
    whole_MN = product(x_MK)
    assert torch.equal(product(x_MK), whole_MN), "again"
    order_M = torch.randperm(len(x_MK), generator=torch.Generator().manual_seed(1)).to(CUDA)
    assert torch.equal(product(x_MK[order_M]), whole_MN[order_M]), "in another order"
    others_MK = x_MK.clone()
    others_MK[1::2] = 100 * x_MK.flip(0)[1::2]
    assert torch.equal(product(others_MK)[::2], whole_MN[::2]), "beside other rows"


@pytest.mark.parametrize("rows", [16, 64, 128, 256, 512, 8192])
@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_linears(shape: tuple[int, int], rows: int) -> None:
    x_MK, w_NK = a_product(shape, rows)
    check(lambda x: F.linear(x, w_NK), x_MK)
    check(lambda x: F.linear(x, w_NK, w_NK[:, 0].contiguous()), x_MK)


@pytest.mark.parametrize("rows", [16, 64, 256, 512])
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_heads(shape: tuple[int, int], rows: int) -> None:
    x_MK, w_NK = a_product(shape, rows)
    check(lambda x: product_in_float32(x, w_NK, None), x_MK)


@pytest.mark.parametrize("shape", [LINEARS[2], LINEARS[3]], ids=str)
def test_a_captured_product_has_the_same_bits(shape: tuple[int, int]) -> None:
    """Also where the library brings memory of its own, which a graph allocates anew."""
    x_MK, w_NK = a_product(shape, 512)
    expected_MN = F.linear(x_MK, w_NK)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_MN = F.linear(x_MK, w_NK)
    graph.replay()
    assert torch.equal(out_MN, expected_MN)
