"""The sampler against published Philox vectors, transformers' warpers and the chi-square test."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import EngineUnderTest, oracle_generate_all, oracle_logits, random_prompt
from scipy import stats
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.core import Request, SamplingParams
from pipeline.engine.sampler import SamplerRow, SamplerRows, philox4x32, prompt_key, sample

CPU = torch.device("cpu")
SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.4, "top_k": 100},
    {"temperature": 1.0, "top_p": 0.01},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 10, "top_p": 0.7},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.15},
    {"temperature": 1.6, "min_p": 1.0},
    {"temperature": 1.2, "repetition_penalty": 1.7},
    {"temperature": 0.9, "repetition_penalty": 0.6},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.3},
]
PROCESSORS: dict[str, Callable[[Any], Any]] = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
"""transformers' own, in the order in which `generate` applies them."""
SEEN = (3, 4, 5, 17, 30)
"""Tokens that stand in the prompt, where there is none."""
each_setting = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()))


def warped(logits_V: Tensor, settings: Mapping[str, float], seen: Sequence[int] = SEEN) -> Tensor:
    """Probabilities that transformers would draw from, float64 [V], `seen` being the tokens so far."""
    scores, tokens = logits_V.double()[None], torch.tensor([seen])
    for name, make in PROCESSORS.items():
        if name in settings:
            scores = make(settings[name])(tokens, scores)
    return torch.softmax(scores[0], dim=-1)


def seen_by(count: int, vocab: int) -> Tensor:
    """[B, V]: SEEN in every row."""
    seen_BV = torch.zeros(count, vocab, dtype=torch.bool)
    seen_BV[:, list(SEEN)] = True
    return seen_BV


def rows_of(params: Sequence[SamplingParams]) -> SamplerRows:
    """Rows whose uniform numbers the test gives itself."""
    return SamplerRows.of([SamplerRow(p, key) for key, p in enumerate(params)], CPU)


# --- the random numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: Sequence[int], key: Sequence[int], expected: Sequence[int]) -> None:
    """The vectors of Random123's kat_vectors for philox4x32 with 10 rounds."""
    words = philox4x32([torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key])
    assert tuple(int(w) for w in words) == tuple(expected)


def test_uniforms_are_spread_evenly_and_within_bounds() -> None:
    params = SamplingParams(temperature=1.0, seed=2**64 - 1)
    rows = SamplerRows.of([SamplerRow(params, prompt_key((n,))) for n in range(64)], CPU)
    uniforms = rows.uniforms(torch.zeros(64, dtype=torch.int64), 256)
    assert uniforms.shape == (256, 64)
    assert 0 <= float(uniforms.min()) <= float(uniforms.max()) < 1
    assert stats.kstest(uniforms.flatten().numpy(), "uniform").pvalue > 1e-3
    assert len(np.unique(uniforms.numpy())) == uniforms.numel()
    pairs = (uniforms[:-1].flatten().numpy(), uniforms[1:].flatten().numpy())
    assert abs(np.corrcoef(*pairs)[0, 1]) < 0.03, "one step tells nothing of the next"


def test_uniforms_depend_on_seed_prompt_choice_and_step_only() -> None:
    seeds = (0, 1, 2**32, 2**63)
    keys = (prompt_key((5, 6)), prompt_key((6, 5)), prompt_key((5,)))
    params = [SamplingParams(temperature=1.0, seed=s) for s in seeds]
    rows = [SamplerRow(p, key, choice) for choice in (0, 1, 7) for p in params for key in keys]
    zero = torch.zeros(len(rows), dtype=torch.int64)
    drawn = SamplerRows.of(rows, CPU).uniforms(zero, 8)
    assert len(drawn.unique()) == drawn.numel(), "each of seed, prompt, choice and step matters"
    for place, row in enumerate(rows):
        alone = SamplerRows.of([row], CPU)
        assert torch.equal(alone.uniforms(zero[:1], 8)[:, 0], drawn[:8, place])
        assert torch.equal(alone.uniforms(zero[:1] + 3, 2)[:, 0], drawn[3:5, place])


