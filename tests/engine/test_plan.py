"""The list of shapes: nothing else is run, it survives run.json, and too little memory is told with both sizes."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import drive, greedy, random_prompt
from torch import Tensor

from pipeline.core import Request, SamplingParams
from pipeline.engine.attention import SlotDecode
from pipeline.engine.plan import GIB, MIB, EnginePlan, EngineSettings, ModelGeometry, Proven, longest_rows, plan_engine
from pipeline.errors import ConfigError

LLAMA3 = ModelGeometry(
    layers=32, kv_heads=8, head_dim=128, hidden=4096, intermediate=14336, vocab=128256, max_positions=8192
)
KV_BYTES_LLAMA3 = 131072
"""Keys and values of one token of Llama-3-8B in bfloat16: 2 * 32 layers * 8 heads * 128 * 2 bytes."""


def make_plan(budget: int = 64 * GIB, device: str = "cuda", longest: int = 8192, **engine: Any) -> EnginePlan:
    return plan_engine(
        LLAMA3,
        EngineSettings(**engine),
        longest=longest,
        device_type=device,
        kv_budget_bytes=budget,
        kv_itemsize=2,
    )


def test_kv_bytes_of_a_known_model() -> None:
    assert LLAMA3.kv_bytes_per_token(2) == KV_BYTES_LLAMA3


@given(
    device=st.sampled_from(["cpu", "cuda"]),
    longest=st.integers(2, 40_000),
    slots=st.none() | st.integers(1, 700),
    prefill_tokens=st.none() | st.integers(1, 20_000),
)
def test_every_shape_is_a_multiple_of_16_and_holds_the_longest_row(
    device: str, longest: int, slots: int | None, prefill_tokens: int | None
) -> None:
    plan = make_plan(1 << 50, device, longest, slots=slots, prefill_tokens=prefill_tokens)
    for sizes in (plan.prefill_tokens, [plan.logit_rows], [c.slots for c in plan.length_classes]):
        assert all(n > 0 and n % 16 == 0 for n in sizes)
    assert plan.max_len == longest
    assert list(plan.prefill_tokens) == sorted(set(plan.prefill_tokens))
    assert max(plan.prefill_tokens) >= longest
    assert all(b <= 2 * a for a, b in pairwise(plan.prefill_tokens)), "a row alone fills at least half"
    assert prefill_tokens is None or plan.prefill_tokens[0] - prefill_tokens in range(16)
    assert plan.logit_rows <= plan.prefill_tokens[0]
    assert [c.max_len for c in plan.length_classes] == sorted({c.max_len for c in plan.length_classes})


@given(
    device=st.sampled_from(["cpu", "cuda"]),
    longest=st.integers(2, 20_000),
    budget=st.integers(0, 80 * GIB),
    slots=st.none() | st.integers(1, 600),
)
def test_a_plan_stays_within_its_budget_or_says_what_is_missing(
    device: str, longest: int, budget: int, slots: int | None
) -> None:
    try:
        plan = make_plan(budget, device, longest, slots=slots)
    except ConfigError as error:
        size = f"{budget / GIB:.2f} GiB" if budget >= GIB else f"{budget / MIB:.2f} MiB"
        assert f"but {size} are left" in str(error)
    else:
        taken = sum((c.slots + 1) * c.max_len for c in plan.length_classes) * KV_BYTES_LLAMA3
        assert taken == plan.kv_bytes <= budget
        assert slots is None or plan.length_classes[0].slots >= slots


def test_keys_and_values_in_float8_take_half_the_memory_and_their_scales() -> None:
    plain, float8 = make_plan(1 << 50), make_plan(1 << 50, kv_dtype="float8_e4m3")
    per_token = 2 * 32 * 8 * (128 + 4)  # 32 layers, 8 heads of 128 codes and a scale, keys and values
    assert float8.kv_bytes * KV_BYTES_LLAMA3 == plain.kv_bytes * per_token
    assert (
        make_plan(40 * GIB, kv_dtype="float8_e4m3").length_classes[0].slots
        > make_plan(40 * GIB).length_classes[0].slots
    )


def test_long_slots_are_read_in_a_fixed_number_of_parts() -> None:
    plan = make_plan(1 << 50)
    assert [(c.slots, c.max_len, c.splits) for c in plan.length_classes] == [
        (512, 256, 1), (128, 1024, 1), (32, 4096, 2), (16, 8192, 4)
    ]  # fmt: skip
    assert {c.splits for c in make_plan(1 << 50, "cpu").length_classes} == {1}


def classes_where_attention_stops(budget: int, **engine: Any) -> list[tuple[int, int]]:
    plan = plan_engine(
        LLAMA3,
        EngineSettings(**engine),
        longest=4096,
        device_type="cpu",
        kv_budget_bytes=budget,
        kv_itemsize=2,
        stops_at_length=True,
    )
    assert plan.kv_bytes <= budget
    return [(c.slots, c.max_len) for c in plan.length_classes]


def test_where_attention_stops_at_a_rows_end_short_classes_only_save_memory() -> None:
    assert classes_where_attention_stops(40 * GIB) == [(64, 4096)]  # 65 * 4096 tokens of 128 KiB are 32.5 GiB
    assert classes_where_attention_stops(20 * GIB) == [(64, 1024), (16, 4096)]  # 8.1 and 8.5 GiB
    assert classes_where_attention_stops(14 * GIB) == [(64, 256), (16, 1024), (16, 4096)]
    assert classes_where_attention_stops(13 * GIB)[0] == (64, 256)
    assert classes_where_attention_stops(40 * GIB, slots=16) == [(16, 4096)]
    assert classes_where_attention_stops(20 * GIB, slots=100) == [(112, 256), (16, 1024), (16, 4096)]


def test_every_shape_is_told() -> None:
    plan = make_plan(1 << 50, longest=1024)
    assert plan.describe() == "4 static shapes: prefill 8192, decode 512 x 256, decode 128 x 1024, logits 256"
    assert len(plan.shapes) == 4


def test_auto_slots_are_lowered_until_they_fit() -> None:
    large, small = make_plan(200 * GIB), make_plan(40 * GIB)
    assert small.length_classes[0].slots < large.length_classes[0].slots == 512


@pytest.mark.parametrize(
    ("engine", "remedy"), [({"slots": 512}, "lower engine.slots or engine.max_len"), ({}, "lower engine.max_len")]
)
def test_a_budget_that_is_too_small_names_both_sizes(engine: dict[str, int], remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy) as caught:
        make_plan(2 * GIB, **engine)
    sizes = [float(s) for s in re.findall(r"([\d.]+) GiB", str(caught.value))]
    assert sizes[0] > sizes[1] == 2.0
    assert "model.memory" in str(caught.value)


def test_a_negative_budget_is_told_as_nothing_left() -> None:
    with pytest.raises(ConfigError, match=r"but 0\.00 MiB are left"):
        make_plan(-GIB)


def test_sizes_of_a_small_model_are_told_in_mib() -> None:
    """A demo model's keys and values would all be 0.00 GiB."""
    small = ModelGeometry(layers=2, kv_heads=2, head_dim=16, hidden=64, intermediate=96, vocab=99, max_positions=512)
    with pytest.raises(ConfigError, match=r"need 2\.12 MiB but 0\.50 MiB are left for them") as caught:
        plan_engine(small, EngineSettings(), longest=256, device_type="cpu", kv_budget_bytes=MIB // 2, kv_itemsize=4)
    assert "engine.slots=16 and rows of up to 256 tokens" in str(caught.value)


@pytest.mark.parametrize("key", ["engine.max_len", "model.max_len"])
def test_rows_longer_than_the_model_are_refused(key: str) -> None:
    settings = EngineSettings(max_len=9000 if key.startswith("engine") else None)
    with pytest.raises(ConfigError, match=f"{key}=9000 is more than the 8192 positions"):
        longest_rows(LLAMA3, settings, 9000 if key.startswith("model") else None)


def test_the_shorter_of_two_limits_counts() -> None:
    assert longest_rows(LLAMA3, EngineSettings(max_len=700), 600) == [600]
    assert longest_rows(LLAMA3, EngineSettings(max_len=500), 600) == [500]
    lengths = longest_rows(LLAMA3, EngineSettings(), None)
    assert lengths[0] == 8192
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("engine", [{}, {"slots": 48, "prefill_tokens": 100}])
def test_a_plan_survives_json(device: str, engine: dict[str, int]) -> None:
    plan = make_plan(device=device, **engine)
    again = EnginePlan.from_dict(json.loads(json.dumps(plan.as_dict())))
    assert again == plan
    assert hash(again) == hash(plan)


class Spy:
    """A model that notes the shape of each pass, and of each product with the output head."""

    def __init__(self, decoder: Any, looked_for: tuple[int, ...] = ()) -> None:
        """`met` are the shapes of the prefill passes that hold the tokens looked for."""
        self.decoder = decoder
        self.looked_for = list(looked_for)
        self.met: set[int] = set()
        self.prefills: set[int] = set()
        self.decodes: set[tuple[int, int]] = set()
        self.heads: dict[bool, set[int]] = {True: set(), False: set()}
        self.decoding = False

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, attention: Any) -> Tensor:
        assert tokens_T.shape == positions_T.shape
        self.decoding = isinstance(attention, SlotDecode)
        if self.decoding:
            self.decodes.add((tokens_T.shape[0], attention.cache.max_len))
        else:
            self.prefills.add(tokens_T.shape[0])
            starts = [row.start for row in attention.rows]
            if self.looked_for in [tokens_T[s : s + len(self.looked_for)].tolist() for s in starts]:
                self.met.add(tokens_T.shape[0])
        hidden: Tensor = self.decoder.hidden(tokens_T, positions_T, attention)
        return hidden

    def head(self, hidden_LC: Tensor) -> Tensor:
        self.heads[self.decoding].add(hidden_LC.shape[0])
        logits: Tensor = self.decoder.head(hidden_LC)
        return logits


