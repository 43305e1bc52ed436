"""Texts scored token by token, against a transformers forward over the whole text in float64."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import EngineUnderTest, oracle_logits, random_prompt
from torch import Tensor

from pipeline.core import Completion, FinishReason, Request, SamplingParams
from pipeline.engine.engine import unfit
from pipeline.engine.scoring import log_sum_exp_

CLOSE = 2e-5
"""Nats a token that float32 weights and activations may be off."""
LENGTHS = [(1, 1), (1, 2), (2, 1), (5, 40), (60, 1), (63, 2), (64, 1), (30, 200), (300, 30), (1, 600), (590, 50)]
"""Tokens of prompt and target; with passes of 64 tokens most rows need one of their own, and many slices of logits."""


def text_row(name: Any, prompt: Sequence[int], target: Sequence[int], *, prompt_too: bool, top: int | None) -> Request:
    sampling = SamplingParams(logprobs=top)
    both = prompt_too or not target
    return Request(id=name, prompt_ids=tuple(prompt), target_ids=tuple(target), score_prompt=both, sampling=sampling)


def text_rows(lengths: Sequence[tuple[int, int]], seed: int = 0, top: int | None = None) -> list[Request]:
    """For each pair of lengths a row with a target, one that scores its prompt too, one that scores a prompt alone."""
    rng = random.Random(seed)
    rows = []
    for n, (before, behind) in enumerate(lengths):
        prompt, target = random_prompt(rng, before), random_prompt(rng, behind)
        rows.append(text_row((n, "target"), prompt, target, prompt_too=False, top=top))
        rows.append(text_row((n, "both"), prompt, target, prompt_too=True, top=top))
        rows.append(text_row((n, "prompt"), prompt + target, (), prompt_too=True, top=top))
    return rng.sample(rows, len(rows))


def token_logprobs(model: Any, request: Request) -> tuple[Tensor, Tensor]:
    """The oracle's [V] log-probabilities at every place of the text after the first, and those of its tokens."""
    text = (*request.prompt_ids, *request.target_ids)
    all_TV = torch.log_softmax(oracle_logits(model, text), dim=-1)[:-1]
    return all_TV, all_TV.gather(1, torch.tensor(text[1:])[:, None])[:, 0]


def check(model: Any, request: Request, found: Completion) -> None:
    """All numbers of a scored row."""
    _, steps = token_logprobs(model, request)
    begin = len(request.prompt_ids) - 1
    assert (found.finish_reason, found.error) == (FinishReason.STOP, None)
    assert (found.token_ids, found.candidate_logprobs) == ((), ())
    assert (found.prompt_tokens, found.target_tokens) == (len(request.prompt_ids), len(request.target_ids))
    for value, expected, is_there in (
        (found.cumulative_logprob, steps[begin:], bool(request.target_ids)),
        (found.prompt_logprob, steps[:begin], request.score_prompt),
    ):
        assert (value is not None) == is_there
        if value is not None:
            assert value == pytest.approx(float(expected.sum()), abs=CLOSE * max(1, len(expected)))


@pytest.mark.parametrize("prefill_tokens", [64, 1024])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-rope3", "qwen3", "mistral"])
def test_sums_equal_a_forward_over_the_whole_text(
    name: str,
    prefill_tokens: int,
    checkpoint_folder: Callable[[str], Path],
    reference: Callable[..., Any],
    build_engine: Callable[..., Any],
) -> None:
    folder = checkpoint_folder(name)
    model = reference(folder, torch.float64)
    rows = text_rows(LENGTHS if name == "llama" else LENGTHS[:8])
    answers = build_engine(folder, prefill_tokens=prefill_tokens).answer(rows)
    for row in rows:
        check(model, row, answers[row.id])


def test_single_tokens_and_the_likeliest_at_each_place(
    checkpoint_folder: Callable[[str], Path], reference: Callable[..., Any], build_engine: Callable[..., Any]
) -> None:
    """Of the target where there is one, of the prompt from its second token on where there is none."""
    folder = checkpoint_folder("llama")
    model = reference(folder, torch.float64)
    rows = text_rows(LENGTHS[:8])
    wishes = (None, 0, 3, 20)
    rows = [replace(row, sampling=SamplingParams(logprobs=wishes[n % 4])) for n, row in enumerate(rows)]
    answers = build_engine(folder, prefill_tokens=64).answer(rows)
    for row in rows:
        steps, wanted = answers[row.id].logprobs, row.sampling.logprobs
        if wanted is None:
            assert steps == ()
            continue
        tokens = row.target_ids or row.prompt_ids[1:]
        all_TV, own = (x[-len(tokens) :] for x in token_logprobs(model, row))
        assert tuple(step.token_id for step in steps) == tokens
        assert [step.logprob for step in steps] == pytest.approx(own.tolist(), abs=1e-4)
        total = answers[row.id].cumulative_logprob if row.target_ids else answers[row.id].prompt_logprob
        assert sum(step.logprob for step in steps) == pytest.approx(total, abs=1e-9)
        for place, step in enumerate(steps):
            likeliest = all_TV[place].topk(wanted).values.tolist()
            assert [logprob for _, logprob in step.top] == pytest.approx(likeliest, abs=1e-4)
            assert all_TV[place, [token for token, _ in step.top]].tolist() == pytest.approx(likeliest, abs=1e-4)
            assert len({token for token, _ in step.top}) == wanted


