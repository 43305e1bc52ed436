"""A row whose logits are not finite becomes an error row, and nobody else notices."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import drive, greedy, random_prompt, save_checkpoint
from safetensors.torch import load_file, save_file

from pipeline.core import FinishReason, Request, SamplingParams

BROKEN = 79
"""The token whose embedding is broken: one that the model often answers with."""


def break_embedding(folder: Path, token: int, value: float) -> Path:
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=[float("nan"), float("inf")], ids=["nan", "inf"])
def broken_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_checkpoint("llama", tmp_path_factory.mktemp("broken"))
    return break_embedding(folder, BROKEN, request.param)


def prompts_without(token: int, count: int, seed: int) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    drawn = (random_prompt(rng, rng.choice([1, 5, 30, 90])) for _ in range(10 * count))
    return [p for p in drawn if token not in p][:count]


def rows_of(prompts: list[tuple[int, ...]], name: str) -> list[Request]:
    sampled = SamplingParams(max_new_tokens=9, temperature=0.9, top_p=0.9, stop_token_ids=(BROKEN,))
    rows = []
    for n, prompt in enumerate(prompts):
        rows.append(greedy((name, "greedy", n), prompt, 9, BROKEN))
        rows.append(Request(id=(name, "sampled", n), prompt_ids=prompt, sampling=sampled))
        rows.append(Request(id=(name, "scored", n), prompt_ids=prompt, candidates=((5, 6), (5, 7), (8,))))
        rows.append(Request(id=(name, "text", n), prompt_ids=prompt, target_ids=(5, 6, 7), score_prompt=n % 2 > 0))
    return rows


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_only_rows_with_the_broken_token_are_error_rows(
    broken_folder: Path,
    quant: str,
    checkpoint_folder: Callable[[str], Path],
    build_engine: Callable[..., Any],
) -> None:
    """Their neighbours answer as they do in a model that is whole, bit for bit."""
    good = rows_of(prompts_without(BROKEN, 20, seed=0), "good")
    bad = rows_of([(*p, BROKEN, *p) for p in prompts_without(BROKEN, 10, seed=1)], "bad")
    whole = build_engine(checkpoint_folder("llama"), torch.float32, quant, slots=16).answer(good)
    mixed = random.Random(2).sample(good + bad, len(good) + len(bad))
    answers = build_engine(broken_folder, torch.float32, quant, slots=16).answer(mixed)
    for row in bad:
        completion = answers[row.id]
        assert completion.finish_reason is FinishReason.ERROR
        assert "not finite" in (completion.error or "")
        assert completion.token_ids == completion.candidate_logprobs == ()
        assert completion.cumulative_logprob is completion.prompt_logprob is None
    assert {row.id: answers[row.id] for row in good} == whole
    assert all(c.error is None for c in whole.values())


def test_a_slot_is_clean_after_an_error_row(
    broken_folder: Path, checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    """Every slot held a broken row, longer than the rows that come after it."""
    good = [greedy(n, p, 9, BROKEN) for n, p in enumerate(prompts_without(BROKEN, 40, seed=3))]
    bad = [greedy(("bad", n), (5,) * 100 + (BROKEN,) * 20, 9) for n in range(32)]
    engine = build_engine(broken_folder, slots=16).engine()
    assert all(c.error for c in drive(engine, bad).values())
    assert drive(engine, good) == build_engine(checkpoint_folder("llama"), slots=16).answer(good)


@pytest.mark.parametrize("polls_between", [0, 1])
def test_a_slot_is_clean_after_a_row_that_stopped_at_the_broken_token(
    polls_between: int,
    broken_folder: Path,
    checkpoint_folder: Callable[[str], Path],
    build_engine: Callable[..., Any],
) -> None:
    """The row ended well; the steps that its slot still ran on the stop token were not finite."""
    prompts = prompts_without(BROKEN, 150, seed=4)
    whole = build_engine(checkpoint_folder("llama"), slots=16)
    rows = [greedy(n, p, 24, BROKEN) for n, p in enumerate(prompts)]
    expected = whole.answer(rows)
    stopped = [n for n, c in expected.items() if c.finish_reason is FinishReason.STOP]
    assert len(stopped) >= 8
    answers = drive(build_engine(broken_folder, slots=16).engine(), rows, polls_between=polls_between)
    assert [n for n, c in answers.items() if c.error] == []
    assert answers == expected


def test_a_slot_is_clean_after_a_cancelled_row(
    broken_folder: Path, checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    """A freed slot is decoded along with the others; what it computes there must not reach its next row."""
    prompts = prompts_without(BROKEN, 60, seed=5)
    rows = [greedy(n, p, 24) for n, p in enumerate(prompts)]
    expected = build_engine(checkpoint_folder("llama"), slots=16).answer(rows)
    affected = {n for n, c in expected.items() if BROKEN in c.token_ids[:-1]}
    engine = build_engine(broken_folder, slots=16).engine()
    for n in range(16):
        engine.submit(greedy(("first", n), prompts[n], 200))
    engine.poll()
    for n in range(16):
        engine.cancel(("first", n))
    answers = drive(engine, rows)
    assert {n for n, c in answers.items() if c.error} == affected
    assert {n: c for n, c in answers.items() if n not in affected} == {
        n: c for n, c in expected.items() if n not in affected
    }


def test_a_greedy_row_that_reaches_the_broken_token_is_an_error_row(
    broken_folder: Path, checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    """The row breaks while it is decoded, not in its prompt."""
    rows = [greedy(n, p, 24) for n, p in enumerate(prompts_without(BROKEN, 100, seed=6))]
    expected = build_engine(checkpoint_folder("llama")).answer(rows)
    affected = {n for n, c in expected.items() if BROKEN in c.token_ids[:-1]}
    assert len(affected) >= 5
    answers = build_engine(broken_folder).answer(rows)
    assert {n for n, c in answers.items() if c.error} == affected
    assert all(answers[n] == expected[n] for n in answers if n not in affected)


def test_a_request_with_a_broken_choice_is_an_error_row(
    broken_folder: Path, checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    """Some of its answers are good; the row says what went wrong, as it has one reason to end."""
    sampling = SamplingParams(max_new_tokens=24, temperature=0.8, n=4)
    rows = [Request(id=n, prompt_ids=p, sampling=sampling) for n, p in enumerate(prompts_without(BROKEN, 30, seed=7))]
    expected = build_engine(checkpoint_folder("llama")).answer(rows)
    affected = {n for n, c in expected.items() if any(BROKEN in choice.token_ids[:-1] for choice in c.choices)}
    assert 3 <= len(affected) < len(rows)
    answers = build_engine(broken_folder).answer(rows)
    assert {n for n, c in answers.items() if c.finish_reason is FinishReason.ERROR} == affected
    assert all("not finite" in (answers[n].error or "") and answers[n].token_ids == () for n in affected)
    assert all(answers[n] == expected[n] for n in answers if n not in affected)
