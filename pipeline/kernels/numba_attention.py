"""Decode attention on a CPU in machine code that Numba makes; it is imported only where it runs."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import RunFailed
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
        importlib.import_module("pipeline.kernels.numba_code.decode")
    except ImportError as error:
        return f"numba cannot be imported ({error})"
    except RuntimeError as error:  # how Numba says that it finds no folder
        return f"Numba has nowhere to keep its machine code ({error}); NUMBA_CACHE_DIR can name a folder"
    return None


def attend_cached(
    q_BHD: Tensor, layer: CachedLayer, lengths_B: Tensor, rule: AttentionRule, splits: int
) -> tuple[Tensor, Tensor]:
    """See `AttendCached`: in float32 whatever the dtype, with every slot read in one piece up to its row's end."""
    threads = torch.get_num_threads()
    attend = _kernel(layer.keys.dtype)
    _take_threads(threads)
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
    """Read the kernel from where it is kept, or compile it first."""
    stored = torch.zeros(1, 1, 1, need.head_dim, dtype=torch.uint8 if need.float8 else need.dtype)
    scales = torch.ones(1, 1, 1, dtype=torch.float32) if need.float8 else None
    q_BHD, lengths_B = torch.zeros(1, 1, need.head_dim, dtype=need.dtype), torch.ones(1, dtype=torch.int64)
    attend_cached(q_BHD, CachedLayer(stored, stored, scales, scales), lengths_B, AttentionRule(1.0), 1)


@cache
def _kernel(stored: torch.dtype) -> Any:
    """The kernel for a cache of this dtype, always as it is kept on the disk; RunFailed where it cannot be kept.

    Numba links what it has just compiled otherwise than what it reads, so that sums can have other last bits: a
    process that compiles would not answer as the next one does. So another process compiles.
    """
    from pipeline.kernels.numba_code.decode import attend

    signature = _signature(stored)
    found = attend._cache.load_overload(signature, attend.targetctx)
    if found is None:
        script = f"from {__name__} import compile_and_keep; compile_and_keep({str(stored).removeprefix('torch.')!r})"
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        made = subprocess.run(  # noqa: S603  # our own code
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
        )
        found = attend._cache.load_overload(signature, attend.targetctx)
        if found is None:
            said = (made.stderr.strip().splitlines() or [f"exit code {made.returncode}"])[-1]
            raise RunFailed(
                f"the kernel that Numba compiles is not to be found in {attend._cache.cache_path} ({said}); name "
                "another folder by NUMBA_CACHE_DIR, or use engine.attention=slotwise in another output.dir"
            )
    attend.targetctx.insert_user_function(found.entry_point, found.fndesc, [found.library])
    attend.add_overload(found)
    attend.disable_compile()  # arguments of other types would be compiled here
    return attend


def compile_and_keep(stored: str) -> None:
    """Compile the kernel for a cache of this dtype and leave it to others."""
    from pipeline.kernels.numba_code.decode import attend

    attend.compile(_signature(getattr(torch, stored)))


def _signature(stored: torch.dtype) -> tuple[Any, ...]:
    """The types of the kernel's arguments."""
    from numba import types

    def array(kind: Any, dimensions: int) -> Any:
        return types.Array(kind, dimensions, "C")

    number = {torch.bfloat16: types.uint16, torch.uint8: types.uint8, torch.float32: types.float32}[stored]
    single, index = types.float32, types.int64
    return (
        array(single, 4), array(number, 4), array(number, 4), array(single, 3), array(single, 3),
        array(index, 1), array(index, 1), array(index, 1), single, single, array(single, 4), array(single, 3),
    )  # fmt: skip


def _take_threads(threads: int) -> None:
    """Let the next kernel run on as many threads as torch's operators do, and torch keep them.

    When Numba first starts its threads, as the first kernel is read, it sets OpenMP's number, which is torch's too, to
    that of the processors.
    """
    from numba import set_num_threads
    from numba.core.config import NUMBA_NUM_THREADS

    set_num_threads(min(threads, NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _bits(stored: Tensor) -> Any:
    """The cache as numbers that Numba knows: bfloat16 as uint16."""
    return stored.view(torch.uint16).numpy() if stored.dtype == torch.bfloat16 else stored.numpy()


def _single(value: float) -> Any:
    import numpy as np

    return np.float32(value)
