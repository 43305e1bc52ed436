"""Rows side by side in Triton, against the pass that goes row by row and against a float64 softmax."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_process import TritonProcess

from pipeline.kernels.attention import AttentionRule
from pipeline.kernels.triton_prefill import attend_rows, tiles_of

LENGTHS = (1, 70, 33, 64, 2)
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3}
KINDS = [
    pytest.param((4, 4, 16, 0), AttentionRule(0.25), id="ungrouped"),
    pytest.param((6, 2, 40, 37), AttentionRule(0.2), id="groups-behind-37"),
    pytest.param((4, 1, 64, 70), AttentionRule(0.1, 33, 5.0), id="window-capped-behind-70"),
    pytest.param((2, 2, 256, 0), AttentionRule(0.06, 40), id="long-heads-window"),
]


def a_pass(
    shape: tuple[int, ...], lengths: Sequence[int], dtype: torch.dtype
) -> tuple[list[Tensor], tuple[Tensor, Tensor] | None, list[tuple[int, int]]]:
    """Queries, keys and values of a pass with padding between and behind the rows; what the rows begin with."""
    heads, kv_heads, dim, earlier = shape
    rows, at = [], 3
    for length in lengths:
        rows.append((at, length))
        at += length + 2
    torch.manual_seed(dim)
    before = tuple(torch.randn(kv_heads, earlier, dim).to(dtype) for _ in range(2)) if earlier else None
    qkv = [torch.randn(count, at + 5, dim).to(dtype) for count in (heads, kv_heads, kv_heads)]
    return qkv, before, rows  # type: ignore[return-value]


def oracle(q: Tensor, k: Tensor, v: Tensor, before: tuple[Tensor, Tensor] | None, rule: AttentionRule) -> Tensor:
    """[H, T, D] of one row in float64."""
    if before is not None:
        k, v = torch.cat([before[0], k], dim=1), torch.cat([before[1], v], dim=1)
    groups, tokens, keys = q.shape[0] // k.shape[0], q.shape[1], k.shape[1]
    k, v = (x.double().repeat_interleave(groups, dim=0) for x in (k, v))
    scores = q.double() @ k.transpose(1, 2) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    place = torch.arange(keys - tokens, keys)[:, None]
    seen = torch.arange(keys) <= place
    if rule.window is not None:
        seen &= torch.arange(keys) > place - rule.window
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ v


def run(interpreter: TritonProcess, qkv: list[Tensor], rows: Any, before: Any, rule: AttentionRule) -> Tensor:
    heads, tokens, dim = qkv[0].shape
    out = torch.zeros(tokens, heads, dim, dtype=qkv[0].dtype)
    tiles = tiles_of(rows, torch.device("cpu"))
    result: Tensor = interpreter(attend_rows, *qkv, tiles, before, rule, out)
    return result


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("shape", "rule"), KINDS)
def test_each_row_looks_at_its_beginning_and_itself(
    shape: tuple[int, ...], rule: AttentionRule, dtype: torch.dtype, interpreter: TritonProcess
) -> None:
    qkv, before, rows = a_pass(shape, LENGTHS, dtype)
    out = run(interpreter, qkv, rows, before, rule)
    in_rows = torch.zeros(out.shape[0], dtype=torch.bool)
    for begin, length in rows:
        here = slice(begin, begin + length)
        in_rows[here] = True
        expected = oracle(*(x[:, here] for x in qkv), before, rule).transpose(0, 1)
        assert float((out[here].double() - expected).abs().max()) < TOLERANCE[dtype]
    assert not out[~in_rows].any()


@pytest.mark.parametrize("rule", [AttentionRule(0.2), AttentionRule(0.2, 20)], ids=["all", "window"])
def test_a_rows_bits_do_not_depend_on_its_place_or_the_others(rule: AttentionRule, interpreter: TritonProcess) -> None:
    qkv, before, rows = a_pass((4, 2, 32, 37), LENGTHS, torch.bfloat16)
    out = run(interpreter, qkv, rows, before, rule)
    order = random.Random(1).sample(range(len(rows)), len(rows))
    moved, at, places = [torch.full_like(x, 7.0) for x in qkv], 1, {}
    for index in order:
        begin, length = rows[index]
        for new, old in zip(moved, qkv, strict=True):
            new[:, at : at + length] = old[:, begin : begin + length]
        places[index] = (at, length)
        at += length
    again = run(interpreter, moved, [places[index] for index in order], before, rule)
    for index, (begin, length) in enumerate(rows):
        at = places[index][0]
        assert torch.equal(again[at : at + length], out[begin : begin + length])
