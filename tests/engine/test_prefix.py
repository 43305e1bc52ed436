"""Beginnings that prompts share are run once; answers and their bits are those of every row alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import EngineUnderTest, drive, greedy, oracle_generate_all, oracle_logprob, random_prompt, save_checkpoint

from pipeline.core import Request, SamplingParams
from pipeline.engine.prefix import Splits

HEAD = tuple(range(40, 75))
SPLITS = [
    pytest.param(Splits(head=HEAD), id="head"),
    pytest.param(Splits(grid=32), id="grid"),
    pytest.param(Splits(head=HEAD, grid=64), id="head-and-grid"),
]
MODELS = {
    "llama": {},
    "llama-one-head": {},
    "mistral-window": {"base": "mistral", "sliding_window": 24},
    "qwen3": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            changes = dict(MODELS[name])
            base = str(changes.pop("base", name))
            made[name] = save_checkpoint(base, tmp_path_factory.mktemp("models") / name, **changes)
        return made[name]

    return find


def rows_with_beginnings(count: int, seed: int = 0) -> list[Request]:
    """Prompts with the template's head, others that nearly have it, and two groups that share more than that."""
    rng = random.Random(seed)
    groups = [HEAD + random_prompt(rng, 90), HEAD + random_prompt(rng, 90)[:64], random_prompt(rng, 70)]
    rows = []
    for n in range(count):
        beginning = (HEAD, (*HEAD[:-1], 7), *groups, ())[n % 6]
        rest = random_prompt(rng, rng.choice([1, 2, 15, 31, 33, 70, 140]))
        row = greedy(n, (*beginning, *rest), rng.choice([1, 3, 8]))
        if n % 5 == 3:
            row = replace(row, candidates=((5, 6), (5, 7), (8,)))
        elif n % 5 == 4:
            row = replace(row, target_ids=random_prompt(rng, 9), score_prompt=n % 2 == 0)
        elif n % 5 == 2:
            row = replace(row, sampling=SamplingParams(max_new_tokens=6, temperature=1.0, seed=n, n=2))
        rows.append(row)
    return rows


def under(build_engine: Callable[..., Any], folder: Path, splits: Splits, **settings: Any) -> EngineUnderTest:
    built: EngineUnderTest = build_engine(folder, settings.pop("dtype", torch.float32), slots=16, prefill_tokens=128)
    return replace(built, splits=splits, **settings)


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("model", MODELS)
def test_greedy_answers_are_those_of_generate(
    model: str,
    splits: Splits,
    folder: Callable[[str], Path],
    build_engine: Callable[..., Any],
    reference: Callable[..., Any],
) -> None:
    rng = random.Random(3)
    rows = [greedy(n, HEAD[: n % 2 * 35] + random_prompt(rng, 1 + 11 * n), 12) for n in range(16)]
    answers = under(build_engine, folder(model), splits).answer(rows)
    expected = oracle_generate_all(reference(folder(model)), rows)
    for row in rows:
        assert answers[row.id].token_ids == expected[row.id].token_ids, row.id


@pytest.mark.parametrize("splits", SPLITS)
def test_scores_are_those_of_transformers(
    splits: Splits, folder: Callable[[str], Path], build_engine: Callable[..., Any], reference: Callable[..., Any]
) -> None:
    rows = [r for r in rows_with_beginnings(40) if r.candidates or r.target_ids]
    answers = under(build_engine, folder("llama"), splits).answer(rows)
    model = reference(folder("llama"))
    for row in rows:
        if row.candidates:
            expected = [oracle_logprob(model, row.prompt_ids, c) for c in row.candidates]
            assert answers[row.id].candidate_logprobs == pytest.approx(expected, abs=2e-4)
        else:
            expected_logprob = oracle_logprob(model, row.prompt_ids, row.target_ids)
            assert answers[row.id].cumulative_logprob == pytest.approx(expected_logprob, abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("splits", SPLITS)
def test_bits_do_not_depend_on_who_shares(
    splits: Splits, dtype: torch.dtype, folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    """Alone, in any order, in time, and with segments that have to be run again because few are kept."""
    rows = rows_with_beginnings(36)
    engine = under(build_engine, folder("llama"), splits, dtype=dtype)
    expected = engine.answer(rows)
    assert all(c.error is None for c in expected.values())
    assert engine.answer(random.Random(1).sample(rows, len(rows))) == expected
    assert drive(engine.engine(), reversed(rows), polls_between=1) == expected
    assert replace(engine, prefix_tokens=1).answer(rows) == expected
    for row in rows[::5]:
        assert engine.answer([row]) == {row.id: expected[row.id]}


def test_a_beginning_is_run_once(folder: Callable[[str], Path], build_engine: Callable[..., Any]) -> None:
    rng = random.Random(5)
    rows = [greedy(n, HEAD + random_prompt(rng, 9), 1) for n in range(50)]
    engine = under(build_engine, folder("llama"), Splits(head=HEAD)).engine()
    drive(engine, rows)
    assert engine.counters.prefix_tokens == len(HEAD)
    assert engine.counters.prompt_tokens == 50 * 9


@given(head=st.integers(0, 60), grid=st.sampled_from([0, 16, 32]), length=st.integers(1, 200), same=st.booleans())
def test_cuts_leave_a_last_segment_and_depend_on_the_prompt_alone(
    head: int, grid: int, length: int, same: bool
) -> None:
    splits = Splits(head=tuple(range(head)), grid=grid)
    prompt = tuple(range(length)) if same else tuple(range(1, length + 1))
    cuts = splits.cuts(prompt)
    ends = [cut.end for cut in cuts]
    assert ends == sorted(set(ends))
    assert all(0 < end < length for end in ends)
    if head >= 16 and same and length > head:
        assert ends[0] == head
    if grid:
        assert all(b - a <= max(grid, head) for a, b in zip([0, *ends], [*ends, length], strict=True))
    longer = splits.cuts((*prompt, 9))
    if length == head:
        return  # nothing but the head: there is no row's own segment behind it
    assert longer[: len(cuts)] == cuts, "a prompt that goes on has the same beginnings"