# --- the choice ---------------------------------------------------------------------------------------------


@each_setting
@pytest.mark.parametrize(
    "beside", [None, {"temperature": 0.0}, {"temperature": 0.9, "top_k": 2, "min_p": 0.4, "repetition_penalty": 2.0}]
)
def test_a_token_is_chosen_by_its_share_of_the_uniform_numbers(
    settings: dict[str, float], beside: dict[str, float] | None
) -> None:
    """An even grid of uniform numbers must hit each token in proportion to transformers' probability of it.

    Neighbours with other settings change which code runs, and must not change the choice.
    """
    torch.manual_seed(0)
    logits_V = torch.randn(50) * 2
    grid = 20_000
    uniforms = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    params = [SamplingParams(**settings)] * grid + ([] if beside is None else [SamplingParams(**beside)])
    uniforms = torch.cat([uniforms, torch.full((len(params) - grid,), 0.5, dtype=torch.float64)])
    logits_BV = logits_V.expand(len(params), -1).contiguous()
    tokens = sample(logits_BV, rows_of(params), uniforms, seen_by(len(params), 50)).tokens_B[:grid]
    shares = torch.bincount(tokens, minlength=50).double() / grid
    expected = warped(logits_V, settings)
    assert float((shares - expected).abs().max()) < 2 / grid
    assert set(tokens.tolist()) <= set(expected.nonzero()[:, 0].tolist())
    seen = (expected > 2 / grid).nonzero()[:, 0].tolist()
    assert set(seen) <= set(tokens.tolist())


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53], ids=["least", "largest"])
@each_setting
def test_the_extreme_uniform_numbers_choose_within_the_support(settings: dict[str, float], uniform: float) -> None:
    torch.manual_seed(1)
    logits = torch.randn(40, 33) * 3
    logits[:, :3] = float("-inf")
    logits[:, -3:] = float("-inf")
    rows = rows_of([SamplingParams(**settings)] * 40)
    tokens = sample(logits, rows, torch.full((40,), uniform, dtype=torch.float64), seen_by(40, 33)).tokens_B
    for row, token in enumerate(tokens.tolist()):
        assert warped(logits[row], settings)[token] > 0


def test_greedy_and_logprobs_are_those_of_the_unmodified_logits() -> None:
    torch.manual_seed(2)
    logits = torch.randn(8, 100) * 4
    params = [SamplingParams(), SamplingParams(temperature=0.5, top_k=3)] * 4
    rows = rows_of(params)
    out = sample(logits, rows, torch.full((8,), 0.9, dtype=torch.float64))
    assert out.tokens_B[::2].tolist() == logits[::2].argmax(-1).tolist()
    expected = torch.log_softmax(logits.double(), -1).gather(1, out.tokens_B[:, None])[:, 0]
    assert torch.allclose(out.logprobs_B.double(), expected, atol=1e-5)
    assert bool(out.finite_B.all())


@pytest.mark.parametrize("vocab", [60, 509, 4001])
def test_which_of_equal_tokens_are_the_likeliest_does_not_depend_on_what_others_ask_for(vocab: int) -> None:
    torch.manual_seed(4)
    logits = torch.randint(0, 12, (4, vocab)).float()
    beside = [
        sample(logits, rows_of([SamplingParams(logprobs=2), *[SamplingParams(logprobs=k)] * 3]), None)
        for k in (1, 5, 20)
    ]
    tokens = [out.top_tokens_BK[0, :2].tolist() for out in beside if out.top_tokens_BK is not None]
    assert len(tokens) == 3
    assert tokens[0] == tokens[1] == tokens[2]


def test_draws_do_not_depend_on_how_many_rows_are_sorted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    logits, uniforms = torch.randn(len(SETTINGS) * 3, 50), torch.rand(len(SETTINGS) * 3, dtype=torch.float64)
    rows = rows_of([SamplingParams(**settings) for settings in SETTINGS] * 3)
    together = sample(logits, rows, uniforms, seen_by(len(logits), 50)).tokens_B
    for at_once in (1, 120, 500):
        monkeypatch.setattr("pipeline.engine.sampler.SORTED_AT_ONCE", at_once)
        assert torch.equal(sample(logits, rows, uniforms, seen_by(len(logits), 50)).tokens_B, together)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{}, *SETTINGS[-3:]])
