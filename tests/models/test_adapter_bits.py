"""Under an adapter too a row's answer is the same, bit for bit, whatever stands beside it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from adapters import low_rank, write_adapter
from oracle import CHECKPOINTS, SMALL, EngineUnderTest, random_prompt

from pipeline.core import Request, SamplingParams
from pipeline.models.lora import narrow_product, pad_rank

THREADS = (1, 2, 16)
"""Also more than there are cores: BLAS shares out by the number it is told."""


@pytest.fixture(params=THREADS)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("inputs", [250, 2048])
@pytest.mark.parametrize("rank", [1, 20, 256])
def test_an_updates_products_give_a_row_equal_bits(rank: int, inputs: int, threads: int) -> None:
    """At every place, and for every number of rows that a pass has: multiples of 16."""
    torch.manual_seed(0)
    a_RK, b_NR = pad_rank(torch.randn(rank, inputs), torch.randn(500, rank))
    x_TK = torch.randn(320, inputs)
    low_TR = narrow_product(x_TK, a_RK)
    wide_TN = narrow_product(low_TR, b_NR)
    for rows in (16, 32, 48, 80, 128, 256):
        for first in (0, 320 - rows):
            here = slice(first, first + rows)
            assert torch.equal(narrow_product(x_TK[here].contiguous(), a_RK), low_TR[here]), rows
            assert torch.equal(narrow_product(low_TR[here].contiguous(), b_NR), wide_TN[here]), rows


@pytest.mark.parametrize("rank", [1, 8, 20])
def test_products_in_pieces_are_the_product(rank: int) -> None:
    """Against float64; ranks that are padded with zeros give the same."""
    torch.manual_seed(0)
    a_RK, b_NR = torch.randn(rank, 1300), torch.randn(70, rank)
    x_TK = torch.randn(2, 16, 1300)
    padded = pad_rank(a_RK, b_NR)
    assert [matrix.shape for matrix in padded] == [(-(-rank // 16) * 16, 1300), (70, -(-rank // 16) * 16)]
    exact = x_TK.double() @ a_RK.double().T @ b_NR.double().T
    found = narrow_product(narrow_product(x_TK, padded[0]), padded[1])
    assert float((found - exact).abs().max() / exact.abs().max()) < 1e-6


@pytest.fixture(scope="module")
def wide_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 20 on every Linear of llama-wide."""
    sizes = {**SMALL, **CHECKPOINTS["llama-wide"][1]}
    hidden, inner, keys = sizes["hidden_size"], sizes["intermediate_size"], 2 * sizes["head_dim"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, keys), "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }  # fmt: skip
    tensors = {}
    for layer in range(sizes["num_hidden_layers"]):
        for name, (inputs, outputs) in shapes.items():
            tensors |= low_rank(f"model.layers.{layer}.{name}", inputs, outputs, 20, seed=layer)
    tensors |= low_rank("lm_head", hidden, sizes["vocab_size"], 20)
    return write_adapter(tmp_path_factory.mktemp("adapter"), tensors, r=20)


@pytest.mark.parametrize(
    ("dtype", "quant"),
    [
        (torch.bfloat16, "none"),
        (torch.float32, "nf4"),
        pytest.param(torch.float32, "none", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, "nf4", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_order_and_neighbours(
    dtype: torch.dtype,
    quant: str,
    wide_adapter: Path,
    checkpoint_folder: Callable[[str], Path],
    build_engine: Callable[..., EngineUnderTest],
) -> None:
    rng = random.Random(0)
    rows = [
        Request(
            id=n,
            prompt_ids=random_prompt(rng, rng.choice([1, 7, 31, 100, 230])),
            sampling=SamplingParams(max_new_tokens=12, temperature=(n % 2) * 0.9, seed=n, logprobs=2),
        )
        for n in range(32)
    ]
    folder = checkpoint_folder("llama-wide")
    under_test = build_engine(folder, dtype, quant, adapter=wide_adapter, slots=32)
    together = under_test.answer(rows)
    assert under_test.answer(random.Random(1).sample(rows, len(rows))) == together
    for row in rows[::5]:
        assert under_test.answer([row]) == {row.id: together[row.id]}
    assert build_engine(folder, dtype, quant, slots=32).answer(rows) != together, "the adapter changes the answers"
