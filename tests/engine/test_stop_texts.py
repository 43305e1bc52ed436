"""Texts that end an answer, against the cut text of transformers' `generate`."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from oracle import EngineUnderTest, drive, oracle_generate_all, random_prompt, text_of

from pipeline.core import Completion, FinishReason, Request, SamplingParams
from pipeline.engine.engine import Engine

NEW_TOKENS = 40
STOPS: dict[str, tuple[str, ...]] = {
    "one letter": ("e",),
    "several": ("hg", "dab", "cc", "zz"),
    "across tokens": ("abc", "deh", "gfb", "hhc", "cab"),
    "a character of several bytes": ("é", "語"),
    "characters and letters": ("€a", "bñ", "e🙂"),
    "one inside another": ("cab", "a", "ab"),
    "never": ("nothing like it",),
}


def expected_end(token_ids: tuple[int, ...], stops: tuple[str, ...]) -> tuple[int, int | None]:
    """Tokens until the first of the stops stands in the text, and where it begins."""
    for count in range(1, len(token_ids) + 1):
        text = text_of(token_ids[:count])
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            return count, min(places)
    return len(token_ids), None


def rows_with(stops: tuple[str, ...], count: int = 40) -> list[Request]:
    rng = random.Random(0)
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, stop=stops)
    return [
        Request(id=n, prompt_ids=random_prompt(rng, (1, 8, 33, 120)[n % 4]), sampling=sampling) for n in range(count)
    ]


def answer_text(completion: Completion) -> str:
    """The text as a task takes it."""
    return text_of(completion.token_ids)[: completion.text_end]


@pytest.fixture(scope="module")
def under_test(checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]) -> EngineUnderTest:
    return build_engine(checkpoint_folder("llama"), slots=16)


@pytest.fixture(scope="module")
def generated(checkpoint_folder: Callable[[str], Path], reference: Callable[..., Any]) -> dict[int, tuple[int, ...]]:
    """What transformers answers where nothing stops it."""
    answers = oracle_generate_all(reference(checkpoint_folder("llama")), rows_with(()))
    return {n: answer.token_ids for n, answer in answers.items()}


@pytest.mark.parametrize("kind", STOPS)
def test_the_answer_is_the_text_up_to_the_stop(
    kind: str, under_test: EngineUnderTest, generated: dict[int, tuple[int, ...]]
) -> None:
    stops = STOPS[kind]
    answers = under_test.answer(rows_with(stops))
    ends = []
    for n, completion in answers.items():
        count, place = expected_end(generated[n], stops)
        assert completion.token_ids == generated[n][:count]
        assert completion.text_end == place
        assert completion.finish_reason is (FinishReason.LENGTH if place is None else FinishReason.STOP)
        assert answer_text(completion) == text_of(generated[n])[:place]
        assert not any(stop in answer_text(completion) for stop in stops)
        ends.append(count)
    assert (min(ends) < NEW_TOKENS) == (kind != "never")


def test_the_kinds_are_worth_comparing(generated: dict[int, tuple[int, ...]]) -> None:
    """Stops at the first token, inside tokens, over several tokens, and at every place between two read-backs."""
    counts = [expected_end(generated[n], STOPS["one letter"])[0] for n in generated]
    assert counts.count(1) >= 3
    assert {count % 4 for count in counts} == {0, 1, 2, 3}
    spanning = inside = split = 0
    for stops in STOPS.values():
        for tokens in generated.values():
            count, place = expected_end(tokens, stops)
            if place is not None:
                spanning += place < len(text_of(tokens[: count - 1]).rstrip("\ufffd"))
                inside += not any(text_of(tokens[:count]).endswith(stop) for stop in stops)
                split += text_of(tokens[: count - 1]).endswith("\ufffd") and any(map(str.isascii, stops)) is False
    assert min(spanning, inside, split) >= 3


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_the_end_does_not_depend_on_the_steps_between_two_read_backs(steps: int, under_test: EngineUnderTest) -> None:
    rows = [row for n, stops in enumerate(STOPS.values()) for row in renamed(rows_with(stops, 12), n)]
    expected = under_test.answer(rows)
    assert drive(under_test.engine(steps_per_poll=steps), rows) == expected


def renamed(rows: list[Request], name: int) -> list[Request]:
    return [replace(row, id=(name, row.id)) for row in rows]


def test_rows_with_different_stops_beside_each_other(under_test: EngineUnderTest) -> None:
    rows = [row for n, stops in enumerate(STOPS.values()) for row in renamed(rows_with(stops, 4), n)]
    together = under_test.answer(rows)
    for row in rows[::3]:
        assert under_test.answer([row]) == {row.id: together[row.id]}


def test_a_stop_token_before_a_stop_text_and_a_text_at_the_last_token(
    under_test: EngineUnderTest, generated: dict[int, tuple[int, ...]]
) -> None:
    """Whichever comes first ends the answer; a stop text that the last allowed token completes is a stop."""
    row = next(r for r in rows_with(("e",)) if expected_end(generated[r.id], ("e",))[0] > 4)
    tokens = generated[row.id]
    count, place = expected_end(tokens, ("e",))
    full = replace(row, id="full", sampling=replace(row.sampling, max_new_tokens=count))
    early = replace(row, id="early", sampling=replace(row.sampling, stop_token_ids=(tokens[2],)))
    late = replace(row, id="late", sampling=replace(row.sampling, stop_token_ids=(tokens[count],)))
    answers = under_test.answer([full, early, late])
    assert answers["full"].finish_reason is FinishReason.STOP
    assert (answers["full"].token_ids, answers["full"].text_end) == (tokens[:count], place)
    assert (answers["early"].token_ids, answers["early"].text_end) == (tokens[: tokens.index(tokens[2])], None)
    if tokens[count] not in tokens[:count]:
        assert (answers["late"].token_ids, answers["late"].text_end) == (tokens[:count], place)


def test_each_choice_stops_for_itself(under_test: EngineUnderTest) -> None:
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=1.0, n=8, stop=("e",))
    request = Request(id=0, prompt_ids=(5, 6, 7), sampling=sampling)
    stopped = under_test.answer([request])[0].choices
    free = under_test.answer([replace(request, sampling=replace(sampling, stop=()))])[0].choices
    for ours, whole in zip(stopped, free, strict=True):
        count, place = expected_end(whole.token_ids, ("e",))
        assert (ours.token_ids, ours.text_end) == (whole.token_ids[:count], place)
    assert len({c.text_end for c in stopped}) > 2


def test_an_engine_without_a_decoder_refuses_stop_texts(under_test: EngineUnderTest) -> None:
    made = under_test.engine()
    engine = Engine(under_test.decoder, under_test.plan, made._make_cache, made._device)
    with pytest.raises(ValueError, match="no decoder for stop texts"):
        engine.submit(rows_with(("e",))[0])
    assert engine.unfinished == 0
