"""Greedy answers against transformers' `generate`, token for token, in float32."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import (
    MAX_POSITIONS,
    VOCAB,
    OracleAnswer,
    greedy,
    oracle_generate,
    oracle_generate_all,
    oracle_logits,
    random_prompt,
)
from torch import nn

from pipeline.core import Completion, FinishReason, Request

ENGINES = [
    {"slots": 64, "prefill_tokens": 1024},
    {"slots": 64, "prefill_tokens": 64},
    {"slots": 16, "prefill_tokens": 1024},
    {"slots": 16, "prefill_tokens": 64},
]
TOO_CLOSE = 1e-4
LENGTHS = [*range(1, 20), 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 235, 255, 256, 257, 300, 411, 511, 600, 639]


def mixed_requests(per_length: int, seed: int = 0, lengths: Sequence[int] = LENGTHS) -> list[Request]:
    """Prompts of every length class and on its borders, answers of one token to a hundred, some with stop tokens."""
    rng = random.Random(seed)
    requests: list[Request] = []
    for number, length in enumerate(lengths):
        new_tokens = rng.choice([1, 2, 5, 24, 40]) if length < 500 else 60
        # a tenth of the vocabulary stops: answers end anywhere within the steps between two read-backs
        stop = tuple(range(2, 54)) if number % 3 and length < 600 else ()
        for _ in range(per_length):
            requests.append(greedy(len(requests), random_prompt(rng, length), new_tokens, *stop))
    return requests


def differing_rows(
    model: nn.Module,
    requests: Iterable[Request],
    expected: dict[Any, OracleAnswer],
    actual: dict[Any, Completion],
) -> list[tuple[Any, float]]:
    """(id, gap between the oracle's two largest logits where the answers part) of each row that differs."""
    differing = []
    for request in requests:
        ours, theirs = actual[request.id], expected[request.id]
        assert ours.error is None
        if (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason):
            continue
        same = 0
        while same < min(len(ours.token_ids), len(theirs.token_ids)) and (
            ours.token_ids[same] == theirs.token_ids[same]
        ):
            same += 1
        top = oracle_logits(model, [*request.prompt_ids, *theirs.token_ids[:same]])[-1].topk(2).values
        differing.append((request.id, float(top[0] - top[1])))
    return differing


def check_equal(
    model: nn.Module, requests: list[Request], expected: dict[Any, OracleAnswer], actual: dict[Any, Completion]
) -> None:
    """Equal answers; rows that part at a tie of the oracle itself are printed and must stay rare."""
    assert set(actual) == {r.id for r in requests}
    differing = differing_rows(model, requests, expected, actual)
    if differing:
        print("rows that differ, with the oracle's gap there:", differing)
    assert [d for d in differing if d[1] > TOO_CLOSE] == []
    assert len(differing) < 0.01 * len(requests)


@pytest.fixture(scope="module")
def llama_rows(checkpoint_folder: Callable[[str], Path], reference: Callable[..., Any]) -> tuple[Any, ...]:
    """The Llama checkpoint, the requests and what transformers answers."""
    folder = checkpoint_folder("llama")
    model = reference(folder)
    requests = mixed_requests(per_length=9)
    return folder, model, requests, oracle_generate_all(model, requests)


def test_the_rows_are_worth_comparing(llama_rows: tuple[Any, ...]) -> None:
    """Many rows, many tokens, all ways to end: one token over and over would hide most bugs."""
    _, _, requests, expected = llama_rows
    assert len(requests) >= 300
    tokens = Counter(t for answer in expected.values() for t in answer.token_ids)
    total = sum(tokens.values())
    assert len(tokens) > 200
    assert tokens.most_common(1)[0][1] < 0.1 * total
    long_answers = [a.token_ids for a in expected.values() if len(a.token_ids) >= 20]
    assert sum(len(set(a)) >= 10 for a in long_answers) > 0.8 * len(long_answers)
    stopped = [len(a.token_ids) for a in expected.values() if a.finish_reason is FinishReason.STOP]
    assert {length % 4 for length in stopped} == {0, 1, 2, 3}, "stops at every place between two read-backs"
    full = [r for r in requests if len(r.prompt_ids) + len(expected[r.id].token_ids) == MAX_POSITIONS]
    assert len(full) >= 5, "answers cut by the longest row"


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: f"{e['slots']}slots-{e['prefill_tokens']}tokens")
def test_equals_generate(llama_rows: tuple[Any, ...], build_engine: Callable[..., Any], engine: dict[str, int]) -> None:
    folder, model, requests, expected = llama_rows
    under_test = build_engine(folder, **engine)
    assert len(under_test.plan.length_classes) == 2
    check_equal(model, requests, expected, under_test.answer(requests))


