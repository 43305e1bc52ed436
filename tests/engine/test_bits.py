"""A row's answer is the same, bit for bit, whatever stands beside it and whenever it was submitted.

Completions are compared with ==: token ids, finish reasons and every log-probability's last bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import MAX_POSITIONS, Collector, EngineUnderTest, drive, random_prompt

from pipeline.core import Request, SamplingParams

MODELS = [
    pytest.param(dtype, quant, id=f"{str(dtype).removeprefix('torch.')}-{quant}")
    for dtype in (torch.float32, torch.bfloat16)
    for quant in ("none", "nf4")
]
THREADS = [
    pytest.param(1, id="1thread"),
    pytest.param(2, id="2threads", marks=pytest.mark.slow),
    pytest.param(3, id="3threads", marks=pytest.mark.slow),
]


def varied_rows(count: int, seed: int = 0) -> list[Request]:
    """Greedy, sampled and filtered rows and rows to score, short and long, all in one job."""
    rng = random.Random(seed)
    return [_varied_row(rng, n) for n in range(count)]


def _varied_row(rng: random.Random, n: int) -> Request:
    prompt = random_prompt(rng, rng.choice([1, 2, 7, 8, 9, 31, 33, 100, 129, 230, 270, 400]))
    if n % 8 == 7:
        return _text_row(rng, n, prompt)
    if n % 4 == 3:
        candidates = tuple(random_prompt(rng, rng.choice([1, 2, 3])) for _ in range(rng.choice([2, 7])))
        shared = tuple((17, 18, token) for token in range(20, 23))
        return Request(id=n, prompt_ids=prompt, candidates=candidates + shared)
    settings: dict[str, Any] = [
        {},
        {"temperature": 0.8, "seed": n},
        {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "seed": n},
        {"repetition_penalty": 1.3, "logprobs": 3},
        {"temperature": 1.1, "min_p": 0.05, "repetition_penalty": 0.8, "seed": n},
        {"temperature": 0.9, "top_k": 30, "min_p": 0.02, "logprobs": n % 6, "seed": n},
        {"temperature": 1.2, "seed": n, "stop": ("ab", "é", "fc")},
    ][n % 7]
    return Request(
        id=n,
        prompt_ids=prompt,
        sampling=SamplingParams(max_new_tokens=rng.choice([1, 6, 17]), stop_token_ids=tuple(range(2, 40)), **settings),
    )


def _text_row(rng: random.Random, n: int, prompt: tuple[int, ...]) -> Request:
    """A target, the prompt or both to score, with or without the likeliest tokens at each place."""
    kind = n // 8
    target = random_prompt(rng, rng.choice([1, 2, 40, 100])) if kind % 3 else ()
    sampling = SamplingParams(logprobs=(None, 0, 2, 5)[kind % 4])
    return Request(
        id=n,
        prompt_ids=(5, *prompt),
        sampling=sampling,
        target_ids=target,
        score_prompt=not target or kind % 2 == 0,
    )


@pytest.fixture(params=THREADS)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def wide(
    checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> Callable[[torch.dtype, str], EngineUnderTest]:
    """An engine whose matrices are wide enough for BLAS to have a choice of kernels, made as a run makes it."""
    return lambda dtype, quant: build_engine(checkpoint_folder("llama-wide"), dtype, quant, settled=True, slots=32)


@pytest.mark.parametrize(("dtype", "quant"), MODELS)
def test_order_and_time_of_submission(
    wide: Callable[..., EngineUnderTest], dtype: torch.dtype, quant: str, threads: int
) -> None:
    rows = varied_rows(48)
    engine = wide(dtype, quant)
    expected = engine.answer(rows)
    assert len({t for c in expected.values() for t in c.token_ids}) > 50
    assert all(c.error is None for c in expected.values())
    shuffled = random.Random(1).sample(rows, len(rows))
    assert engine.answer(shuffled) == expected
    assert engine.answer(reversed(rows)) == expected
    assert drive(engine.engine(), shuffled, polls_between=1) == expected


@pytest.mark.parametrize(("dtype", "quant"), MODELS)
def test_a_row_alone(wide: Callable[..., EngineUnderTest], dtype: torch.dtype, quant: str, threads: int) -> None:
    rows = varied_rows(48)
    engine = wide(dtype, quant)
    expected = engine.answer(rows)
    for row in rows[::3]:
        assert engine.answer([row]) == {row.id: expected[row.id]}


@pytest.mark.parametrize(("dtype", "quant"), MODELS)
def test_other_neighbours(wide: Callable[..., EngineUnderTest], dtype: torch.dtype, quant: str) -> None:
    rows, others = varied_rows(24), varied_rows(60, seed=99)
    engine = wide(dtype, quant)
    expected = engine.answer(rows)
    crowd = rows + [replace(r, id=("other", r.id)) for r in others]
    answers = engine.answer(random.Random(2).sample(crowd, len(crowd)))
    assert {n: answers[n] for n in expected} == expected


@pytest.mark.parametrize(("dtype", "quant"), MODELS)
def test_half_of_the_rows_cancelled(wide: Callable[..., EngineUnderTest], dtype: torch.dtype, quant: str) -> None:
    """Some before they reach the device, some while they are decoded; nothing more is reported of them."""
    rows = varied_rows(48)
    under_test = wide(dtype, quant)
    expected = under_test.answer(rows)
    engine = under_test.engine()
    for row in rows:
        engine.submit(row)
    for row in rows[::4]:
        engine.cancel(row.id)
    collector = Collector(engine)
    collector.poll()
    seen = set(collector.done)
    for row in rows[1::4]:
        engine.cancel(row.id)
    engine.cancel("nobody")
    gone = {r.id for r in (*rows[::4], *rows[1::4])} - seen
    assert len(gone) > len(rows[::4]), "some were cancelled while they were decoded"
    assert engine.unfinished == len(rows) - len(seen | gone)
    while engine.unfinished:
        collector.poll()
    assert collector.done == {n: c for n, c in expected.items() if n not in gone}


@pytest.mark.parametrize(("dtype", "quant"), MODELS)
def test_a_used_engine_answers_like_a_fresh_one(
    wide: Callable[..., EngineUnderTest], dtype: torch.dtype, quant: str
) -> None:
    """What earlier rows left in the slots is not seen."""
    rows = varied_rows(32)
    under_test = wide(dtype, quant)
    expected = under_test.answer(rows)
    used = under_test.engine()
    drive(used, varied_rows(40, seed=7))
    assert drive(used, rows) == expected


@pytest.mark.parametrize(
    ("dtype", "quant"), [MODELS[0], *(pytest.param(*m.values, id=m.id, marks=pytest.mark.slow) for m in MODELS[1:])]
)
def test_number_of_threads(wide: Callable[..., EngineUnderTest], dtype: torch.dtype, quant: str) -> None:
    rows = varied_rows(7)
    engine = wide(dtype, quant)
    expected = engine.answer(rows)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert engine.answer(rows) == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("out_features", [509, 1000, 1376])
@pytest.mark.parametrize("in_features", [64, 250, 688, 2048])
def test_matrix_products_of_listed_shapes_give_a_row_equal_bits(
    dtype: torch.dtype,
    in_features: int,
    out_features: int,
    threads: int,
    checkpoint_folder: Callable[[str], Path],
    build_engine: Callable[..., Any],
) -> None:
    """What the shapes rest on: in a product of a listed size a row's bits depend on nothing but the row.

    They do depend on the size, with some libraries, dtypes and numbers of threads.
    """
    plan = build_engine(checkpoint_folder("llama")).plan
    listed = {*plan.prefill_tokens, plan.logit_rows, *(c.slots for c in plan.length_classes)}
    assert max(listed) >= MAX_POSITIONS
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features).to(dtype)
    for rows in sorted(listed):
        x = torch.randn(rows, in_features).to(dtype)
        whole = torch.nn.functional.linear(x, weight)
        order = torch.randperm(rows)
        assert torch.equal(torch.nn.functional.linear(x[order], weight), whole[order]), rows
        kept = torch.arange(rows) % 3 == 1
        others = torch.where(kept[:, None], x, torch.randn(rows, in_features).to(dtype) * 9)
        assert torch.equal(torch.nn.functional.linear(others, weight)[kept], whole[kept]), rows