def test_a_row_that_is_not_finite_is_told_and_leaves_its_neighbours_alone(
    broken: float, settings: dict[str, float]
) -> None:
    torch.manual_seed(3)
    logits = torch.randn(4, 40)
    rows = rows_of([SamplingParams(**settings)] * 4)
    uniforms = torch.rand(4, dtype=torch.float64)
    before = sample(logits, rows, uniforms, seen_by(4, 40))
    logits[2, 7] = broken
    after = sample(logits, rows, uniforms, seen_by(4, 40))
    assert after.finite_B.tolist() == [True, True, False, True]
    kept = [0, 1, 3]
    assert torch.equal(after.tokens_B[kept], before.tokens_B[kept])
    assert torch.equal(after.logprobs_B[kept], before.logprobs_B[kept])
    assert 0 <= int(after.tokens_B[2]) < 40


# --- through the engine ---------------------------------------------------------------------------------------


@pytest.fixture
def tiny_vocab(checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]) -> EngineUnderTest:
    return build_engine(checkpoint_folder("llama-vocab32"), max_len=32)


@pytest.fixture
def next_token_logits(
    checkpoint_folder: Callable[[str], Path], reference: Callable[..., Any]
) -> Callable[[tuple[int, ...]], Tensor]:
    model = reference(checkpoint_folder("llama-vocab32"), torch.float64)
    return lambda prompt: oracle_logits(model, prompt)[-1]


def chi_square_p(counts: Counter[int], probabilities: Tensor, total: int) -> float:
    """p-value of observed counts; tokens with fewer than 5 expected are taken together."""
    expected = probabilities.numpy() * total
    observed = np.array([counts.get(t, 0) for t in range(len(expected))], dtype=float)
    rare = expected < 5
    assert observed[expected == 0].sum() == 0, "a token outside the support"
    if rare.any() and expected[rare].sum() > 0:
        expected = np.append(expected[~rare], expected[rare].sum())
        observed = np.append(observed[~rare], observed[rare].sum())
    else:
        expected, observed = expected[~rare], observed[~rare]
    return 1.0 if len(expected) == 1 else float(stats.chisquare(observed, expected * total / expected.sum()).pvalue)


@pytest.mark.parametrize(
    "settings",
    [SETTINGS[n] for n in (0, 2, 4, 7, 10, 11, 13, 15)],
    ids=["softmax", "temperature", "top_k", "top_p", "both", "min_p", "penalty", "all"],
)
def test_first_and_second_tokens_are_drawn_from_the_models_distribution(
    tiny_vocab: EngineUnderTest, next_token_logits: Callable[[tuple[int, ...]], Tensor], settings: dict[str, Any]
) -> None:
    """Over 3000 seeds: the first token comes from the prefill pass, the second from a decode step."""
    prompt, total = (5, 9, 30), 3000
    requests = [
        Request(id=s, prompt_ids=prompt, sampling=SamplingParams(max_new_tokens=2, seed=s, **settings))
        for s in range(total)
    ]
    answers = [a.token_ids for a in tiny_vocab.answer(requests).values()]
    first = warped(next_token_logits(prompt), settings, prompt)
    assert chi_square_p(Counter(a[0] for a in answers), first, total) > 1e-3
    second = torch.zeros(32, dtype=torch.float64)
    for token in range(32):
        after = (*prompt, token)
        second += first[token] * warped(next_token_logits(after), settings, after)
    assert chi_square_p(Counter(a[1] for a in answers), second, total) > 1e-3
    likeliest = int(first.argmax())
    follows = Counter(a[1] for a in answers if a[0] == likeliest)
    conditional = warped(next_token_logits((*prompt, likeliest)), settings, (*prompt, likeliest))
    assert chi_square_p(follows, conditional, sum(follows.values())) > 1e-3, "the draws of two steps are independent"


