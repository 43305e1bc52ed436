"""Log-probabilities of answers and of candidates against a transformers forward in float64."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import VOCAB, greedy, oracle_logits, oracle_logprob, random_prompt

from pipeline.core import FinishReason, Request, SamplingParams

CLOSE = 1e-4
PREFIX_SHARING = (
    (10, 20, 30),
    (10, 20, 31),
    (10, 20),
    (10,),
    (11, 20, 30, 40, 50),
    (11, 20, 30, 40, 51),
    (11, 20, 30),
    (12,),
    (13, 13, 13, 13),
)
CANDIDATES = {
    "one-token": ((7,), (8,), (9,)),
    "a-single-one": ((40, 41, 42),),
    "one-single-token": ((40,),),
    "sharing-prefixes": PREFIX_SHARING,
    "the-same-twice": ((5, 6, 7), (5, 6, 7)),
    "many": tuple((100 + n // 5, 200 + n % 7, *range(300, 300 + n % 4)) for n in range(25)),
    "long": tuple(tuple(range(start, start + 40)) for start in (50, 100, 150)),
    "outside-and-last-token": ((0, VOCAB - 1), (VOCAB - 1, 0)),
}


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "llama-biases", "llama-rope3"])
@pytest.mark.parametrize("prefill_tokens", [64, 1024])
def test_candidate_logprobs_equal_a_forward_over_prompt_and_candidate(
    name: str,
    prefill_tokens: int,
    checkpoint_folder: Callable[[str], Path],
    reference: Callable[..., Any],
    build_engine: Callable[..., Any],
) -> None:
    folder = checkpoint_folder(name)
    model = reference(folder, torch.float64)
    rng = random.Random(0)
    lengths = (1, 2, 15, 60, 300) if name == "llama" else (1, 33)
    requests = [
        Request(id=(kind, length), prompt_ids=random_prompt(rng, length), candidates=candidates)
        for length in lengths
        for kind, candidates in CANDIDATES.items()
    ]
    answers = build_engine(folder, prefill_tokens=prefill_tokens).answer(requests)
    for request in requests:
        completion = answers[request.id]
        expected = [oracle_logprob(model, request.prompt_ids, c) for c in request.candidates]
        assert completion.candidate_logprobs == pytest.approx(expected, abs=CLOSE), request.id
        assert completion.finish_reason is FinishReason.STOP
        assert completion.token_ids == ()
        assert completion.prompt_tokens == len(request.prompt_ids)


def test_candidates_that_have_a_token_in_common_do_not_see_each_other(
    checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    """What a candidate gets does not change with those that it is compared with."""
    engine = build_engine(checkpoint_folder("llama"))
    prompt = random_prompt(random.Random(1), 20)
    together = engine.answer([Request(id=0, prompt_ids=prompt, candidates=PREFIX_SHARING)])[0]
    for candidate, logprob in zip(PREFIX_SHARING, together.candidate_logprobs, strict=True):
        alone = engine.answer([Request(id=0, prompt_ids=prompt, candidates=(candidate,))])[0]
        assert alone.candidate_logprobs[0] == pytest.approx(logprob, abs=1e-5)


def test_candidates_that_fill_the_longest_row(
    checkpoint_folder: Callable[[str], Path], reference: Callable[..., Any], build_engine: Callable[..., Any]
) -> None:
    folder = checkpoint_folder("llama")
    prompt = random_prompt(random.Random(2), 61)
    request = Request(id=0, prompt_ids=prompt, candidates=((5, 6, 7),))
    completion = build_engine(folder, max_len=64, prefill_tokens=64).answer([request])[0]
    expected = oracle_logprob(reference(folder, torch.float64), prompt, (5, 6, 7))
    assert completion.candidate_logprobs == pytest.approx([expected], abs=CLOSE)


def test_an_empty_candidate_is_refused(
    checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    engine = build_engine(checkpoint_folder("llama")).engine()
    with pytest.raises(ValueError, match="no tokens"):
        engine.submit(Request(id=0, prompt_ids=(5,), candidates=((6,), ())))
    assert engine.unfinished == 0


@pytest.mark.parametrize("temperature", [0.0, 0.7], ids=["greedy", "sampled"])
def test_cumulative_logprob_sums_the_unmodified_softmax(
    temperature: float,
    checkpoint_folder: Callable[[str], Path],
    reference: Callable[..., Any],
    build_engine: Callable[..., Any],
) -> None:
    """Temperature and filters choose tokens, they do not enter the sum; a stop token that ended the row does."""
    folder = checkpoint_folder("llama")
    model = reference(folder, torch.float64)
    rng = random.Random(3)
    stops = tuple(range(2, 54))
    top = {"top_k": 20, "top_p": 0.9} if temperature else {}
    requests = [
        Request(
            id=n,
            prompt_ids=random_prompt(rng, rng.choice([1, 5, 40, 250, 300])),
            sampling=SamplingParams(
                max_new_tokens=rng.choice([1, 4, 30]), temperature=temperature, seed=n, stop_token_ids=stops, **top
            ),
        )
        for n in range(60)
    ]
    answers = build_engine(folder).answer(requests)
    reasons = [a.finish_reason for a in answers.values()]
    assert min(reasons.count(FinishReason.STOP), reasons.count(FinishReason.LENGTH)) >= 10
    for request in requests:
        completion = answers[request.id]
        assert completion.cumulative_logprob is not None
        expected = [oracle_logprob(model, request.prompt_ids, completion.token_ids)]
        if completion.finish_reason is FinishReason.STOP:
            # which stop token it was is not told: the most likely one, or any of them if it was drawn
            ends = torch.log_softmax(oracle_logits(model, (*request.prompt_ids, *completion.token_ids))[-1], dim=-1)
            possible = [int(ends.argmax())] if temperature == 0.0 else stops
            assert set(possible) <= set(stops)
            expected = [expected[0] + float(ends[stop]) for stop in possible]
        assert min(abs(completion.cumulative_logprob - e) for e in expected) < CLOSE


def test_logprob_of_a_bfloat16_answer_is_near_the_float32_one(
    checkpoint_folder: Callable[[str], Path], reference: Callable[..., Any], build_engine: Callable[..., Any]
) -> None:
    """Logits are summed up in float32 whatever the model's dtype."""
    folder = checkpoint_folder("llama")
    model = reference(folder, torch.float64)
    rng = random.Random(4)
    requests = [greedy(n, random_prompt(rng, 30), 20) for n in range(16)]
    for request in requests:
        answers = build_engine(folder, torch.bfloat16).answer([request])
        tokens = answers[request.id].token_ids
        expected = oracle_logprob(model, request.prompt_ids, tokens)
        assert answers[request.id].cumulative_logprob == pytest.approx(expected, abs=0.1 * len(tokens))