def test_a_target_of_one_token_is_the_label_of_that_token_bit_for_bit(
    checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    """Both run the prompt alone; longer ones run as a trie's branch or as a text, and equal within rounding."""
    rng = random.Random(1)
    labels = [(7,), (8,), (9, 10, 11), (9, 10, 12, 13)]
    under_test: EngineUnderTest = build_engine(checkpoint_folder("llama-wide"), slots=16)
    for length in (1, 17, 200, 600):
        prompt = random_prompt(rng, length)
        labelled = under_test.answer([Request(id=0, prompt_ids=prompt, candidates=tuple(labels))])[0]
        rows = [text_row(n, prompt, label, prompt_too=False, top=None) for n, label in enumerate(labels)]
        scored = [under_test.answer([row])[row.id].cumulative_logprob for row in rows]
        assert scored[:2] == list(labelled.candidate_logprobs[:2])
        assert scored == pytest.approx(labelled.candidate_logprobs, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_bits_do_not_depend_on_neighbours(
    quant: str, dtype: torch.dtype, checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    """Rows whose logits lie across the slices of a pass in ever other ways, and labels between them."""
    rng = random.Random(2)
    lengths = [(rng.choice([1, 2, 9, 31, 64, 90]), rng.choice([1, 2, 17, 60])) for _ in range(12)]
    rows = text_rows([*lengths, (300, 9), (1, 500)])
    rows = [replace(row, sampling=SamplingParams(logprobs=(None, 2, 7)[n % 3])) for n, row in enumerate(rows)]
    labels = [
        Request(id=n, prompt_ids=random_prompt(rng, 20), candidates=((5, 6, n + 7), (5, 8), (9,))) for n in range(6)
    ]
    under_test: EngineUnderTest = build_engine(checkpoint_folder("llama-wide"), dtype, quant, prefill_tokens=256)
    expected = under_test.answer([*rows, *labels])
    assert all(c.error is None for c in expected.values())
    shuffled = rng.sample([*rows, *labels], len(rows) + len(labels))
    assert under_test.answer(shuffled) == expected
    assert under_test.answer(shuffled[::2]) == {row.id: expected[row.id] for row in shuffled[::2]}
    for row in shuffled[::3]:
        assert under_test.answer([row]) == {row.id: expected[row.id]}


def test_what_the_neighbours_ask_for_does_not_decide_among_equals(
    checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where logits are equal, which tokens are shown does not change with the number that others want to see."""
    under_test: EngineUnderTest = build_engine(checkpoint_folder("llama"))
    head = under_test.decoder.head
    monkeypatch.setattr(under_test.decoder, "head", lambda hidden: head(hidden).mul(0.2).round())
    rows = text_rows(LENGTHS[:6], top=3)
    expected = under_test.answer(rows)
    greedier = replace(text_rows([(5, 9)], seed=9, top=20)[0], id="other")
    assert {k: v for k, v in under_test.answer([greedier, *rows]).items() if k != "other"} == expected


# --- precision ---------------------------------------------------------------------------------------------------


def test_the_sum_over_a_large_vocabulary_does_not_drift() -> None:
    """In float32, log_softmax over 128k tokens is off by 1e-5 on the way that torch takes here."""
    torch.manual_seed(0)
    logits = torch.randn(16, 128256) * 3 + 2
    exact = torch.logsumexp(logits.double(), dim=-1)
    assert float((log_sum_exp_(logits.clone()) - exact).abs().max()) < 1e-7


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_seen(bad: float) -> None:
    logits = torch.zeros(3, 9)
    logits[1, 4] = bad
    logits[2, 4] = float("-inf")
    assert torch.isfinite(log_sum_exp_(logits)).tolist() == [True, False, True]


# --- what is not scored ------------------------------------------------------------------------------------------


def test_what_cannot_be_scored_is_said(
    checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    plan = build_engine(checkpoint_folder("llama"), max_len=64).plan

    def reason(prompt: int, target: int) -> str | None:
        return unfit(text_row(0, (5,) * prompt, (6,) * target, prompt_too=False, top=None), plan)

    assert reason(1, 63) is reason(63, 1) is reason(64, 0) is reason(2, 0) is None
    assert reason(1, 0) == "the prompt has 1 token; it is scored from its second one on"
    assert reason(0, 3) == "the prompt has no tokens"
    assert reason(60, 5) == (
        "the prompt has 60 tokens, which with the 5 of its target is more than the 64 there is room for"
    )
    assert reason(65, 0) == "the prompt has 65 tokens, more than the 64 there is room for"
    unknown = text_row(0, (5,), (6, 509), prompt_too=False, top=None)
    assert unfit(unknown, plan) == "the tokenizer gives token 509, but the model knows 509 tokens"


def test_a_text_that_fills_the_longest_row(
    checkpoint_folder: Callable[[str], Path], reference: Callable[..., Any], build_engine: Callable[..., Any]
) -> None:
    """The last token is scored but not run, so 640 tokens need a pass of 639."""
    folder = checkpoint_folder("llama")
    rows = text_rows([(1, 639), (639, 1), (320, 320)])
    answers = build_engine(folder, prefill_tokens=64).answer(rows)
    for row in rows:
        check(reference(folder, torch.float64), row, answers[row.id])


def test_candidates_and_a_text_are_not_scored_together() -> None:
    with pytest.raises(AssertionError):
        Request(id=0, prompt_ids=(5,), candidates=((6,),), target_ids=(7,))


def test_a_cancelled_row_is_not_reported(
    checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    engine = build_engine(checkpoint_folder("llama")).engine()
    rows = text_rows(LENGTHS[:3])
    for row in rows:
        engine.submit(row)
    engine.cancel(rows[0].id)
    assert engine.unfinished == len(rows) - 1
    assert {o.request_id for o in engine.poll()} == {row.id for row in rows[1:]}
