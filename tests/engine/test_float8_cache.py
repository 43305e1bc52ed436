"""Keys and values kept in FP8: what rows get is close, and depends on the row alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import greedy, random_prompt

from pipeline.core import Request, SamplingParams
from pipeline.engine.kv_cache import KVCache, Segment
from pipeline.engine.plan import LengthClass, ModelGeometry
from pipeline.engine.prefix import Splits
from pipeline.kernels.float8 import dequantize, quantize

FLOAT8 = {"kv_dtype": "float8_e4m3"}
GEOMETRY = ModelGeometry(layers=2, kv_heads=2, head_dim=8, hidden=16, intermediate=32, vocab=50, max_positions=32)
HEAD = tuple(range(5, 45))


def rows(count: int) -> list[Request]:
    """Greedy and drawn rows of all lengths, half of them with a beginning in common."""
    rng = random.Random(3)
    made = []
    for n in range(count):
        prompt = random_prompt(rng, rng.choice([1, 8, 31, 60, 230, 300]))
        sampling = SamplingParams(max_new_tokens=rng.choice([2, 9, 20]), temperature=(0.0, 1.0)[n % 3 == 2], seed=n)
        made.append(Request(id=n, prompt_ids=HEAD + prompt if n % 2 else prompt, sampling=sampling))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_row_does_not_depend_on_the_others(
    dtype: torch.dtype, checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    under_test = build_engine(checkpoint_folder("llama-wide"), dtype, "none", slots=32, **FLOAT8)
    under_test = replace(under_test, splits=Splits(head=HEAD, grid=64))
    asked = rows(16)
    expected = under_test.answer(asked)
    assert under_test.answer(random.Random(1).sample(asked, len(asked))) == expected
    for row in asked[::7]:
        assert under_test.answer([row]) == {row.id: expected[row.id]}


def test_answers_are_near_those_of_the_full_precision(
    checkpoint_folder: Callable[[str], Path], build_engine: Callable[..., Any]
) -> None:
    """The second token is the first that the cache decides on; later ones may follow another text."""
    rng = random.Random(5)
    folder = checkpoint_folder("llama")
    asked = [greedy(n, random_prompt(rng, rng.choice([5, 40, 200])), 2) for n in range(60)]
    asked = [replace(row, sampling=replace(row.sampling, logprobs=0)) for row in asked]
    plain, float8 = (build_engine(folder, slots=16, **kind).answer(asked) for kind in ({}, FLOAT8))
    pairs = [(plain[n].logprobs[1], float8[n].logprobs[1]) for n in plain]
    same = [(a, b) for a, b in pairs if a.token_id == b.token_id]
    assert len(same) > 0.6 * len(pairs), "random weights: the likeliest tokens are near each other"
    errors = [abs(a.logprob - b.logprob) for a, b in same]
    assert max(errors) < 0.5
    assert 1e-5 < sum(errors) / len(errors) < 0.1


def a_cache() -> KVCache:
    return KVCache(GEOMETRY, LengthClass(slots=16, max_len=32), torch.bfloat16, torch.device("cpu"), float8=True)


def test_tokens_and_segments_are_kept_as_codes_with_a_scale_each() -> None:
    cache = a_cache()
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 5, 8).bfloat16() * torch.tensor([1e-3, 1e3])[:, None, None]
    cache.write(1, torch.tensor([3, 3, 4, 4, 16]), torch.tensor([0, 1, 7, 8, 0]), k, v)
    segment = Segment(10, 15)
    segment.put(0, k, v)
    segment.put(1, v, k)
    cache.copy(torch.tensor([5, 6]), segment)
    read = cache.read(1)
    assert read.keys.dtype == read.values.dtype == torch.uint8
    for token, (slot, position) in enumerate([(3, 0), (3, 1), (4, 7), (4, 8)]):
        for stored, scales, x in ((read.keys, read.key_scales, k), (read.values, read.value_scales, v)):
            assert scales is not None
            expected = dequantize(*quantize(x[:, token]))
            assert torch.equal(dequantize(stored[slot, :, position], scales[slot, :, position]), expected)
    for slot in (5, 6):
        assert read.key_scales is not None
        kept = dequantize(read.keys[slot, :, 10:15], read.key_scales[slot, :, 10:15])
        assert torch.equal(kept, dequantize(*quantize(v)))


def test_a_cleared_slot_shows_nothing_of_its_nans() -> None:
    cache = a_cache()
    broken = torch.full((2, 1, 8), float("nan"))
    cache.write(0, torch.tensor([3]), torch.tensor([2]), broken, broken)
    read = cache.read(0)
    assert read.key_scales is not None
    assert read.value_scales is not None
    assert bool(read.key_scales[3, :, 2].isnan().all())
    cache.clear(3)
    assert not any(bool(x[3].any()) for x in (read.keys, read.values, read.key_scales, read.value_scales))
