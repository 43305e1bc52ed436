"""Weights laid out beforehand: the bits of the plain product, or they are not used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.kernels import prepack
from pipeline.kernels.prepack import MOST_TRIED_ROWS, Prepacker, can_multiply

SHAPES = [(512, 512), (1408, 512), (512, 1408), (96, 200), (1024, 768)]


def random_weight(outputs: int, inputs: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs)) * 0.02).to(dtype)


def skip_without_instructions() -> None:
    if not can_multiply(random_weight(16, 16)):
        pytest.skip("oneDNN has no bfloat16 products on this processor")


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_the_bits_are_those_of_the_plain_product(outputs: int, inputs: int, biased: bool) -> None:
    skip_without_instructions()
    weight = random_weight(outputs, inputs)
    bias = random_weight(outputs, 1)[:, 0] if biased else None
    kept = Prepacker([16, 64, 512])(weight, bias)
    if kept is None:
        pytest.skip("the products differ on this processor, so that none is used")
    assert torch.equal(kept.dense(), weight)
    for rows in (16, 48, 64, 512, 700):  # also of sizes that were not tried out
        x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).bfloat16()
        assert torch.equal(kept.product(x, bias), F.linear(x, weight, bias)), rows
        assert torch.equal(kept.product(x[None], bias), F.linear(x[None], weight, bias)), rows


def test_other_bits_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_instructions()
    plain = prepack.multiply

    def one_bit_off(x: Tensor, packed: Tensor, bias_N: Tensor | None) -> Tensor:
        out = plain(x, packed, bias_N)
        if x.shape[0] != 64:
            out.view(torch.int16)[3, 5] ^= 1
        return out

    monkeypatch.setattr(prepack, "multiply", one_bit_off)
    kept = Prepacker([16, 64, 512])(random_weight(512, 512), None)
    assert kept is not None
    assert kept.rows == {64}
    assert Prepacker([16, 512])(random_weight(512, 512), None) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_stay_as_they_are(dtype: torch.dtype) -> None:
    assert Prepacker([64])(random_weight(64, 64, dtype), None) is None


def test_without_rows_to_try_nothing_is_laid_out() -> None:
    weight = random_weight(64, 64)
    assert Prepacker([])(weight, None) is None
    assert Prepacker([MOST_TRIED_ROWS + 1])(weight, None) is None
