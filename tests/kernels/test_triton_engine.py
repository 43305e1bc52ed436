"""Whole requests through the engine with the Triton attention kernels, interpreted, against those in plain torch."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import drive, random_prompt
from triton_process import TritonProcess

from pipeline.core import Completion, Request, SamplingParams
from pipeline.engine.engine import Engine
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.plan import EngineSettings, LengthClass, plan_engine
from pipeline.engine.prefix import Splits
from pipeline.kernels.registry import CACHE_ATTENTION
from pipeline.models.architecture import geometry_of, load_config
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.loader import load_model

HEAD = tuple(range(10, 40))
CPU = torch.device("cpu")


def requests() -> list[Request]:
    """Rows to generate and to score, some of which begin alike."""
    rng = random.Random(0)
    rows = []
    for n, length in enumerate((1, 20, 70, 33, 9, 40)):
        prompt = (HEAD if n % 2 else ()) + random_prompt(rng, length)
        candidates = ((5, 6, 7), (5, 8), (9,)) if n == 3 else ()
        sampling = SamplingParams(max_new_tokens=4, logprobs=0)
        rows.append(Request(id=n, prompt_ids=prompt, candidates=candidates, sampling=sampling))
    return rows


def answers(folder: Path, kernel: str, dtype: torch.dtype, kv_dtype: str, rows: list[Request]) -> dict[int, Completion]:
    """What an engine with this kernel answers; its slots are read in two splits."""
    config = load_config(str(folder), str(folder), trust_remote_code=False)
    model = load_model(open_checkpoint(str(folder)), config, None, dtype, CPU)
    geometry = geometry_of(config)
    settings = EngineSettings(slots=16, prefill_tokens=128, kv_dtype=kv_dtype)
    plan = plan_engine(
        geometry, settings, longest=128, device_type="cpu", kv_budget_bytes=1 << 30, kv_itemsize=dtype.itemsize
    )
    chosen = CACHE_ATTENTION[kernel]

    def cache(length_class: LengthClass) -> KVCache:
        split = LengthClass(slots=length_class.slots, max_len=length_class.max_len, splits=2)
        return KVCache(geometry, split, dtype, CPU, float8=kv_dtype != "auto", attend=chosen.attend)

    engine = Engine(model, plan, cache, CPU, splits=Splits(head=HEAD, grid=32), rows_kernel=chosen.rows_in(dtype))
    found: dict[int, Completion] = drive(engine, rows)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"), [(torch.bfloat16, "auto"), (torch.float32, "float8_e4m3")], ids=["bfloat16", "float8"]
)
def test_answers_are_those_of_plain_torch(
    dtype: torch.dtype, kv_dtype: str, checkpoint_folder: Callable[[str], Path], interpreter: TritonProcess
) -> None:
    folder, rows = checkpoint_folder("llama"), requests()
    ours: dict[int, Any] = interpreter(answers, folder, "triton", dtype, kv_dtype, rows)
    theirs = answers(folder, "reference", dtype, kv_dtype, rows)
    close = 1e-4 if dtype == torch.float32 else 0.15
    compared = 0
    for row in rows:
        one, other = ours[row.id], theirs[row.id]
        assert one.candidate_logprobs == pytest.approx(other.candidate_logprobs, abs=3 * close)
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            if a.token_id != b.token_id:
                assert dtype == torch.bfloat16, "float32 does not tie"
                break
            assert a.logprob == pytest.approx(b.logprob, abs=close)
            compared += 1
    assert compared > (18 if dtype == torch.float32 else 9)
    if dtype == torch.bfloat16:
        assert interpreter(answers, folder, "triton", dtype, kv_dtype, rows[::-1]) == ours, "the same bits"