@pytest.mark.parametrize(
    "name",
    [
        "llama-tied",
        "llama-biases",
        "llama-one-head",
        "llama-ungrouped",
        "llama-rope3",
        "llama-rope-linear",
        "llama-wide",
        "qwen2",
        "qwen3",
        "mistral",
    ],
)
def test_equals_generate_for_other_architectures(
    name: str, checkpoint_folder: Callable[[str], Path], reference: Callable[..., Any], build_engine: Callable[..., Any]
) -> None:
    folder = checkpoint_folder(name)
    model = reference(folder)
    requests = mixed_requests(per_length=3, seed=1, lengths=LENGTHS[::3])
    expected = oracle_generate_all(model, requests)
    assert len({t for answer in expected.values() for t in answer.token_ids}) > 50
    check_equal(model, requests, expected, build_engine(folder, slots=32, prefill_tokens=256).answer(requests))


@pytest.mark.parametrize("max_len", [64, 300])
def test_rows_end_at_engine_max_len(
    max_len: int,
    checkpoint_folder: Callable[[str], Path],
    reference: Callable[..., Any],
    build_engine: Callable[..., Any],
) -> None:
    folder = checkpoint_folder("llama")
    model = reference(folder)
    rng = random.Random(2)
    requests = [greedy(n, random_prompt(rng, max_len - n), 50) for n in (1, 2, 3, 7, 49, 50, 51)]
    answers = build_engine(folder, max_len=max_len).answer(requests)
    for request in requests:
        expected = oracle_generate(model, request, max_len)
        assert len(expected.token_ids) == min(50, request.id)
        assert answers[request.id].token_ids == expected.token_ids
        assert answers[request.id].finish_reason is FinishReason.LENGTH
        assert answers[request.id].prompt_tokens == max_len - request.id


def test_a_stop_token_is_not_part_of_the_answer(
    checkpoint_folder: Callable[[str], Path], reference: Callable[..., Any], build_engine: Callable[..., Any]
) -> None:
    """The stop token at every place of the answer, the first included."""
    folder = checkpoint_folder("llama")
    prompt = random_prompt(random.Random(3), 12)
    answer = oracle_generate(reference(folder), greedy(0, prompt, 12)).token_ids
    places = [i for i, token in enumerate(answer) if token not in answer[:i]]
    assert {0, 1, 2, 3, 4, 5} <= set(places)
    requests = [greedy(place, prompt, 12, answer[place]) for place in places]
    for place, completion in build_engine(folder).answer(requests).items():
        assert completion.token_ids == answer[:place]
        assert completion.finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (greedy("empty", (), 5), "no tokens"),
        (greedy("long", (5,) * 64, 5), "64 tokens"),
        (Request(id="label", prompt_ids=(5,) * 60, candidates=((1, 2, 3, 4, 5),)), "label"),
        (greedy("unknown", (5, VOCAB, 6), 5), f"token {VOCAB}, but the model knows {VOCAB}"),
        (greedy("negative", (5, -1, 6), 5), "token -1, but the model knows"),
        (Request(id="unknown label", prompt_ids=(5,), candidates=((6,), (7, VOCAB))), f"token {VOCAB}"),
        (Request(id="negative label", prompt_ids=(5,), candidates=((6,), (7, -3))), "token -3"),
    ],
    ids=["empty", "long", "label", "unknown", "negative", "unknown-label", "negative-label"],
)
def test_a_request_that_fits_no_shape_is_refused(
    request_: Request, message: str, checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    engine = build_engine(checkpoint_folder("llama"), max_len=64).engine()
    with pytest.raises(ValueError, match=message) as caught:
        engine.submit(request_)
    assert str(request_.id) in str(caught.value)
    assert engine.unfinished == 0


def test_float32_reference_is_what_it_says(checkpoint_folder: Callable[[str], Path]) -> None:
    """The oracle is transformers' eager model: no mask, cache or attention of ours."""
    from oracle import load_reference

    model = load_reference(checkpoint_folder("llama"))
    assert model.config._attn_implementation == "eager"
    assert next(model.parameters()).dtype == torch.float32