def test_prompts_of_equal_seed_draw_independently(
    tiny_vocab: EngineUnderTest, checkpoint_folder: Callable[[str], Path], reference: Callable[..., Any]
) -> None:
    """A run has one seed: its rows must not all draw the same uniform number."""
    total = 2000
    rng = random.Random(0)
    prompts = {n: random_prompt(rng, 8, 32) for n in range(total)}
    sampling = SamplingParams(max_new_tokens=1, temperature=1.0, seed=42)
    answers = tiny_vocab.answer(Request(id=n, prompt_ids=p, sampling=sampling) for n, p in prompts.items())
    with torch.no_grad():
        logits_BV = reference(checkpoint_folder("llama-vocab32"), torch.float64)(
            torch.tensor([*prompts.values()])
        ).logits
    places = []
    for n, probabilities in enumerate(torch.softmax(logits_BV[:, -1], dim=-1)):
        token = answers[n].token_ids[0]
        # where the draw fell in the cumulative distribution, spread evenly within its step
        places.append(float(probabilities[:token].sum()) + rng.random() * float(probabilities[token]))
    assert stats.kstest(places, "uniform").pvalue > 1e-3


def test_greedy_with_a_repetition_penalty_equals_generate(
    checkpoint_folder: Callable[[str], Path], reference: Callable[..., Any], build_engine: Callable[..., Any]
) -> None:
    """Penalties for what stands in the prompt and for what was answered; below 1 repetition is sought."""
    folder, rng = checkpoint_folder("llama"), random.Random(7)
    lengths = (1, 5, 40, 300)
    requests = [
        Request(
            id=n,
            prompt_ids=random_prompt(rng, lengths[n % 4]),
            sampling=SamplingParams(max_new_tokens=30, repetition_penalty=(1.3, 3.0, 0.7, 1.0)[n // 4 % 4]),
        )
        for n in range(32)
    ]
    expected = oracle_generate_all(reference(folder), requests)
    answers = build_engine(folder, slots=16).answer(requests)
    assert {n: a.token_ids for n, a in answers.items()} == {n: a.token_ids for n, a in expected.items()}
    strong = [a.token_ids for n, a in answers.items() if n // 4 % 4 == 1]
    assert all(len(set(tokens)) == len(tokens) for tokens in strong)
    plain = [a.token_ids for n, a in answers.items() if n // 4 % 4 == 2]
    assert all(len(set(tokens)) < len(tokens) for tokens in plain)


def test_equal_seeds_give_equal_answers_and_others_do_not(
    checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    engine = build_engine(checkpoint_folder("llama"))
    prompt = random_prompt(random.Random(5), 9)

    def answer(seed: int) -> tuple[int, ...]:
        sampling = SamplingParams(max_new_tokens=12, temperature=1.0, seed=seed)
        tokens: tuple[int, ...] = engine.answer([Request(id=0, prompt_ids=prompt, sampling=sampling)])[0].token_ids
        return tokens

    seeds = (0, 1, 7, 2**32, 2**64 - 1)
    assert len({answer(s) for s in seeds}) == len(seeds)
    assert all(answer(s) == answer(s) for s in seeds)


def test_equal_prompts_with_equal_settings_get_equal_answers_in_one_job(
    checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    engine = build_engine(checkpoint_folder("llama"), slots=16)
    prompt = random_prompt(random.Random(6), 9)
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, seed=3)
    answers = engine.answer(Request(id=n, prompt_ids=prompt, sampling=sampling) for n in range(40))
    assert len({(a.token_ids, a.cumulative_logprob) for a in answers.values()}) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_new_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")),
     ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.1), ("seed", -1), ("seed", 2**64),
     ("repetition_penalty", 0.0), ("repetition_penalty", float("inf")), ("n", 0), ("logprobs", -1), ("logprobs", 21),
     ("stop", ("",)), ("stop_token_ids", (3, -1))],
)  # fmt: skip
def test_settings_out_of_range_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"sampling.{key}"):
        SamplingParams(**{key: value})
