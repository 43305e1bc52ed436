"""Functions of single values: the same bits wherever a value stands, on any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.kernels.elementwise import seamless

FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "mish": F.mish,
    "softplus": F.softplus,
    "elu": F.elu,
}
SHAPES = ((1, 7), (3, 21), (5, 100), (64, 1408), (33, 1000), (7, 50257), (250, 704), (9, 8193), (16, 2048))
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def one_row_at_a_time(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Each value's own bits: a row, made longer to whole vectors, on one thread."""
    torch.set_num_threads(1)
    padded = F.pad(x, (0, -x.shape[1] % 64))
    return torch.cat([function(row) for row in padded])[:, None].reshape(padded.shape)[:, : x.shape[1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_value_has_the_same_bits_everywhere(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * 3).to(dtype)
    expected = one_row_at_a_time(FUNCTIONS[name], x)
    for threads in (1, 2, 3, 5, 7, 8, 12, 20, 57):
        torch.set_num_threads(threads)
        assert torch.equal(seamless(FUNCTIONS[name], x), expected), f"{threads} threads"
        moved = x.roll(1, 0)
        assert torch.equal(seamless(FUNCTIONS[name], moved), expected.roll(1, 0)), f"{threads} threads"


def test_torch_alone_has_other_bits_at_the_ends_of_its_pieces() -> None:
    """If this fails, torch has mended it and `seamless` can go."""
    torch.manual_seed(0)
    x = torch.randn(64, 1408) * 3
    torch.set_num_threads(3)
    assert not torch.equal(F.silu(x), one_row_at_a_time(F.silu, x))


@pytest.mark.parametrize(
    "x", [torch.randn(64, 200).t(), torch.randn(40, 90)[:, 5:70], torch.randn(0, 5), torch.ones(())]
)
def test_shapes_and_strides(x: Tensor) -> None:
    out = seamless(F.silu, x)
    assert out.shape == x.shape
    torch.testing.assert_close(out, x / (1 + torch.exp(-x)))