def test_logprobs_of_every_token_and_of_the_likeliest(
    checkpoint_folder: Callable[[str], Path], reference: Callable[..., Any], build_engine: Callable[..., Any]
) -> None:
    """Under the unmodified softmax, whatever chose the tokens and whatever the neighbours asked for."""
    folder = checkpoint_folder("llama")
    model = reference(folder, torch.float64)
    rng = random.Random(5)
    wishes = (None, 0, 1, 5, 20)
    drawn: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.9, "top_k": 9}, {"repetition_penalty": 1.5})
    requests = [
        Request(
            id=n,
            prompt_ids=random_prompt(rng, rng.choice([1, 12, 280])),
            sampling=SamplingParams(
                max_new_tokens=9, logprobs=wishes[n % 5], stop_token_ids=tuple(range(2, 20)), seed=n, **drawn[n % 3]
            ),
        )
        for n in range(30)
    ]
    answers = build_engine(folder, slots=16).answer(requests)
    assert {a.finish_reason for a in answers.values()} == {FinishReason.STOP, FinishReason.LENGTH}
    for request in requests:
        completion, wanted = answers[request.id], request.sampling.logprobs
        if wanted is None:
            assert completion.logprobs == ()
            continue
        assert tuple(step.token_id for step in completion.logprobs) == completion.token_ids
        logits = oracle_logits(model, (*request.prompt_ids, *completion.token_ids))
        expected = torch.log_softmax(logits, dim=-1)[len(request.prompt_ids) - 1 :]
        for place, step in enumerate(completion.logprobs):
            assert step.logprob == pytest.approx(float(expected[place, step.token_id]), abs=CLOSE)
            assert len(step.top) == wanted
            tokens = [token for token, _ in step.top]
            assert len(set(tokens)) == wanted
            likeliest = expected[place].topk(wanted).values.tolist()
            assert [logprob for _, logprob in step.top] == pytest.approx(likeliest, abs=CLOSE)
            assert expected[place, tokens].tolist() == pytest.approx(likeliest, abs=CLOSE)
