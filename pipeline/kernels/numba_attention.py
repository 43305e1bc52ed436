"""Decode attention on a CPU in machine code that Numba makes; it is imported only where it runs."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from pipeline.kernels.attention import AttentionRule
from pipeline.kernels.cache_attention import AttentionNeed, CachedLayer

DTYPES = (torch.float32, torch.bfloat16)


def can_run(need: AttentionNeed) -> str | None:
    """Why Numba's kernel cannot read the cache here, or None if it can."""
    if need.device_type != "cpu":
        return f"Numba's kernel runs on cpu, not on {need.device_type}"
    if need.dtype not in DTYPES:
        return f"Numba's kernel reads float32 and bfloat16, not {str(need.dtype).removeprefix('torch.')}"
    try:
        importlib.import_module("numba")
    except ImportError as error:
        return f"numba cannot be imported ({error})"
    return None


def attend_cached(
    q_BHD: Tensor, layer: CachedLayer, lengths_B: Tensor, rule: AttentionRule, splits: int
) -> tuple[Tensor, Tensor]:
    """See `AttendCached`: in float32 whatever the dtype, with every slot read in one piece up to its row's end."""
    from pipeline.kernels.numba_code.decode import attend

    _take_threads()
    queries, heads, dim = q_BHD.shape
    slots, kv_heads = layer.keys.shape[:2]
    q_BKGD = q_BHD.float().reshape(queries, kv_heads, heads // kv_heads, dim).contiguous()
    out_BKGD, lse_BKG = torch.zeros_like(q_BKGD), q_BKGD.new_full(q_BKGD.shape[:3], float("-inf"))
    no_scales = q_BKGD.new_empty(slots, kv_heads, 0)
    slots_B = torch.arange(queries) if layer.slots_B is None else layer.slots_B
    firsts_B = torch.zeros_like(lengths_B) if rule.window is None else (lengths_B - rule.window).clamp(min=0)
    attend(
        q_BKGD.numpy(),
        _bits(layer.keys),
        _bits(layer.values),
        (no_scales if layer.key_scales is None else layer.key_scales).numpy(),
        (no_scales if layer.value_scales is None else layer.value_scales).numpy(),
        slots_B.numpy(),
        firsts_B.numpy(),
        lengths_B.numpy(),
        _single(rule.scale),
        _single(rule.softcap or 0.0),
        out_BKGD.numpy(),
        lse_BKG.numpy(),
    )
    return out_BKGD.to(q_BHD.dtype).reshape(queries, heads, dim), lse_BKG.reshape(queries, heads)


def compile_for(need: AttentionNeed) -> None:
    """Compile the kernel, or read it from where it is kept."""
    stored = torch.zeros(1, 1, 1, need.head_dim, dtype=torch.uint8 if need.float8 else need.dtype)
    scales = torch.ones(1, 1, 1, dtype=torch.float32) if need.float8 else None
    q_BHD, lengths_B = torch.zeros(1, 1, need.head_dim, dtype=need.dtype), torch.ones(1, dtype=torch.int64)
    attend_cached(q_BHD, CachedLayer(stored, stored, scales, scales), lengths_B, AttentionRule(1.0), 1)


def _take_threads() -> None:
    """Let the next kernel run on as many threads as torch's operators do.

    Numba's first start of its threads sets OpenMP's number, which is torch's too, to the number of processors.
    """
    from numba import set_num_threads
    from numba.core.config import NUMBA_NUM_THREADS

    threads = torch.get_num_threads()
    set_num_threads(min(threads, NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _bits(stored: Tensor) -> Any:
    """The cache as numbers that Numba knows: bfloat16 as uint16."""
    return stored.view(torch.uint16).numpy() if stored.dtype == torch.bfloat16 else stored.numpy()


def _single(value: float) -> Any:
    import numpy as np

    return np.float32(value)
