"""Equal requests are computed once, and nobody can tell but by the time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Collector, drive, greedy, random_prompt

from pipeline.core import Request, SamplingParams
from pipeline.engine.dedup import DedupEngine


@pytest.fixture(scope="module")
def under_test(checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]) -> Any:
    return build_engine(checkpoint_folder("llama"), torch.float32, slots=16, prefill_tokens=256)


def requests_with_repeats() -> list[Request]:
    rng = random.Random(1)
    prompts = [random_prompt(rng, rng.randrange(1, 60)) for _ in range(9)]
    kinds = (
        SamplingParams(max_new_tokens=7),
        SamplingParams(max_new_tokens=9, temperature=1.0, seed=5),
        SamplingParams(max_new_tokens=5, temperature=0.7, n=3, logprobs=2),
    )
    rows = [Request(id=0, prompt_ids=rng.choice(prompts), sampling=rng.choice(kinds)) for _ in range(60)]
    rows += [Request(id=0, prompt_ids=rng.choice(prompts), candidates=((5, 6), (7,))) for _ in range(20)]
    rows += [Request(id=0, prompt_ids=prompts[n % 5], target_ids=(5, 6 + n % 3), sampling=kinds[2]) for n in range(20)]
    rng.shuffle(rows)
    return [replace(row, id=index) for index, row in enumerate(rows)]


def test_every_request_gets_the_answer_it_would_have_got_alone(under_test: Any) -> None:
    requests = requests_with_repeats()
    engine = DedupEngine(under_test.engine())
    answers = drive(engine, requests)  # type: ignore[arg-type]
    assert answers == under_test.answer(requests)
    assert engine.unfinished == 0
    distinct = {replace(request, id=None): request for request in reversed(requests)}
    alone = under_test.engine()
    drive(alone, distinct.values())
    assert engine.counters.prompt_tokens == alone.counters.prompt_tokens
    assert engine.counters.completion_tokens == alone.counters.completion_tokens


def test_answers_are_kept_for_equal_requests_that_come_later(under_test: Any) -> None:
    engine = DedupEngine(under_test.engine())
    first = drive(engine, [greedy("a", (5, 6, 7), 4)])  # type: ignore[arg-type]
    passes = engine.counters.prefill_passes
    second = drive(engine, [greedy("b", (5, 6, 7), 4), greedy("c", (5, 6, 7), 4)])  # type: ignore[arg-type]
    assert engine.counters.prefill_passes == passes
    assert {a.token_ids for a in (*first.values(), *second.values())} == {first["a"].token_ids}
    assert second["b"].request_id == "b"


def test_no_more_is_kept_than_the_limit(under_test: Any) -> None:
    engine = DedupEngine(under_test.engine(), kept_tokens=40)
    rows = [greedy(n, (5 + n, 6, 7), 4) for n in range(20)]
    drive(engine, rows)  # type: ignore[arg-type]
    assert 1 <= len(engine._kept) <= 5
    passes = engine.counters.prefill_passes
    drive(engine, [replace(rows[0], id="again")])  # type: ignore[arg-type]
    assert engine.counters.prefill_passes == passes + 1


def test_targets_count_against_the_limit(under_test: Any) -> None:
    engine = DedupEngine(under_test.engine(), kept_tokens=40)
    drive(engine, [Request(id=n, prompt_ids=(5,), target_ids=(6,) * 10 + (n,)) for n in range(9)])  # type: ignore[arg-type]
    assert len(engine._kept) == 3


def test_cancelling(under_test: Any) -> None:
    """A leader's answer is still made for its followers; without any it is not made at all."""
    engine = DedupEngine(under_test.engine())
    for request_id in ("leader", "follower", "other"):
        engine.submit(greedy(request_id, (9, 9, 9) if request_id == "other" else (5, 6, 7), 30))
    collector = Collector(engine)  # type: ignore[arg-type]
    collector.poll()
    engine.cancel("leader")
    engine.cancel("other")
    engine.cancel("nobody")
    while engine.unfinished:
        collector.poll()
    assert list(collector.done) == ["follower"]
    assert collector.done["follower"].token_ids == under_test.answer([greedy("x", (5, 6, 7), 30)])["x"].token_ids
    assert not engine._under_way
    assert not engine._leaders