@pytest.mark.parametrize(
    "engine",
    [
        {"slots": 64, "prefill_tokens": 128},
        {"slots": 64, "prefill_tokens": 128, "settled": True},
        {"slots": 16, "prefill_tokens": 1024},
        {},
    ],
)
def test_only_listed_shapes_are_run(
    engine: dict[str, int], checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    under_test = build_engine(checkpoint_folder("llama"), **engine)
    plan = under_test.plan
    spy = Spy(under_test.decoder)
    rng = random.Random(0)
    rows: list[Request] = []
    for n in range(150):
        prompt = random_prompt(rng, rng.choice([1, 3, 17, 50, 120, 260, 500]))
        if n % 3 == 0:
            candidates = tuple(random_prompt(rng, rng.randrange(1, 9)) for _ in range(rng.choice([1, 5, 15])))
            rows.append(Request(id=n, prompt_ids=prompt, candidates=candidates))
        elif n % 7 == 0:
            rows.append(Request(id=n, prompt_ids=(5, *prompt), target_ids=(6,) * (n % 2), score_prompt=True))
        else:
            rows.append(greedy(n, prompt, rng.choice([1, 3, 20])))
    running = under_test.engine(spy)
    assert len(drive(running, rows, polls_between=0)) == 150
    drive(running, rows[:40], polls_between=1)
    assert len(spy.prefills) > 1 or len(plan.prefill_tokens) == 1
    proven = {kind: rows for (kind, _), rows in plan.proven.items()}
    assert bool(proven) == ("settled" in engine)
    assert spy.prefills <= {*plan.prefill_tokens, *proven.get("prefill", ())}
    slots = {c.max_len: {c.slots, *plan.proven.get(("decode", c.slots), ())} for c in plan.length_classes}
    assert all(rows in slots[max_len] for rows, max_len in spy.decodes)
    assert {max_len for _, max_len in spy.decodes} == set(slots)
    assert spy.heads[False] <= {plan.logit_rows, *proven.get("logits", ())}
    assert spy.heads[True] == {rows for rows, _ in spy.decodes}
    if not proven:
        assert spy.decodes == {(c.slots, c.max_len) for c in plan.length_classes}
        assert spy.heads[False] == {plan.logit_rows}


def test_smaller_numbers_of_rows_are_listed_and_survive_run_json() -> None:
    plan = make_plan(1 << 50, "cpu", slots=64, prefill_tokens=512)
    assert plan.smaller == (16, 32, 48, 64, 96, 128, 192, 256, 384)
    stored = json.loads(json.dumps(plan.as_dict()))
    assert EnginePlan.from_dict(stored) == plan
    del stored["smaller"]  # of a run that was begun before there were any
    assert EnginePlan.from_dict(stored).smaller == ()
    assert make_plan(1 << 50, "cuda").smaller == ()


def test_the_least_proven_number_of_rows_is_run() -> None:
    proven: Proven = {("decode", 64): (16, 48), ("prefill", 512): (128,)}
    plan = replace(make_plan(1 << 50, "cpu", slots=64, prefill_tokens=512), proven=proven)
    assert [plan.rows("decode", 64, needed) for needed in (1, 16, 17, 48, 49, 64)] == [16, 16, 48, 48, 64, 64]
    assert [plan.prefill_rows(tokens) for tokens in (1, 128, 129, 513)] == [128, 128, 512, 1024]
    assert plan.rows("logits", 64, 1) == 64


@pytest.mark.parametrize("scored", [False, True])
def test_a_row_s_neighbours_do_not_decide_on_the_size_of_its_pass(
    scored: bool, checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    """The sizes that a row runs in, alone and in company of others that are shorter and longer."""
    under_test = build_engine(checkpoint_folder("llama"), slots=16, prefill_tokens=64)
    rng = random.Random(0)
    others = [random_prompt(rng, length) for length in (1, 30, 63, 64, 65, 200, 600)]

    def request(name: Any, prompt: tuple[int, ...]) -> Request:
        return Request(id=name, prompt_ids=prompt, candidates=((5, 6),)) if scored else greedy(name, prompt, 2)

    for length in (1, 40, 63, 64, 65, 130, 300):
        row = request("row", random_prompt(rng, length))
        sizes = set()
        for crowd in ([], others[:2], others, list(reversed(others))):
            spy = Spy(under_test.decoder, row.prompt_ids)
            drive(under_test.engine(spy), [*(request(n, p) for n, p in enumerate(crowd)), row])
            sizes |= spy.met
        assert len(sizes) == 1


def test_counters_count_what_was_asked_and_answered(
    checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    under_test = build_engine(checkpoint_folder("llama"), slots=16)
    rng = random.Random(1)
    rows = [greedy(n, random_prompt(rng, rng.choice([1, 30, 300])), 7) for n in range(20)]
    spy = Spy(under_test.decoder)
    engine = under_test.engine(spy)
    answers = drive(engine, rows)
    counters = engine.counters
    assert counters.prompt_tokens == sum(len(r.prompt_ids) for r in rows)
    assert counters.completion_tokens == sum(len(a.token_ids) for a in answers.values())
    assert counters.padded_tokens > 0
    assert min(counters.prefill_passes, counters.decode_steps, counters.prefill_s, counters.decode_s) > 0


def test_a_class_that_no_row_needs_takes_no_memory(
    checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    under_test = build_engine(checkpoint_folder("llama"))
    engine = under_test.engine()
    made = []
    make_cache = engine._make_cache
    engine._make_cache = lambda c: made.append(c) or make_cache(c)  # type: ignore[func-returns-value]
    drive(engine, [greedy(0, (5, 6), 3), Request(id=1, prompt_ids=(5,) * 400, candidates=((6,), (7,)))])
    assert made == [under_test.plan.length_classes[0]]
    sampled = SamplingParams(max_new_tokens=3, temperature=1.0)
    drive(engine, [Request(id=2, prompt_ids=(5,) * 400, sampling=sampled)])
    assert made == list(under_test.plan.length_classes)
