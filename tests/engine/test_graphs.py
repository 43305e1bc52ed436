"""Decode steps as they are captured: no question to the host, nothing that moves, and the same bits when replayed."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import drive, random_prompt
from tape import TapeRecorder, addresses
from torch import Tensor

from pipeline.core import Request, SamplingParams
from pipeline.engine.attention import SlotDecode
from pipeline.engine.graphs import Eager, recorder_for
from pipeline.kernels.cache_attention import attend_cached_reference

MODELS = [
    pytest.param("llama", torch.float32, "none", {}, id="llama"),
    pytest.param("llama", torch.bfloat16, "nf4", {}, id="llama-nf4"),
    pytest.param("llama", torch.float32, "none", {"kv_dtype": "float8_e4m3"}, id="llama-float8"),
    pytest.param("llama", torch.float32, "int8-plain", {}, id="llama-int8"),
]


def varied(count: int) -> list[Request]:
    """Rows of two length classes, greedy and drawn, with and without what the sampler keeps on the device."""
    rng = random.Random(0)
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "seed": 3},
        {"repetition_penalty": 1.2},
        {"temperature": 1.2, "top_k": 9, "logprobs": 2},
    ]
    return [
        Request(
            id=n,
            prompt_ids=random_prompt(rng, rng.choice([1, 9, 40, 250])),
            sampling=SamplingParams(max_new_tokens=rng.choice([1, 5, 12]), **settings[n % 4]),
        )
        for n in range(count)
    ]


@pytest.mark.parametrize(("name", "dtype", "quant", "settings"), MODELS)
def test_a_captured_step_gives_the_same_bits(
    name: str, dtype: torch.dtype, quant: str, settings: dict[str, Any],
    checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any],
) -> None:  # fmt: skip
    """Replayed as a CUDA graph is, without the model's Python, through refills, releases and other samplers.

    Other architectures are in tests/models/test_architectures.py.
    """
    under_test = build_engine(checkpoint_folder(name), dtype, quant, slots=16, **settings)
    under_test = replace(under_test, attend=attend_cached_reference)  # the other one asks the host for lengths
    rows = varied(28)
    expected = under_test.answer(rows)
    recorder = TapeRecorder()
    engine = under_test.engine(recorder=recorder)
    assert drive(engine, rows, polls_between=1) == expected
    used = {c for c in under_test.plan.length_classes if c in engine._batches}
    assert recorder.graphs == engine.counters.graphs == len(used) == 2
    assert recorder.replays == engine.counters.decode_steps > 20


class Watch:
    """A model that notes where the tensors of each decode step lie."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        self.seen: dict[int, set[tuple[int, ...]]] = defaultdict(set)
        self.steps = 0

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, attention: Any) -> Tensor:
        if isinstance(attention, SlotDecode):
            self.steps += 1
            cache = attention.cache
            where = addresses(tokens_T, positions_T, attention.slots_B, attention.reach_T, *cache.keys, *cache.values)
            self.seen[cache.max_len].add(where)
        hidden: Tensor = self.decoder.hidden(tokens_T, positions_T, attention)
        return hidden

    def head(self, hidden_LC: Tensor) -> Tensor:
        logits: Tensor = self.decoder.head(hidden_LC)
        return logits


def test_what_a_step_reads_never_moves(
    checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    under_test = build_engine(checkpoint_folder("llama"), slots=16)
    watch = Watch(under_test.decoder)
    engine = under_test.engine(watch)
    rows = varied(60)
    drive(engine, rows[:30], polls_between=1)
    drive(engine, rows, polls_between=0)
    assert watch.steps > 30
    assert len(watch.seen) == 2
    assert all(len(places) == 1 for places in watch.seen.values())


def test_int8_with_a_threshold_is_not_captured(
    checkpoint_folder: Callable[[str], Path], load_decoder: Callable[..., Any]
) -> None:
    folder = checkpoint_folder("llama")
    outliers = load_decoder(folder, torch.float32, "int8", int8_threshold=6.0)
    assert "threshold 6 asks the host" in outliers.capture_obstacle()
    assert load_decoder(folder, torch.float32, "int8", int8_threshold=0.0).capture_obstacle() is None
    assert load_decoder(folder, torch.float32, "nf4").capture_obstacle() is None


@pytest.mark.parametrize(
    ("compile_", "device", "obstacle", "reason"),
    [
        ("off", "cuda", None, "engine.compile=off"),
        ("auto", "cpu", None, "run on cuda devices, not on cpu"),
        ("auto", "cuda", "the host is asked", "the host is asked"),
    ],
)
def test_why_steps_run_as_they_are(compile_: str, device: str, obstacle: str | None, reason: str) -> None:
    recorder = recorder_for(compile_, torch.device(device), obstacle)
    assert isinstance(recorder, Eager)
    assert recorder.graphs == 0
    assert reason in str(recorder.eager_reason)
