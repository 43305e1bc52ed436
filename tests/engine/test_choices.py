"""Several answers to one prompt: each is its own draw, and the same one however many are asked for."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Collector, EngineUnderTest, drive, oracle_logits, random_prompt
from scipy import stats

from pipeline.core import Completion, FinishReason, Request, SamplingParams


@pytest.fixture
def under_test(checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]) -> EngineUnderTest:
    return build_engine(checkpoint_folder("llama"), slots=16)


def asked(n: int, request_id: Any = 0, seed: int = 3, length: int = 9, **settings: Any) -> Request:
    prompt = random_prompt(random.Random(seed), length)
    sampling = SamplingParams(**{"max_new_tokens": 12, "temperature": 1.0, "seed": seed, "n": n, **settings})
    return Request(id=request_id, prompt_ids=prompt, sampling=sampling)


def answer(under_test: EngineUnderTest, request: Request) -> Completion:
    return under_test.answer([request])[request.id]


def test_each_choice_is_a_different_draw(under_test: EngineUnderTest) -> None:
    completion = answer(under_test, asked(24))
    assert len(completion.choices) == 24, "more than there are slots"
    assert len({c.token_ids for c in completion.choices}) == 24
    assert len({c.token_ids[0] for c in completion.choices}) > 5
    assert all(c.choices == () and c.error is None for c in completion.choices)
    assert replace(completion, choices=()) == completion.choices[0]


@pytest.mark.parametrize("settings", [{}, {"top_k": 20, "top_p": 0.9, "logprobs": 2}, {"repetition_penalty": 1.4}])
def test_a_choice_does_not_depend_on_how_many_are_asked_for(
    under_test: EngineUnderTest, settings: dict[str, Any]
) -> None:
    four, two, one = (answer(under_test, asked(n, **settings)) for n in (4, 2, 1))
    assert four.choices[:2] == two.choices
    assert one.choices == ()
    assert one == two.choices[0]


def test_choices_differ_from_those_of_other_seeds_and_prompts(under_test: EngineUnderTest) -> None:
    base = asked(4)
    others = [
        replace(base, sampling=replace(base.sampling, seed=4)),
        replace(base, prompt_ids=(*base.prompt_ids[:-1], 5)),
    ]
    answers = [answer(under_test, r) for r in (base, *others)]
    assert len({c.token_ids for a in answers for c in a.choices}) == 12


def test_greedy_choices_are_all_the_same(under_test: EngineUnderTest) -> None:
    completion = answer(under_test, asked(3, temperature=0.0))
    assert len(completion.choices) == 3
    assert len(set(completion.choices)) == 1


def test_choices_are_drawn_from_the_models_distribution(
    checkpoint_folder: Callable[[str], Path], reference: Callable[..., Any], build_engine: Callable[..., Any]
) -> None:
    """2000 answers to one prompt, with one seed."""
    folder, total = checkpoint_folder("llama-vocab32"), 2000
    prompt = (5, 9, 30)
    sampling = SamplingParams(max_new_tokens=1, temperature=1.0, n=total)
    request = Request(id=0, prompt_ids=prompt, sampling=sampling)
    completion = answer(build_engine(folder, max_len=32), request)
    counts = Counter(c.token_ids[0] for c in completion.choices)
    expected = torch.softmax(oracle_logits(reference(folder, torch.float64), prompt)[-1], dim=-1).numpy() * total
    common = expected >= 5
    observed = [counts[t] for t in range(32) if common[t]]
    observed.append(total - sum(observed))
    assert stats.chisquare(observed, [*expected[common], total - expected[common].sum()]).pvalue > 1e-3


def test_choices_beside_other_rows(under_test: EngineUnderTest) -> None:
    """Choices of long and short prompts, which end at different times, among plain rows."""
    rows = [asked(1 + n % 4, n, seed=n, length=(3, 90, 280)[n % 3], max_new_tokens=3 + n) for n in range(14)]
    together = under_test.answer(rows)
    assert {len(c.choices) for c in together.values()} == {0, 2, 3, 4}
    for row in rows:
        assert under_test.answer([row]) == {row.id: together[row.id]}


def test_a_request_ends_with_its_last_choice(under_test: EngineUnderTest) -> None:
    """Every choice is reported as it grows; the completion comes once, with the last."""
    stops = tuple(range(2, 30))
    request = asked(6, max_new_tokens=40, stop_token_ids=stops)
    engine = under_test.engine()
    engine.submit(request)
    assert engine.unfinished == 6
    collector, left = Collector(engine), []
    while engine.unfinished:
        collector.poll()
        left.append(engine.unfinished)
        assert bool(collector.done) == (engine.unfinished == 0)
    assert len(set(left)) > 2, "the choices end one after the other"
    assert {c.finish_reason for c in collector.done[0].choices} <= {FinishReason.STOP, FinishReason.LENGTH}
    assert {choice for _, choice in collector.streamed} == {
        n for n, c in enumerate(collector.done[0].choices) if c.token_ids
    }


@pytest.mark.parametrize("polls", [0, 1, 4])
def test_a_cancelled_request_takes_all_its_choices_with_it(under_test: EngineUnderTest, polls: int) -> None:
    """Those that wait, those in slots and those that have ended; the same id can be asked again."""
    others = [asked(2, n, seed=n) for n in range(1, 6)]
    expected = under_test.answer([asked(40), *others])
    engine = under_test.engine()
    for request in (asked(40), *others):
        engine.submit(request)
    collector = Collector(engine)
    for _ in range(polls):
        collector.poll()
    assert 0 not in collector.done
    engine.cancel(0)
    assert engine.unfinished <= sum(r.sampling.n for r in others)
    while engine.unfinished:
        collector.poll()
    assert collector.done == {n: c for n, c in expected.items() if n != 0}
    assert drive(engine, [asked(40)]) == {0: expected[0]}
